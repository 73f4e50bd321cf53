#!/usr/bin/env bash
# Builds the program that a Go module is, in the version of a build list, if it is not there yet, and prints its path.
#
#   tools/build-module.sh DIRECTORY MODULE [PACKAGE]       tools/build-module.sh . github.com/nats-io/nats-server/v2
#
# PACKAGE is below the module, where the program is not the module itself.
# DIRECTORY, from the root of the repository, has the go.mod. The program lies in the user's cache directory under its
# version, so that another version is another file. nats-server takes a minute the first time, CoreDNS four.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../$1"
go=${GO:-$(command -v go || echo /usr/local/go/bin/go)} # as the Makefile has it
module=$2 package=$2${3:+/$3}
name=$(basename "${module%/v[0-9]}")
version=$("$go" list -m -f '{{.Version}}' "$module")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/oom-tracer
binary=$cache/$name-$version

if [[ ! -x $binary ]]; then
	echo "==> building $name $version from its Go module, once" >&2
	mkdir -p "$cache"
	# Two test processes may build at once: each moves a whole file into place.
	partial=$(mktemp "$cache/.$name-XXXXXX")
	trap 'rm -f "$partial"' EXIT
	CGO_ENABLED=0 "$go" build -v -trimpath -ldflags '-s -w' -o "$partial" "$package" 2>&1 | "$here/progress.sh" >&2
	chmod 755 "$partial"
	mv "$partial" "$binary"
fi
echo "$binary"
