#!/usr/bin/env bash
# Builds the CoreDNS of tools/node/go.mod, if it is not there yet, and prints its path. 3 minutes the first time.
set -euo pipefail

cd "$(dirname "$0")"
go=${GO:-$(command -v go || echo /usr/local/go/bin/go)} # as the Makefile has it
module=github.com/coredns/coredns
version=$("$go" list -m -f '{{.Version}}' "$module")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/oom-tracer
binary=$cache/coredns-$version
if [[ ! -x $binary ]]; then
	echo "==> building CoreDNS $version, once: some minutes" >&2
	mkdir -p "$cache"
	partial=$(mktemp "$cache/.coredns-XXXXXX")
	trap 'rm -f "$partial"' EXIT
	CGO_ENABLED=0 "$go" build -v -trimpath -ldflags '-s -w' -o "$partial" "$module" 2>&1 | ../progress.sh >&2
	chmod 755 "$partial"
	mv "$partial" "$binary"
fi
echo "$binary"
