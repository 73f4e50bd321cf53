#!/usr/bin/env bash
# Makes vmlinux.h, the types of a kernel, and says what it was made from.
#
#   tools/vmlinux.sh ARCH DIRECTORY              from the running kernel
#   BTF=FILE …                                   from raw BTF, such as another machine's
#                                                /sys/kernel/btf/vmlinux, or an ELF file with .BTF
#   KERNEL_IMAGE=FILE …                          from a kernel package (.deb), vmlinux, or vmlinuz
#   SUITE=bookworm-backports …                   from the newest cloud kernel of that Debian suite for ARCH
#   VERIFY=1 …                                   from what DIRECTORY/SOURCE says, and writes nothing: DIRECTORY
#                                                must have the very same
#   VERIFY=1 STALE_OK=1 …                        where those have gone on, the digest in SOURCE is enough
#   RAW=FILE …                                   leaves the kernel's raw BTF there too
#
# ARCH is amd64 or arm64. DIRECTORY gets vmlinux.h and SOURCE.
set -euo pipefail

arch=$1
dir=$2
tools=$(cd "$(dirname "$0")" && pwd)
die() {
	echo "$0: $*" >&2
	exit 1
}
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT

# at FILE OFFSET BYTES prints bytes as hexadecimal, le as a little-endian number.
at() { od -An -v -t x1 -j "$2" -N "$3" "$1" 2>/dev/null | tr -d ' \n'; }
le() { od -An -v -t "u$3" -j "$2" -N "$3" --endian=little "$1" | tr -d ' \n'; }

# part FILE OFFSET BYTES copies them. (That head goes away first is no failure.)
part() { { tail -c +$(($2 + 1)) "$1" 2>/dev/null || true; } | head -c "$3"; }

# raw_in FILE OUTPUT finds the BTF in a kernel that is no ELF file any more: the largest one whose header
# (struct btf_header, include/uapi/linux/btf.h) is sound.
raw_in() {
	local offset size best=0 where=
	while IFS=: read -r offset _; do
		# hdr_len 24, then type_off 0, type_len, str_off == type_len, str_len.
		[[ $(le "$1" $((offset + 8)) 4) == 0 && $(le "$1" $((offset + 12)) 4) == $(le "$1" $((offset + 16)) 4) ]] || continue
		size=$((24 + $(le "$1" $((offset + 16)) 4) + $(le "$1" $((offset + 20)) 4)))
		if ((size > best && offset + size <= $(stat -c %s "$1"))); then best=$size where=$offset; fi
	done < <(LC_ALL=C grep -obUaP '\x9f\xeb\x01\x00\x18' "$1")
	[[ -n $where ]] || return 1
	part "$1" "$where" "$best" >"$2"
}

# unpack FILE OUTPUT FORMAT. Behind the payload may stand what is not of it, of which the tools complain.
unpack() {
	"$3" -dc <"$1" >"$2" 2>/dev/null || true
	[[ -s $2 ]] || die "$1: not a whole $3 file"
}

