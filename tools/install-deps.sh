#!/usr/bin/env bash
# Installs what a build needs and this machine lacks, and says so.
#
#   tools/install-deps.sh LIBBPF_DIR [PROGRAM[=PACKAGE]...]
#   ARCH=arm64 tools/install-deps.sh …       also a compiler for it, and its libraries in LIBBPF_DIR
#
# Debian packages are installed with apt-get (needs root). libbpf, newer than Debian 12's, and the
# kernel headers that go with it are only unpacked into LIBBPF_DIR. PROGRAMs are further commands
# wanted, such as shellcheck, or files; PACKAGE brings it if it is called otherwise.
set -euo pipefail

libbpf=$1
shift
cd "$(dirname "$0")/.."

# Each line: a file or command that is wanted, and the package that brings it.
wanted="gcc gcc
clang clang
llvm-strip llvm
ar binutils
/usr/include/stdio.h libc6-dev
/usr/include/libelf.h libelf-dev
/usr/include/zlib.h zlib1g-dev
/usr/share/keyrings/debian-archive-keyring.gpg debian-archive-keyring
/etc/ssl/certs/ca-certificates.crt ca-certificates"
arch=${ARCH:-$(dpkg --print-architecture)}
if [[ $arch != "$(dpkg --print-architecture)" ]]; then
	case $arch in
	arm64) gnu=aarch64 package=aarch64 ;;
	amd64) gnu=x86_64 package=x86-64 ;;
	*)
		echo "$0: ARCH: must be amd64 or arm64, not $arch" >&2
		exit 1
		;;
	esac
	wanted+=$'\n'"$gnu-linux-gnu-gcc gcc-$package-linux-gnu
/usr/$gnu-linux-gnu/include/stdio.h libc6-dev-$arch-cross"
	libraries=(libelf-dev zlib1g-dev)
fi
for program in "$@"; do
	wanted+=$'\n'"${program%=*} ${program#*=}"
done

missing=()
while read -r what package; do
	if [[ $what == /* ]]; then
		[[ -e $what ]] || missing+=("$package")
	else
		command -v "$what" >/dev/null || missing+=("$package")
	fi
done <<<"$wanted"

if ((${#missing[@]})); then
	echo "==> installing Debian packages: ${missing[*]}"
	if ! command -v apt-get >/dev/null; then
		echo "$0: this is not a Debian system; install what brings these: ${missing[*]}" >&2
		exit 1
	fi
	if ((EUID != 0)); then
		echo "$0: needs root, or run: sudo apt-get install --no-install-recommends ${missing[*]}" >&2
		exit 1
	fi
	export DEBIAN_FRONTEND=noninteractive
	apt-get -qq update
	apt-get -qq install --no-install-recommends "${missing[@]}" >/dev/null </dev/null
fi

if [[ ! -e $libbpf/.packages ]]; then
	echo "==> unpacking libbpf-dev and linux-libc-dev of bookworm-backports${libraries:+, and ${libraries[*]} of bookworm,} for $arch into $libbpf"
	if [[ -n ${libraries:-} ]]; then
		DEB_ARCH=$arch tools/fetch-deb.sh bookworm "$libbpf" "${libraries[@]}"
		rm "$libbpf/.packages"
	fi
	DEB_ARCH=$arch tools/fetch-deb.sh bookworm-backports "$libbpf" libbpf-dev linux-libc-dev
	sed 's/^/    /' "$libbpf/.packages"
fi
