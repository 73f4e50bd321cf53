#!/usr/bin/env bash
# Writes a release of the last commit into a new directory. `make release` calls it. What is not committed is left out.
#
#   tools/release.sh DIRECTORY
#
#   images/NAME.tar         each image for amd64 and arm64, as an OCI archive; images.txt: their names and digests
#   oom-tracer-VERSION.tgz  the chart, with its own version or that of a tag vX.Y.Z; its appVersion is the tag of the images
#   manifests.tar.gz        the chart as make manifests renders it, with these images
#   oom-tap_OS_ARCH.tar.gz  oom-tap, kubectl-oom and kubectl_complete-oom (zip for Windows, without the last)
#   oom.yaml                kubectl-oom as a plugin of krew: these archives with their digests
#   sbom/NAME.spdx.json     what is in each image: the Go modules with their hashes, C libraries, certificates (SPDX 2.3)
#   provenance.json         what was built from which commit, with what (in-toto, SLSA v1)
#   SHA256SUMS              of all of these
#
# The environment is that of tools/image/build.sh. Without images: IMAGES=none. TARGETS are the systems of oom-tap.
set -euo pipefail

out=$(realpath -m "$1")
cd "$(dirname "$0")/.."
tools/install-deps.sh "$CACHE/libbpf-bookworm-backports" jq zip
helm=$(tools/deploy/build.sh)/helm
if [[ -e $out ]]; then
	echo "$0: $out is there already: name a new directory (RELEASE_DIR=)" >&2
	exit 2
fi
mkdir -p "$out/images" "$out/sbom"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
started=$(date -u +%FT%TZ)

# Images take half an hour. From the working tree they would have what is edited meanwhile.
mkdir "$work/src"
git -c tar.umask=022 archive HEAD | tar -x -C "$work/src"
if [[ -n $(git status --porcelain) ]]; then echo "==> not committed, and left out:" && git status --short; fi
REVISION=$(git rev-parse HEAD)
VERSION=${VERSION%-dirty} TAG=${TAG%-dirty}
export REVISION VERSION TAG
cd "$work/src"

[[ ${IMAGES:-} == none ]] || tools/image/index.sh "$out/images"

# The tag of the images is what the chart installs by default.
version=()
[[ ! $VERSION =~ ^v([0-9]+\.[0-9]+\.[0-9]+.*)$ ]] || version=(--version "${BASH_REMATCH[1]}")
"$helm" package deploy/chart --app-version "$TAG" "${version[@]}" --destination "$out" >/dev/null
mkdir "$work/manifests"
SET="image.tag=$TAG" tools/deploy/manifests.sh "$work/manifests"
archive=(--sort=name --owner=0 --group=0 --numeric-owner "--mtime=@$SOURCE_DATE_EPOCH")
tar -C "$work" "${archive[@]}" -czf "$out/manifests.tar.gz" manifests

# A version of a plugin is a semantic one.
plugin=$VERSION
[[ $plugin =~ ^v[0-9]+\.[0-9]+\.[0-9]+ ]] || plugin=v0.0.0-g$VERSION
cat >"$out/oom.yaml" <<-END
	apiVersion: krew.googlecontainertools.github.com/v1alpha2
	kind: Plugin
	metadata:
	  name: oom
	spec:
	  version: $plugin
	  homepage: https://github.com/oom-tracer/oom-tracer
	  shortDescription: Show which pods the OOM killer hits, and why
	  description: |
	    Shows the OOM kills that OOM Tracer records: which workloads are killed most, what happened to one
	    pod, what to do about it, which nodes are watched. It needs a release of OOM Tracer in the cluster,
	    and finds it by the kubeconfig: no port-forward by hand, and no config.
	  caveats: |
	    For completion, link kubectl_complete-oom, which is beside the plugin in the store of krew, into a
	    directory of your PATH.
	  platforms:
