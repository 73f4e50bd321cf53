#!/usr/bin/env bash
# Makes vmlinux.h from the kernel package of bookworm-backports and records what made it.
#
#   tools/vmlinux.sh DIRECTORY
set -euo pipefail

dir=$1
tools=$(cd "$(dirname "$0")" && pwd)
for program in bpftool zstd lz4; do
	command -v "$program" >/dev/null || {
		echo "$0: needs $program: apt-get install $program" >&2
		exit 1
	}
done
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT

"$tools/fetch-deb.sh" bookworm-backports "$temp" linux-image-cloud-amd64
"$tools/extract-vmlinux.sh" "$temp"/boot/vmlinuz-* "$temp/vmlinux"
bpftool btf dump file "$temp/vmlinux" format c >"$temp/vmlinux.h"
mkdir -p "$dir"
mv "$temp/vmlinux.h" "$dir/vmlinux.h"
{
	echo "suite: bookworm-backports"
	echo "package: $(cat "$temp/.packages")"
	echo "bpftool: $(bpftool version | head -n 1)"
	echo "sha256: $(sha256sum <"$dir/vmlinux.h" | cut -d' ' -f1)"
} >"$dir/SOURCE"
cat "$dir/SOURCE"
