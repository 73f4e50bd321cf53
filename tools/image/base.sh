#!/usr/bin/env bash
# Makes the base image localhost/debian:bookworm where none can be pulled, with debootstrap, from the mirror
# of this machine's own apt sources. Needs root.
#
#   CACHE=DIRECTORY tools/image/base.sh
#
# The root file system is kept as CACHE/base-ARCH.tar; remove it for a newer one.
set -euo pipefail

cache=${CACHE:?}
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tools/image/engine.sh
. "$here/engine.sh"

"$here/../install-deps.sh" "$cache/libbpf-bookworm-backports" debootstrap

arch=$(dpkg --print-architecture)
tar=$cache/base-$arch.tar
mkdir -p "$cache"
exec 9>"$cache/.base.lock"
flock 9
if [[ ! -e $tar ]]; then
	((EUID == 0)) || {
		echo "$0: debootstrap needs root" >&2
		exit 1
	}
	uri=$("$here/../fetch-deb.sh" --mirror debian)
	temp=$(mktemp -d "$cache/base.XXXXXX")
	trap 'rm -rf "$temp"' EXIT
	echo "==> debootstrap bookworm, once, into $tar"
	if ! debootstrap --variant=minbase --keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
		--include=ca-certificates bookworm "$temp/root" "$uri" >"$temp/log" 2>&1; then
		tail -n 20 "$temp/log" >&2
		exit 1
	fi
	if security=$("$here/../fetch-deb.sh" --mirror debian-security 2>/dev/null); then
		echo "deb $security bookworm-security main" >>"$temp/root/etc/apt/sources.list"
	fi
	rm -rf "$temp/root"/var/cache/apt/archives/*.deb "$temp/root"/var/lib/apt/lists/*
	tar -C "$temp/root" --numeric-owner --one-file-system -cf "$temp/base.tar" .
	mv "$temp/base.tar" "$tar"
fi
id=$(sha256sum "$tar" | cut -d' ' -f1)
if [[ $(engine inspect --format "$(inspect_label base.sha256)" "$base_name" 2>/dev/null || true) == "$id" ]]; then
	echo "    $base_name is there"
	exit 0
fi
context=$(mktemp -d)
trap 'rm -rf "${temp:-}" "$context"' EXIT
ln "$tar" "$context/base.tar" 2>/dev/null || cp "$tar" "$context/base.tar"
printf 'FROM scratch\nADD base.tar /\nCMD ["bash"]\nLABEL base.sha256=%s\n' "$id" >"$context/Dockerfile"
echo "==> $base_name"
engine_build -t "$base_name" "$context" >"$context/log" 2>&1 || {
	tail -n 20 "$context/log" >&2
	exit 1
}
