#!/usr/bin/env bash
# Builds the helm and the promtool of tools/deploy/go.mod, copies the prometheus-operator's CRDs of PodMonitor and
# PrometheusRule beside them, if they are not there yet, and prints the directory that holds them.
set -euo pipefail

cd "$(dirname "$0")"
# shellcheck source=tools/cache.sh
. ../cache.sh
operator=github.com/prometheus-operator/prometheus-operator
helm=$(version helm.sh/helm/v3)
promtool=$(version github.com/prometheus/prometheus)
crds=$(version $operator)

build() {
	local source kind
	mkdir -p "$1/crds"
	CGO_ENABLED=0 "$go" build -trimpath -o "$1/" -ldflags "-s -w -X helm.sh/helm/v3/internal/version.version=$helm" helm.sh/helm/v3/cmd/helm
	# Without the clouds' service discovery, which promtool can only check the settings of.
	CGO_ENABLED=0 "$go" build -trimpath -tags remove_all_sd -o "$1/" -ldflags '-s -w' github.com/prometheus/prometheus/cmd/promtool
	source=$(source_of $operator)
	for kind in podmonitors prometheusrules; do
		cp "$source/example/prometheus-operator-crd/monitoring.coreos.com_$kind.yaml" "$1/crds/$kind.yaml"
	done
}
once "deploy-$helm-$promtool-$crds" "building helm $helm and promtool $promtool, some minutes" build
