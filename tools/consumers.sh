#!/usr/bin/env bash
# Installs the npm packages of deploy/examples/consumers into the user's cache directory, if they are not there yet, and prints the
# directory that holds node_modules.
set -euo pipefail

cd "$(dirname "$0")/../deploy/examples/consumers"
cache=${XDG_CACHE_HOME:-$HOME/.cache}/oom-tracer
dir=$cache/consumers-$(sha256sum package-lock.json | cut -c1-12)

# A directory is moved into place whole: what is there is complete.
if [[ ! -d $dir ]]; then
	echo "==> installing the npm packages of deploy/examples/consumers" >&2
	mkdir -p "$cache"
	partial=$(mktemp -d "$cache/.consumers-XXXXXX")
	trap 'rm -rf "$partial"' EXIT
	cp package.json package-lock.json "$partial"
	npm ci --prefix "$partial" --ignore-scripts --no-audit --no-fund >&2
	chmod 755 "$partial"
	# Another may have installed them meanwhile.
	mv -T "$partial" "$dir" 2>/dev/null || [[ -d $dir ]]
fi
echo "$dir"
