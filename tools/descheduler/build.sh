#!/usr/bin/env bash
# Builds the unmodified descheduler of the version that go/descheduler/go.mod names, if it is not there yet, and
# prints its path. Tests hold what we say of it against it.
#
#   tools/descheduler/build.sh
#
# It is built where its own go.mod stands, with just the versions that it was released with. It lies in the user's
# cache directory under its version, so that another version is another file. The build takes 2 to 4 minutes the
# first time.
set -euo pipefail

cd "$(dirname "$0")/../../go/descheduler"
go=${GO:-$(command -v go || echo /usr/local/go/bin/go)} # as the Makefile has it
module=sigs.k8s.io/descheduler
version=$("$go" list -m -f '{{.Version}}' "$module")
cache=${XDG_CACHE_HOME:-$HOME/.cache}/oom-tracer
binary=$cache/descheduler-$version

if [[ ! -x $binary ]]; then
	echo "==> building the descheduler $version, once: about 2 minutes" >&2
	mkdir -p "$cache"
	"$go" mod download "$module"
	# Two test processes may build at once: each moves a whole file into place.
	partial=$(mktemp "$cache/.descheduler-XXXXXX")
	trap 'rm -f "$partial"' EXIT
	(
		cd "$("$go" list -m -f '{{.Dir}}' "$module")"
		CGO_ENABLED=0 "$go" build -trimpath -ldflags '-s -w' -o "$partial" ./cmd/descheduler >&2
	)
	chmod 755 "$partial"
	mv "$partial" "$binary"
fi
echo "$binary"
