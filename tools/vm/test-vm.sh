#!/usr/bin/env bash
# Boots kernels in QEMU and runs the tests of the build tag `vm` in each, as root and alone.
#
#   tools/vm/test-vm.sh TEST_BINARY PROGRAM...        (make test-vm builds them)
#
# TEST_BINARY and the PROGRAMs, all static, are put into an initramfs beside busybox and init.sh. A
# kernel is booted up to five times:
#
#   v2       with the memory controller in cgroup v2
#   confined the same: the tracer with less than root has (capabilities, seccomp, perf_event_paranoid)
#   faults   the same with vm-faults.test, if that is one of the PROGRAMs, for TEST_BINARY: tests that put
#            wrong fields into the BPF program
#   v1       with cgroup v1, where the kernel has it
#   numa     with cgroup v2 and two NUMA nodes
#
# From the environment:
#
#   KERNELS="6.12 7.2"   only these of the stock Debian kernels. The newest package of each suite is taken,
#                        so "7" and "7.2" both mean whatever sid has; "newest" does too.
#   ARCH=arm64           kernels of another architecture (the programs too); 7.2-16k has pages of 16 KiB
#   KERNEL=FILE          a kernel (bzImage, or arm64's Image) of one's own instead
#   BOOTS="v2 v1"        only these boots
#   RUN=REGEXP           only these tests (with BOOTS: a boot in which none of them runs fails)
#   FRESH=1              look for newer packages now (else once a week)
#   JOBS=2 TIMEOUT=720 (arm64: 1440) SMP=1 MEMORY=512 ACCEL=tcg,thread=multi      machines at once; seconds per boot;
#                        CPUs and MiB of a machine; what runs it
#   LOG_BUF=4M           size of the kernel's log
#   CACHE, OUT           where packages are kept; where results go (build/vm)
#
# A failed test, a row that says FAIL and a boot in which no test ran are failures. So are a panic, a
# hang (no end within TIMEOUT) and a missing end marker; but these may be the emulator's, so such a boot
# is tried once more, and what either try said is shown. QEMU's own status says nothing of it: a panic
# ends it with 0.
#
# OUT/table.md is written with what was booted and the results; OUT/KERNEL/BOOT/ has what was said.
set -euo pipefail

