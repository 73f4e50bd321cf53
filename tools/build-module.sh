#!/usr/bin/env bash
# Builds the program that a Go module is, in the version of a build list, if it is not there yet, and prints its path.
#
#   tools/build-module.sh DIRECTORY MODULE [PACKAGE]       tools/build-module.sh . github.com/nats-io/nats-server/v2
#   RELEASED=1 …        with the versions of its own go.mod
#
# PACKAGE is below the module, where the program is not the module itself. DIRECTORY, from the root of the repository, has
# the go.mod. nats-server takes a minute the first time, CoreDNS four.
set -euo pipefail

# shellcheck source=tools/cache.sh
. "$(dirname "$0")/cache.sh"
cd "$tools/../$1"
module=$2 package=$2${3:+/$3}
name=$(basename "${module%/v[0-9]}")
version=$(version "$module")

build() {
	if [[ -n ${RELEASED:-} ]]; then cd "$(source_of "$module")"; fi
	CGO_ENABLED=0 "$go" build -v -trimpath -ldflags '-s -w' -o "$1" "$package" 2>&1 | "$tools/progress.sh"
}
once "$name-$version" "building $name $version from its Go module" build
