#!/usr/bin/env bash
# Brings stock Debian kernels into the cache, and prints a line for each: its version and the directory where
# vmlinuz, config, packages (what they came in) and, for amd64, vmxnet3.ko (the driver of a network card) are.
#
#   tools/vm/kernels.sh
#
# From the environment:
#
#   KERNELS="6.12 7.2"   only these. The newest package of each suite is taken, so "7" and "7.2" both mean
#                        whatever sid has; "newest" does too.
#   FRESH=1              look for newer packages now (else once a week)
#   ARCH=arm64           those of another architecture, also one with 16 KiB pages ("7.2-16k", "newest-16k")
#   CACHE                where they are kept
set -euo pipefail

die() {
	echo "$0: $*" >&2
	exit 2
}

tools=$(cd "$(dirname "$0")/.." && pwd)
CACHE=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/oom-tracer}

# Which suite has which kernel, and where it is kept.
ARCH=${ARCH:-$(dpkg --print-architecture)}
stock="5.10 bullseye cloud-$ARCH bullseye
6.1 bookworm cloud-$ARCH bookworm
6.12 bookworm-backports cloud-$ARCH bookworm-backports
7 sid cloud-$ARCH sid"
case $ARCH in
amd64) kernels=$CACHE/kernels module=vmxnet3.ko ;;
arm64)
	kernels=$CACHE/kernels-arm64 module=
	stock+=$'\n7-16k sid arm64-16k sid-16k'
	;;
*) die "ARCH: must be amd64 or arm64, not $ARCH" ;;
esac

# whole DIRECTORY: it has all that a kernel needs.
whole() { [[ -e $1/vmlinuz && -e $1/config && (-z $module || -e $1/$module) ]]; }

# fetch SUITE FLAVOUR DIRECTORY brings the suite's newest kernel into the cache.
fetch() {
	local suite=$1 flavour=$2 dir=$3
	if whole "$dir" && [[ -z ${FRESH:-} && -z $(find "$dir/packages" -mtime +6) ]]; then
		return
	fi
	echo "==> fetching the kernel of $suite" >&2
	rm -rf "$dir.new"
	if ! DEB_ARCH=$ARCH "$tools/fetch-deb.sh" "$suite" "$dir.new" "linux-image-$flavour"; then
		rm -rf "$dir.new"
		whole "$dir" || die "no kernel of $suite"
		echo "    that failed: the one of $(date -r "$dir/packages" +%F) is used" >&2
		return
	fi
	mkdir -p "$dir"
	[[ -z $module ]] || find "$dir.new" -name "$module.xz" -exec busybox unxz {} \;
	find "$dir.new" \( -name 'vmlinuz-*' -o -name vmlinuz \) -type f -exec mv {} "$dir/vmlinuz" \;
	find "$dir.new" \( -path '*/boot/config-*' -o -path '*/modules/*/config' \) -type f -exec mv {} "$dir/config" \;
	[[ -z $module ]] || find "$dir.new" -name "$module" -exec mv {} "$dir" \;
	whole "$dir" || die "no vmlinuz, config${module:+ or $module} in the packages of $suite"
	touch "$dir.new/.packages"
	mv "$dir.new/.packages" "$dir/packages"
	rm -rf "$dir.new"
}

# picked VERSION: KERNELS wants the stock kernel VERSION.
picked() {
	local pick page version=${1%-16k}
	for pick in ${KERNELS:-$1}; do
		page=${pick#"${pick%-16k}"} pick=${pick%-16k}
		[[ $1 == "$version$page" ]] || continue
		[[ $pick == newest || ($pick =~ ^[0-9]+ && ${BASH_REMATCH[0]} -ge 7) ]] && pick=7
		[[ $pick. == "$version".* || $version. == "$pick".* ]] && return
	done
	return 1
}

for pick in ${KERNELS:-}; do
	known=
	while read -r key _; do
		if KERNELS=$pick picked "$key"; then known=1; fi
	done <<<"$stock"
	[[ -n $known ]] || die "KERNELS: $pick is none of" "${stock//$'\n'/, }"
done
mkdir -p "$kernels"
exec 9>"$kernels/.lock"
flock 9
while read -r key suite flavour directory; do
	picked "$key" || continue
	fetch "$suite" "$flavour" "$kernels/$directory" </dev/null
	echo "$key $kernels/$directory"
done <<<"$stock"
