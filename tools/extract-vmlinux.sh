#!/usr/bin/env bash
# Unpacks the ELF kernel out of an x86 bzImage (vmlinuz).
#
#   tools/extract-vmlinux.sh VMLINUZ OUTPUT
#
# Where the payload lies is read from the setup header (Documentation/arch/x86/boot.rst:
# setup_sects, payload_offset, payload_length), not searched for.
set -euo pipefail

if (($# != 2)); then
	echo "usage: $0 VMLINUZ OUTPUT" >&2
	exit 2
fi
image=$1
out=$2

# le OFFSET BYTES prints a little-endian number of the image.
le() { od -An -v -j "$1" -N "$2" -t "u$2" --endian=little "$image" | tr -d ' \n'; }

if [[ $(od -An -c -j 514 -N 4 "$image" | tr -d ' \n') != HdrS ]]; then
	echo "$0: $image is not an x86 bzImage (no HdrS at byte 514)" >&2
	exit 1
fi
sectors=$(le 497 1)
((sectors == 0)) && sectors=4
start=$(((sectors + 1) * 512 + $(le 584 4)))
length=$(le 588 4)

payload() { tail -c +$((start + 1)) "$image" | head -c "$length"; }
magic=$(od -An -t x1 -j "$start" -N 4 "$image" | tr -d ' \n')
# The kernel's build appends the unpacked size to some formats (scripts/Makefile.lib, size_append):
# the tools unpack everything and then complain of those four bytes, so their status says nothing
# and the result is looked at instead.
case $magic in
28b52ffd) payload | zstd -dc >"$out" 2>/dev/null || true ;;
02214c18) payload | lz4 -dc >"$out" 2>/dev/null || true ;;
1f8b*) payload | gzip -dc >"$out" 2>/dev/null || true ;;
fd377a58) payload | xz -dc >"$out" 2>/dev/null || true ;;
*)
	echo "$0: $image: payload of an unknown format (magic $magic)" >&2
	exit 1
	;;
esac
if [[ $(od -An -c -N 4 "$out" | tr -d ' \n') != '177ELF' ]]; then
	echo "$0: $image: what was unpacked is not an ELF file (are zstd and lz4 installed?)" >&2
	rm -f "$out"
	exit 1
fi
