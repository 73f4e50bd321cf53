#!/usr/bin/env bash
# Builds the helm and the promtool of tools/deploy/go.mod, copies the prometheus-operator's CRDs of PodMonitor and
# PrometheusRule beside them, if they are not there yet, and prints the directory that holds them.
#
#   tools/deploy/build.sh
#
# They lie in the user's cache directory under their versions, so that another version is another directory.
set -euo pipefail

cd "$(dirname "$0")"
go=${GO:-$(command -v go || echo /usr/local/go/bin/go)} # as the Makefile has it
version() { "$go" list -m -f '{{.Version}}' "$1"; }
operator=github.com/prometheus-operator/prometheus-operator
helm=$(version helm.sh/helm/v3)
promtool=$(version github.com/prometheus/prometheus)
crds=$(version $operator)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/oom-tracer
dir=$cache/deploy-$helm-$promtool-$crds

# A directory is moved into place whole: what is there is complete.
if [[ ! -d $dir ]]; then
	echo "==> building helm $helm and promtool $promtool, once: some minutes" >&2
	mkdir -p "$cache"
	partial=$(mktemp -d "$cache/.deploy-XXXXXX")
	trap 'rm -rf "$partial"' EXIT
	CGO_ENABLED=0 "$go" build -trimpath -o "$partial/" \
		-ldflags "-s -w -X helm.sh/helm/v3/internal/version.version=$helm" helm.sh/helm/v3/cmd/helm >&2
	# Without the clouds' service discovery, which promtool can only check the settings of.
	CGO_ENABLED=0 "$go" build -trimpath -tags remove_all_sd -o "$partial/" -ldflags '-s -w' \
		github.com/prometheus/prometheus/cmd/promtool >&2
	source=$("$go" mod download -json "$operator@$crds" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
	mkdir "$partial/crds"
	for kind in podmonitors prometheusrules; do
		cp "$source/example/prometheus-operator-crd/monitoring.coreos.com_$kind.yaml" "$partial/crds/$kind.yaml"
	done
	chmod -R u+w,go+rX "$partial"
	# Another may have built it meanwhile.
	mv -T "$partial" "$dir" 2>/dev/null || [[ -d $dir ]]
fi
echo "$dir"