END
for target in ${TARGETS:-linux/amd64 linux/arm64 darwin/amd64 darwin/arm64 windows/amd64 windows/arm64}; do
	os=${target%/*} arch=${target#*/} suffix='' type=tar.gz
	files=(LICENSE kubectl-oom kubectl_complete-oom oom-tap)
	[[ $os != windows ]] || { suffix=.exe type=zip files=(LICENSE kubectl-oom.exe oom-tap.exe); }
	name=oom-tap_${os}_$arch
	mkdir "$work/$name"
	echo "==> $name"
	for program in oom-tap kubectl-oom; do
		CGO_ENABLED=0 GOOS=$os GOARCH=$arch "$GO" build -trimpath -ldflags "-s -w -X $OBS.version=$VERSION -X $OBS.revision=$REVISION" \
			-o "$work/$name/$program$suffix" ./go/cmd/$program
	done
	cp LICENSE tools/kubectl_complete-oom "$work/$name"
	touch -d "@$SOURCE_DATE_EPOCH" "$work/$name"/*
	if [[ $os == windows ]]; then
		(cd "$work/$name" && zip -qX "$out/$name.zip" "${files[@]}")
	else
		tar -C "$work/$name" "${archive[@]}" -czf "$out/$name.tar.gz" "${files[@]}"
	fi
	sum=$(sha256sum "$out/$name.$type")
	cat >>"$out/oom.yaml" <<-END
		  - selector:
		      matchLabels: {os: $os, arch: $arch}
		    uri: https://github.com/oom-tracer/oom-tracer/releases/download/$VERSION/$name.$type
		    sha256: ${sum%% *}
		    bin: kubectl-oom$suffix
	END
done

# modules PROGRAM prints the Go modules in it: name, version, hash. They are the same for every system and architecture.
modules() {
	local module=. cgo=0
	[[ $1 != oom-descheduler ]] || module=go/descheduler
	[[ $1 != oom-tracer ]] || cgo=1 # libbpfgo
	# -e: the BPF object is not built.
	(cd $module && CGO_ENABLED=$cgo "$GO" list -e -deps -f '{{with .Module}}{{if not .Main}}{{with or .Replace .}}{{.Path}} {{.Version}} {{.Sum}}{{end}}{{end}}{{end}}' "./${2}cmd/$1") |
		sed "s|^\.\./\.\. .*|github.com/oom-tracer/oom-tracer $VERSION|" | LC_ALL=C sort -u
}
created=$(date -u -d "@$SOURCE_DATE_EPOCH" +%FT%TZ)
for program in oom-tracer oom-annotator oom-auth oom-notify oom-tap kubectl-oom oom-descheduler; do
	below=go/
	[[ $program != oom-descheduler ]] || below=''
	modules "$program" "$below" | jq -Rn --arg name "$program" --arg version "$VERSION" --arg time "$created" --arg revision "$REVISION" --arg go "$("$GO" env GOVERSION)" '
		([inputs | split(" ") | {name: .[0], version: .[1], hash: (.[2] // "")}]
			+ [{name: "stdlib", version: $go}, {name: "ca-certificates"}]
			# Statically linked.
			+ (if $name == "oom-tracer" then [{name: "libbpf"}, {name: "libelf"}, {name: "zlib"}, {name: "glibc"}] else [] end))
		| {spdxVersion: "SPDX-2.3", dataLicense: "CC0-1.0", SPDXID: "SPDXRef-DOCUMENT", name: $name,
			documentNamespace: "https://github.com/oom-tracer/oom-tracer/sbom/\($name)/\($revision)",
			creationInfo: {created: $time, creators: ["Tool: oom-tracer-tools/release.sh"]},
			packages: ([{SPDXID: "SPDXRef-0", name: $name, versionInfo: $version, downloadLocation: "NOASSERTION"}]
				+ [to_entries[] | {SPDXID: "SPDXRef-\(.key + 1)", name: .value.name, downloadLocation: "NOASSERTION"}
					+ (if .value.version then {versionInfo: .value.version} else {} end)
					+ (if (.value.version // "") | startswith("v") then {externalRefs: [{referenceCategory: "PACKAGE-MANAGER", referenceType: "purl",
						referenceLocator: "pkg:golang/\(.value.name)@\(.value.version)"}]} else {} end)
					+ (if (.value.hash // "") != "" then {comment: "Go module hash \(.value.hash)"} else {} end)]),
			relationships: ([{spdxElementId: "SPDXRef-DOCUMENT", relationshipType: "DESCRIBES", relatedSpdxElement: "SPDXRef-0"}]
				+ [range(1; length + 1) | {spdxElementId: "SPDXRef-0", relationshipType: "DEPENDS_ON", relatedSpdxElement: "SPDXRef-\(.)"}])}
	' >"$out/sbom/$program.spdx.json"
done

cd "$out"
files() { find . -type f ! -name SHA256SUMS ! -name provenance.json -printf '%P\n' | LC_ALL=C sort; }
files | xargs sha256sum | jq -Rn --arg revision "$REVISION" --arg version "$VERSION" --arg base "$BASE" --arg go "$("$GO" env GOVERSION)" \
	--arg started "$started" --arg ended "$(date -u +%FT%TZ)" '
	{_type: "https://in-toto.io/Statement/v1", predicateType: "https://slsa.dev/provenance/v1",
		subject: [inputs | capture("^(?<sha256>[0-9a-f]+)  (?<name>.*)$") | {name, digest: {sha256}}],
		predicate: {
			buildDefinition: {buildType: "https://github.com/oom-tracer/oom-tracer/make-release",
				externalParameters: {version: $version, base: $base}, internalParameters: {go: $go},
				resolvedDependencies: [{uri: "git+https://github.com/oom-tracer/oom-tracer", digest: {gitCommit: $revision}}]},
			runDetails: {builder: {id: "https://github.com/oom-tracer/oom-tracer/blob/main/tools/release.sh"}, metadata: {startedOn: $started, finishedOn: $ended}}}}' >provenance.json
{ files && echo provenance.json; } | xargs sha256sum >SHA256SUMS
echo "==> $out: $(wc -l <SHA256SUMS) files"