if (($# < 1)); then
	echo "usage: $0 TEST_BINARY PROGRAM..." >&2
	exit 2
fi

die() {
	echo "$0: $*" >&2
	exit 2
}

test_binary=$1
shift
programs=() faults=
for program in "$@"; do
	if [[ ${program##*/} == vm-faults.test ]]; then
		faults=$program
	else
		programs+=("$program")
	fi
done
here=$(cd "$(dirname "$0")" && pwd)
tools=$(dirname "$here")
CACHE=${CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/oom-tracer}
OUT=${OUT:-$tools/../build/vm}
ARCH=${ARCH:-$(dpkg --print-architecture)}
JOBS=${JOBS:-2}
SMP=${SMP:-1}
MEMORY=${MEMORY:-512}
LOG_BUF=${LOG_BUF:-4M}
ACCEL=${ACCEL:-tcg,thread=multi}
# What QEMU is to be, and the machine's second serial port, which is not cut in two by the kernel's messages.
case $ARCH in
amd64)
	# -cx16 and no_timer_check keep clear of two faults of the emulator (a double fault on 6.12, a panic
	# of the IO-APIC on 5.10).
	emulator=(qemu-system-x86_64 -cpu 'max,-cx16')
	ports=(console=ttyS0 oom.port=ttyS1 no_timer_check)
	numa=ACPI_NUMA
	TIMEOUT=${TIMEOUT:-720}
	;;
arm64)
	emulator=(qemu-system-aarch64 -M 'virt,gic-version=3' -cpu neoverse-n1)
	ports=(console=ttyAMA0 oom.port=ttyS0)
	numa=NUMA
	TIMEOUT=${TIMEOUT:-1440}
	;;
*) die "ARCH: must be amd64 or arm64, not $ARCH" ;;
esac
BOOTS=${BOOTS:-v2 confined ${faults:+faults} v1 numa}
for boot in $BOOTS; do
	[[ $boot == @(v2|confined|faults|v1|numa) ]] || die "BOOTS: $boot is none of v2, confined, faults, v1, numa"
	[[ $boot != faults || -n $faults ]] || die 'BOOTS: there is no vm-faults.test for faults'
done

# --- what to boot

# release VMLINUZ prints the release that a bzImage says it is (Documentation/arch/x86/boot.rst,
# kernel_version), or linux_banner in arm64's Image (Documentation/arch/arm64/booting.rst).
release() {
	local at text
	if [[ $(od -An -c -j 56 -N 4 "$1" 2>/dev/null | tr -d ' \n') == ARMd ]]; then
		LC_ALL=C grep -aoE 'Linux version [0-9][^ ]+ ' "$1" | sed -n '1s/Linux version \(.*\) /\1/p'
		return
	fi
	[[ $(od -An -c -j 514 -N 4 "$1" 2>/dev/null | tr -d ' \n') == HdrS ]] || return 0
	at=$(od -An -v -j 526 -N 2 -t u2 --endian=little "$1" | tr -d ' \n')
	text=$(dd if="$1" bs=1 skip=$((at + 512)) count=200 status=none | tr '\0' ' ')
	echo "${text%% *}"
}

# Of each kernel: a name for its files, the image, its configuration if known, and what it is.
names=()
declare -A image config what version
if [[ -n ${KERNEL:-} ]]; then
	[[ -r $KERNEL ]] || die "cannot read $KERNEL"
	names=(own)
	image[own]=$KERNEL
	config[own]=
	version[own]=$(release "$KERNEL")
	[[ -n ${version[own]} ]] || die "$KERNEL is not a bzImage (an x86 vmlinuz), nor an uncompressed Image of arm64"
	what[own]=$KERNEL
else
	kernels=$(CACHE=$CACHE ARCH=$ARCH "$here/kernels.sh")
	while read -r _ dir; do
		said=$(release "$dir/vmlinuz")
		[[ $said =~ ^[0-9]+\.[0-9]+ ]] || die "$dir/vmlinuz does not say what it is"
		name=${BASH_REMATCH[0]}
		[[ $said != *-16k ]] || name+=-16k
		names+=("$name")
		image[$name]=$dir/vmlinuz
		config[$name]=$dir/config
		version[$name]=$said
		what[$name]="${dir##*/}: $(grep -vE '^linux-(base|modules)-' "$dir/packages" | paste -sd' ')"
	done <<<"$kernels"
fi

# has KERNEL BOOT prints yes, no or, of a kernel whose configuration is not known, maybe.
has() {
	local file=${config[$1]} wanted
	case $2 in
	v2 | confined | faults) wanted='MEMCG' ;;
	numa) wanted=$numa ;;
	v1) wanted='MEMCG_V1' ;;
	esac
	if [[ -z $file ]]; then
		echo maybe
	elif grep -q "^CONFIG_$wanted=y" "$file"; then
		echo yes
	# The option came with 6.11 (commit e93d4166b40a); before that v1 was a part of MEMCG.
	elif [[ $2 == v1 ]] && ! grep -q MEMCG_V1 "$file" && grep -q '^CONFIG_MEMCG=y' "$file"; then
		echo yes
	else
		echo no
	fi
}

# --- the machine

# A busybox of the machine's architecture.
busybox=$(command -v busybox)
if [[ $ARCH != $(dpkg --print-architecture) ]]; then
	busybox=$CACHE/busybox-$ARCH/bin/busybox
	[[ -e $busybox ]] || DEB_ARCH=$ARCH "$tools/fetch-deb.sh" bookworm "$CACHE/busybox-$ARCH" busybox-static
fi

