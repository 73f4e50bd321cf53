#!/usr/bin/env bash
# Builds the images of Dockerfile.builder. `make image` calls it.
#
# From the environment: ARCH, PREFIX and TAG of the names, BASE, VERSION, REVISION, DATE (of the commit, YYYYMMDD), GO, CACHE, CONTAINER_TOOL,
# and KERNEL_BTF: a kernel's BTF, vmlinux, vmlinuz or package. Then oom-tracer alone is built, for that kernel,
# as TAG-btf-DIGEST, and only if the program fits it: the others have nothing to do with a kernel.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tools/image/engine.sh
. "$here/engine.sh"
cd "$here/../.."

case $ARCH in
amd64 | arm64) ;;
*)
	echo "$0: IMAGE_ARCH: must be amd64 or arm64, not $ARCH" >&2
	exit 2
	;;
esac
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
kernel=$temp/kernel
mkdir "$kernel"
label=portable tag=$TAG 
mapfile -t images < <(all_images)
if [[ -n $KERNEL_BTF ]]; then
	tools/install-deps.sh "$CACHE/libbpf-bookworm-backports" bpftool zstd lz4 xz=xz-utils
	echo "==> the types of $KERNEL_BTF"
	KERNEL_IMAGE=$KERNEL_BTF RAW=$kernel/btf tools/vmlinux.sh "$ARCH" "$kernel"
	digest=$(sha256sum "$kernel/btf" | cut -d' ' -f1)
	label=sha256:$digest tag=$TAG-btf-${digest:0:12} images=(oom-tracer)
else
	cp "vmlinux/$ARCH/vmlinux.h" "$kernel"
fi
for module in . go/descheduler; do
	[[ ! -e $module/go.mod ]] || (cd "$module" && "$GO" mod vendor -o "$temp/modules/$module/vendor")
done

# The time of the commit, for the same image whenever it is built.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}
export SOURCE_DATE_EPOCH
stamp=()
[[ $CONTAINER_TOOL == docker ]] || stamp=(--timestamp "$SOURCE_DATE_EPOCH")

for image in "${images[@]}"; do
	name=$PREFIX$image:$tag
	[[ $ARCH == "$("$GO" env GOHOSTARCH)" ]] || name+=-$ARCH
	labels=(--label "org.opencontainers.image.title=$image" --label "org.opencontainers.image.version=$VERSION"
		--label "org.opencontainers.image.revision=$REVISION")
	# Said of each, for buildah keeps the labels of an image that was built before in the layers that they share.
	if [[ $image == oom-tracer ]]; then labels+=(--label "oom-tracer.kernel.btf=$label"); else labels+=(--label oom-tracer.kernel.btf=none); fi
	echo "==> $name (with $CONTAINER_TOOL, after $SECONDS s)"
	engine_build -f Dockerfile.builder --target "$image" -t "$name" "${stamp[@]}" \
		--platform "linux/$ARCH" --build-arg "BUILDPLATFORM=linux/$("$GO" env GOHOSTARCH)" --build-arg "BASE=$BASE" \
		--build-arg "VERSION=$VERSION" --build-arg "REVISION=$REVISION" --build-arg "DATE=$DATE" \
		"${labels[@]}" \
		--build-context "goroot=$("$GO" env GOROOT)" --build-context "modules=$temp/modules" \
		--build-context "kernel=$kernel" .
done
