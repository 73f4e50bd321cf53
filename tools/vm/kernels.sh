#!/usr/bin/env bash
# Brings stock Debian kernels into the cache, and prints a line for each: its version and the directory where
# vmlinuz, config, vmxnet3.ko (the driver of a network card) and packages (what they came in) are.
#
#   tools/vm/kernels.sh
#
# From the environment:
#
#   KERNELS="6.12 7.2"   only these. The newest package of each suite is taken, so "7" and "7.2" both mean
#                        whatever sid has; "newest" does too.
#   FRESH=1              look for newer packages now (else once a week)
#   CACHE                where they are kept
set -euo pipefail

die() {
	echo "$0: $*" >&2
	exit 2
}

tools=$(cd "$(dirname "$0")/.." && pwd)
CACHE=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/oom-tracer}

# Which suite has which kernel.
stock="5.10 bullseye
6.1 bookworm
6.12 bookworm-backports
7 sid"

# fetch SUITE brings the suite's newest kernel into the cache.
fetch() {
	local suite=$1 dir=$CACHE/kernels/$1
	if [[ -e $dir/vmlinuz && -e $dir/vmxnet3.ko && -z ${FRESH:-} && -z $(find "$dir/packages" -mtime +6) ]]; then
		return
	fi
	echo "==> fetching the kernel of $suite" >&2
	rm -rf "$dir.new"
	if ! "$tools/fetch-deb.sh" "$suite" "$dir.new" linux-image-cloud-amd64; then
		rm -rf "$dir.new"
		[[ -e $dir/vmlinuz && -e $dir/vmxnet3.ko ]] || die "no kernel of $suite"
		echo "    that failed: the one of $(date -r "$dir/packages" +%F) is used" >&2
		return
	fi
	mkdir -p "$dir"
	find "$dir.new" -name 'vmxnet3.ko.xz' -exec busybox unxz {} \;
	find "$dir.new" \( -name 'vmlinuz-*' -o -name vmlinuz \) -type f -exec mv {} "$dir/vmlinuz" \;
	find "$dir.new" \( -path '*/boot/config-*' -o -path '*/modules/*/config' \) -type f -exec mv {} "$dir/config" \;
	find "$dir.new" -name vmxnet3.ko -exec mv {} "$dir" \;
	[[ -e $dir/vmlinuz && -e $dir/config && -e $dir/vmxnet3.ko ]] || die "no vmlinuz, config or vmxnet3.ko in the packages of $suite"
	touch "$dir.new/.packages"
	mv "$dir.new/.packages" "$dir/packages"
	rm -rf "$dir.new"
}

# picked VERSION: KERNELS wants the stock kernel VERSION.
picked() {
	local pick
	for pick in ${KERNELS:-$1}; do
		[[ $pick == newest || ($pick =~ ^[0-9]+ && ${BASH_REMATCH[0]} -ge 7) ]] && pick=7
		[[ $pick. == "$1".* || $1. == "$pick".* ]] && return
	done
	return 1
}

for pick in ${KERNELS:-}; do
	known=
	while read -r key suite; do
		if KERNELS=$pick picked "$key"; then known=1; fi
	done <<<"$stock"
	[[ -n $known ]] || die "KERNELS: $pick is none of" "${stock//$'\n'/, }"
done
mkdir -p "$CACHE/kernels"
exec 9>"$CACHE/kernels/.lock"
flock 9
while read -r key suite; do
	picked "$key" || continue
	fetch "$suite" </dev/null
	echo "$key $CACHE/kernels/$suite"
done <<<"$stock"
