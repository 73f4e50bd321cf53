#!/usr/bin/env bash
# Builds the alertmanager of tools/alertmanager/go.mod, if it is not there yet, and prints its path. The module lacks the built web
# pages, which the program embeds: an empty one stands in for them.
set -euo pipefail

cd "$(dirname "$0")"
# shellcheck source=tools/cache.sh
. ../cache.sh
module=github.com/prometheus/alertmanager
version=$(version $module)

build() {
	local source=$partial/source
	cp -r --no-preserve=mode "$(source_of $module)" "$source"
	mkdir "$source/ui/app/dist"
	touch "$source/ui/app/dist/index.html"
	cp go.mod go.sum "$partial"
	"$go" mod edit -replace "$module=$source" "$partial/go.mod"
	CGO_ENABLED=0 "$go" build -modfile "$partial/go.mod" -trimpath -ldflags '-s -w' -o "$1" $module/cmd/alertmanager
}
once "alertmanager-$version" "building alertmanager $version from its Go module" build
