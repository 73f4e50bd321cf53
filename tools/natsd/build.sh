#!/usr/bin/env bash
# Builds the nats-server of the project's own build list, if it is not there yet, and prints its path.
# Tests run it as a process of its own, which the embedded server cannot be: one that can be killed.
#
#   tools/natsd/build.sh
#
# It lies in the user's cache directory under its version, so that another version is another file. The
# build takes about a minute the first time.
set -euo pipefail

cd "$(dirname "$0")/../.."
go=${GO:-$(command -v go || echo /usr/local/go/bin/go)} # as the Makefile has it
module=github.com/nats-io/nats-server/v2
version=$("$go" list -m -f '{{.Version}}' "$module")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/oom-tracer
binary=$cache/nats-server-$version

if [[ ! -x $binary ]]; then
	mkdir -p "$cache"
	# Two test processes may build at once: each moves a whole file into place.
	partial=$(mktemp "$cache/.nats-server-XXXXXX")
	trap 'rm -f "$partial"' EXIT
	CGO_ENABLED=0 "$go" build -trimpath -o "$partial" "$module" >&2
	chmod 755 "$partial"
	mv "$partial" "$binary"
fi
echo "$binary"