# btf_of FILE OUTPUT writes a kernel's raw BTF, whatever the kernel is wrapped in.
btf_of() {
	local file=$1 out=$2 inner=$temp/inner.$RANDOM images sectors
	[[ -r $file ]] || die "cannot read $file"
	case $(at "$file" 0 4) in
	9feb*) cp "$file" "$out" ;;
	7f454c46)
		if ! llvm-objcopy --dump-section .BTF="$out" "$file" /dev/null 2>/dev/null || [[ ! -s $out ]]; then
			die "$file has no .BTF: its kernel was built without CONFIG_DEBUG_INFO_BTF, or it was stripped"
		fi
		;;
	213c6172) # !<arch>: a package
		dpkg-deb -x "$file" "$inner.d"
		mapfile -t images < <(find "$inner.d" -type f \( -name 'vmlinuz*' -o -name 'vmlinux*' \) -size +1000k)
		((${#images[@]})) || die "$file has no vmlinuz and no vmlinux"
		btf_of "${images[0]}" "$out"
		;;
	1f8b*) unpack "$file" "$inner" gzip && btf_of "$inner" "$out" ;;
	fd377a58) unpack "$file" "$inner" xz && btf_of "$inner" "$out" ;;
	28b52ffd) unpack "$file" "$inner" zstd && btf_of "$inner" "$out" ;;
	02214c18 | 04224d18) unpack "$file" "$inner" lz4 && btf_of "$inner" "$out" ;;
	*)
		if [[ $(at "$file" 514 4) == 48647253 ]]; then # HdrS: x86's bzImage
			# The payload is where the setup header says (Documentation/arch/x86/boot.rst: setup_sects, payload_offset, payload_length).
			sectors=$(le "$file" 497 1)
			part "$file" $(((${sectors/#0/4} + 1) * 512 + $(le "$file" 584 4))) "$(le "$file" 588 4)" >"$inner"
			btf_of "$inner" "$out"
		elif [[ $(at "$file" 4 4) == 7a696d67 ]]; then # zimg: struct linux_efi_zboot_header
			part "$file" "$(le "$file" 8 4)" "$(le "$file" 12 4)" >"$inner"
			btf_of "$inner" "$out"
		elif [[ $(at "$file" 56 4) == 41524d64 ]]; then # ARMd: arm64's Image
			raw_in "$file" "$out" || die "$file holds no BTF"
		else
			die "$file is no kernel package, vmlinux, vmlinuz or BTF that is known"
		fi
		;;
	esac
}

# from_suite SUITE says what it took in source.
from_suite() {
	local images
	DEB_ARCH=$arch "$tools/fetch-deb.sh" "$1" "$temp/kernel" "linux-image-cloud-$arch" || die "no kernel of $1 for $arch"
	mapfile -t images < <(find "$temp/kernel" -type f -name 'vmlinuz*')
	((${#images[@]} == 1)) || die "the packages of $1 have ${#images[@]} kernels"
	btf_of "${images[0]}" "$temp/btf"
	source="$1: $(paste -sd, "$temp/kernel/.packages")"
}

# Headers differ with the bpftool that wrote them.
said=$(bpftool version)
said=${said%%$'\n'*}
sum() { sha256sum <"$1" | cut -d' ' -f1; }
field() { sed -n "s/^$1: //p" "$dir/SOURCE"; }

if [[ -n ${VERIFY:-} ]]; then
	want=$(field source)
	[[ $want == *:* ]] || die "$dir/SOURCE names no Debian suite: the kernel that made it is not available ($want)"
	from_suite "${want%%:*}"
	stale=
	[[ $source == "$want" ]] || stale="$dir was made from $want; ${want%%:*} now has ${source#*: }"
	[[ $said == "$(field bpftool)" ]] || stale+="${stale:+; }it was made by $(field bpftool), and this is $said"
	if [[ -n $stale && -n ${STALE_OK:-} ]]; then
		[[ $(field header) == "sha256 $(sum "$dir/vmlinux.h")" ]] || die "$dir/vmlinux.h is not what $dir/SOURCE says"
		echo "$dir: NOT generated again, only compared with its digest: $stale"
		exit
	fi
	[[ -z $stale ]] || die "$stale: make vmlinux SUITE=${want%%:*} ARCH=$arch"
elif [[ -n ${SUITE:-} ]]; then
	from_suite "$SUITE"
elif [[ -n ${KERNEL_IMAGE:-} || -n ${BTF:-} ]]; then
	btf_of "${KERNEL_IMAGE:-$BTF}" "$temp/btf"
	source=$(basename "${KERNEL_IMAGE:-$BTF}")
else
	[[ $arch == "$(dpkg --print-architecture)" ]] || die "the running kernel is not of $arch: set BTF, KERNEL_IMAGE or SUITE"
	btf_of /sys/kernel/btf/vmlinux "$temp/btf"
	source="the running kernel, $(uname -r)"
fi

bpftool btf dump file "$temp/btf" format c >"$temp/vmlinux.h"
cat >"$temp/SOURCE" <<END
source: $source
btf: sha256 $(sum "$temp/btf")
bpftool: $said
header: sha256 $(sum "$temp/vmlinux.h")
END
if [[ -n ${VERIFY:-} ]]; then
	for file in SOURCE vmlinux.h; do
		cmp "$temp/$file" "$dir/$file"
	done
	echo "$dir: as its source makes it ($source)"
	exit
fi
mkdir -p "$dir"
cp "$temp/vmlinux.h" "$temp/SOURCE" "$dir"
if [[ -n ${RAW:-} ]]; then cp "$temp/btf" "$RAW"; fi
sed 's/^/    /' "$dir/SOURCE"