# pack TEST_BINARY INITRAMFS writes an initramfs.
pack() {
	local root=$OUT/root
	rm -rf "$root"
	mkdir -p "$root/bin"
	install -m 755 "$here/init.sh" "$root/init"
	install -m 755 "$busybox" "$root/bin/busybox"
	install -m 755 "$1" "$root/bin/vm.test"
	if ((${#programs[@]})); then install -m 755 "${programs[@]}" "$root/bin"; fi
	(cd "$root" && find . | cpio --quiet -o -H newc -R 0:0) >"$2"
	rm -rf "$root"
}

# run_machine KERNEL BOOT DIRECTORY boots once. It leaves console.log and output.log and sets fault to
# what befell the machine, if anything.
run_machine() {
	local kernel=$1 boot=$2 dir=$3 initramfs=$OUT/initramfs cgroup=v2 nodes=1 run='^TestVM' skip='^TestVM(Confined|Constrained|Faults|MissedHook)'
	local status=0 args=()
	rm -f "$dir"/*.log
	case $boot in
	numa)
		nodes=2 run='^TestVMConstrained' skip=
		# The machine's own nodes: Debian's kernels cannot make fake ones (NUMA_EMU). The second has no CPU.
		args+=(-object "memory-backend-ram,id=m0,size=$((MEMORY / 2))M" -numa "node,nodeid=0,cpus=0-$((SMP - 1)),memdev=m0"
			-object "memory-backend-ram,id=m1,size=$((MEMORY / 2))M" -numa "node,nodeid=1,memdev=m1")
		;;
	confined) run='^TestVMConfined' skip= ;;
	faults) initramfs+=.faults run='^TestVM(Faults|MissedHook)' skip= ;;
	v1) cgroup=v1 ;;
	esac
	local append=("${ports[@]}" loglevel=4 "log_buf_len=$LOG_BUF" panic=-1 oops=panic mitigations=off
		"oom.cgroup=$cgroup" "oom.nodes=$nodes"
		"oom.run=${RUN:-$run}" "oom.skip=$skip" "oom.timeout=$((TIMEOUT > 60 ? TIMEOUT - 40 : TIMEOUT))s")
	if [[ $ARCH == arm64 ]]; then # it has one port
		args+=(-chardev "file,id=output,path=$dir/output.log" -device 'pci-serial,chardev=output')
	else
		args+=(-serial "file:$dir/output.log")
	fi

	timeout --kill-after=10 "$TIMEOUT" "${emulator[@]}" -accel "$ACCEL" -smp "$SMP" -m "$MEMORY" \
		-nodefaults -no-user-config -display none -monitor none -no-reboot \
		-serial "file:$dir/console.log" \
		-kernel "${image[$kernel]}" -initrd "$initramfs" -append "${append[*]}" "${args[@]}" \
		>"$dir/qemu.log" 2>&1 </dev/null &
	machine=$!
	wait "$machine" || status=$?
	touch "$dir/console.log" "$dir/output.log"
	sed -i 's/\r//g' "$dir/console.log" "$dir/output.log"

	fault=$(grep -m 1 -aoE 'Kernel panic - not syncing.*' "$dir/console.log" || true)
	if [[ -n $fault ]]; then
		fault="panic: $fault"
	elif ((status == 124 || status == 137)); then
		fault="hang: not off after $TIMEOUT s"
		grep -qx VM-END "$dir/output.log" || fault+=", no end marker"
	elif ! grep -qx VM-END "$dir/output.log"; then
		fault="no end marker (QEMU ended with status $status)"
	fi
}

# tails DIRECTORY TITLE shows the end of what the machine said, in one piece.
tails() {
	local dir=$1 log
	{
		echo "--- $2"
		# What tests complained of stands above their verdicts, which may be more than the tail.
		grep -aE '^ +[a-z_]+_test\.go:[0-9]+: ' "$dir/output.log" 2>/dev/null | head -n 40 | cut -c 1-600 || true
		for log in qemu output console; do
			[[ -s $dir/$log.log ]] || continue
			echo "--- the end of $dir/$log.log:"
			tail -n "${TAIL:-40}" "$dir/$log.log" | cut -c 1-300 | sed 's/^/    /'
		done
		echo '---'
	} >"$dir/tails"
	cat "$dir/tails"
	rm "$dir/tails"
}

# count WORD FILE counts the tests that ended so, subtests too.
count() { grep -acE "^ *--- $1: " "$2" || true; }

# judge DIRECTORY WANTED sets verdict from what a machine that ran to its end said.
judge() {
	local log=$1/output.log status ran bad
	verdict=ok
	why=$(sed -n 's/^VM-NA //p' "$log")
	if [[ -n $why ]]; then
		# A kernel whose configuration says that it can must not get around the tests.
		verdict=$([[ $2 == yes ]] && echo FAIL || echo n/a)
		return
	fi
	status=$(sed -n 's/^VM-EXIT //p' "$log" | tail -n 1)
	ran=$(($(count PASS "$log") + $(count FAIL "$log") + $(count SKIP "$log")))
	bad=$(awk '$1 == "TABLE" && $4 != "ok" && $4 != "n/a" { n++ } END { print n + 0 }' "$log")
	why="$(count PASS "$log") passed, $(count FAIL "$log") failed, $(count SKIP "$log") skipped"
	if ((ran == 0)); then
		verdict=FAIL why='no test ran'
	elif [[ $status != 0 || $(count FAIL "$log") != 0 || $bad != 0 ]]; then
		verdict=FAIL why+=", $bad bad rows, status ${status:-unknown}"
	fi
}

# boot KERNEL BOOT is one job. OUT/KERNEL/BOOT/verdict gets: verdict, seconds, why.
boot() {
	local kernel=$1 boot=$2 dir=$OUT/$1/$2 wanted begin=$SECONDS try fault='' verdict why machine=
	mkdir -p "$dir"
	trap 'kill "$machine" 2>/dev/null; exit 143' TERM
	wanted=$(has "$kernel" "$boot")
	if [[ $wanted == no ]]; then
		verdict=n/a why='not in this kernel (its configuration)'
	elif [[ $boot == confined && $ARCH == arm64 && ${version[$kernel]} =~ ^(5|6\.[0-3])\. ]]; then
		verdict=n/a why='expects fentry, which arm64 has since 6.4'
	elif [[ $boot == faults && $kernel != "${names[0]}" && $kernel != "${names[-1]}" ]]; then
		# It tests the comparison, of which there are two sorts: before and since the tracepoint has the task.
		verdict=n/a why='done on the oldest and the newest'
	else
		for try in 1 2; do
			run_machine "$kernel" "$boot" "$dir"
			[[ -n $fault ]] || break
			tails "$dir" "$kernel $boot, try $try: $fault"
		done
		if [[ -n $fault ]]; then
			verdict=FAIL why="$fault, twice"
		else
			judge "$dir" "$wanted"
			[[ $verdict != FAIL ]] || tails "$dir" "$kernel $boot: $why"
			((try == 1)) || why+=', at the second try'
		fi
	fi
	printf '%s\t%d\t%s\n' "$verdict" $((SECONDS - begin)) "$why" >"$dir/verdict"
	printf '  [%3d s] %-5s %-6s %-4s %3d s  %s\n' "$SECONDS" "$kernel" "$boot" "$verdict" $((SECONDS - begin)) "$why"
}

# --- the run

rm -rf "$OUT"
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
echo '==> to boot'
for kernel in "${names[@]}"; do
	printf '  %-5s %s (%s)\n' "$kernel" "${version[$kernel]}" "${what[$kernel]}"
done
pack "$test_binary" "$OUT/initramfs"
[[ -z $faults ]] || pack "$faults" "$OUT/initramfs.faults"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM

echo "==> booting, $JOBS at once"
for boot in $BOOTS; do
	for kernel in "${names[@]}"; do
		while (($(jobs -pr | wc -l) >= JOBS)); do wait -n || true; done
		boot "$kernel" "$boot" &
	done
done
wait

# --- the table

# rows prints kernel, boot, tier, scenario, result and detail of every row, by tabs.
rows() {
	local kernel boot
	for boot in $BOOTS; do
		for kernel in "${names[@]}"; do
			[[ -e $OUT/$kernel/$boot/output.log ]] || continue
			sed -nE 's/^[[:space:]]*TABLE //p' "$OUT/$kernel/$boot/output.log" | tr '\t' ' ' |
				awk -v at="$ARCH $kernel"$'\t'"$boot" '{
					detail = $0; sub(/^ *[^ ]+ +[^ ]+ +[^ ]+ */, "", detail)
					print at "\t" $1 "\t" $2 "\t" ($3 == "ok" || $3 == "n/a" ? $3 : "FAIL") "\t" detail
				}'
		done
	done
}

passed=0 failed=0 skipped=0 bad_boots=0
verdicts=$OUT/verdicts.tsv
: >"$verdicts"
for boot in $BOOTS; do
	for kernel in "${names[@]}"; do
		dir=$OUT/$kernel/$boot
		# A job that broke is a failure, not a gap.
		[[ -e $dir/verdict ]] || printf 'FAIL\t0\tthe script broke\n' >"$dir/verdict"
		IFS=$'\t' read -r verdict seconds why <"$dir/verdict"
		printf '%s\t%s\t%s\t%d\t%s\n' "$ARCH $kernel" "$boot" "$verdict" "$seconds" "$why" >>"$verdicts"
		bad=0
		if [[ -e $dir/output.log ]]; then
			passed=$((passed + $(count PASS "$dir/output.log")))
			bad=$(count FAIL "$dir/output.log")
			skipped=$((skipped + $(count SKIP "$dir/output.log")))
		fi
		if [[ $verdict == FAIL ]]; then
			bad_boots=$((bad_boots + 1))
			# A boot that failed without a failed test counts as one.
			((bad > 0)) || bad=1
		fi
		failed=$((failed + bad))
	done
done
rows >"$OUT/rows.tsv"

for kernel in "${names[@]}"; do
	said=$(sed -n 's/^VM-START //p' "$OUT/$kernel"/*/output.log 2>/dev/null | sort -u | head -n 1)
	said=${said:-nothing ?}
	printf '%s\t%s\t%s KiB\t%s\n' "$ARCH $kernel" "${said% *}" "${said##* }" "${what[$kernel]}"
done >"$OUT/booted.tsv"
"$here/table.sh" "$OUT" >"$OUT/table.md"

echo
cat "$OUT/table.md"
echo
skips=$(grep -HaE '^ *--- SKIP: ' "$OUT"/*/*/output.log || true)
if [[ -n $skips ]]; then
	echo 'skipped:'
	sed "s|^$OUT/|  |; s|/output.log:| |" <<<"$skips"
fi
((bad_boots == 0)) || echo "boots failed: $bad_boots"
echo "$passed passed, $failed failed, $skipped skipped (after $SECONDS s)"
((passed > 0 && failed == 0 && bad_boots == 0))
