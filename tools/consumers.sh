#!/usr/bin/env bash
# Installs the npm packages of deploy/examples/consumers into the user's cache directory, if they are not there yet, and prints the
# directory that holds node_modules.
set -euo pipefail

# shellcheck source=tools/cache.sh
. "$(dirname "$0")/cache.sh"
cd "$tools/../deploy/examples/consumers"

install() {
	mkdir "$1"
	cp package.json package-lock.json "$1"
	npm ci --prefix "$1" --ignore-scripts --no-audit --no-fund
}
once "consumers-$(sha256sum package-lock.json | cut -c1-12)" 'installing the npm packages of deploy/examples/consumers' install
