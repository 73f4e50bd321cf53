#!/usr/bin/env bash
# Builds the alertmanager of tools/alertmanager/go.mod, if it is not there yet, and prints its path. The module lacks the built web
# pages, which the program embeds: an empty one stands in for them.
#
#   tools/alertmanager/build.sh
#
# The program lies in the user's cache directory under its version, so that another version is another file.
set -euo pipefail

cd "$(dirname "$0")"
go=${GO:-$(command -v go || echo /usr/local/go/bin/go)} # as the Makefile has it
module=github.com/prometheus/alertmanager
version=$("$go" list -m -f '{{.Version}}' $module)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/oom-tracer
binary=$cache/alertmanager-$version

if [[ ! -x $binary ]]; then
	echo "==> building alertmanager $version from its Go module, once" >&2
	mkdir -p "$cache"
	temp=$(mktemp -d "$cache/.alertmanager-XXXXXX")
	trap 'rm -rf "$temp"' EXIT
	source=$("$go" mod download -json $module@"$version" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
	cp -r --no-preserve=mode "$source" "$temp/source"
	mkdir "$temp/source/ui/app/dist"
	touch "$temp/source/ui/app/dist/index.html"
	cp go.mod go.sum "$temp"
	"$go" mod edit -replace "$module=$temp/source" "$temp/go.mod"
	CGO_ENABLED=0 "$go" build -modfile "$temp/go.mod" -trimpath -ldflags '-s -w' -o "$temp/alertmanager" $module/cmd/alertmanager >&2
	mv "$temp/alertmanager" "$binary" # whole: another may have built it meanwhile
fi
echo "$binary"
