#!/bin/busybox sh
# shellcheck shell=dash
#
# The only process of the virtual machine besides the tests: sets up what a distribution's init would,
# runs /bin/vm.test and powers off. tools/vm/test-vm.sh puts it into the initramfs as /init and says on
# the kernel's command line:
#
#   oom.cgroup=v2|v1     the hierarchy of the memory controller
#   oom.nodes=N          NUMA nodes that are wanted
#   oom.port=ttyS1       the second serial port
#   oom.run=, oom.skip=, oom.timeout=    as go test has them
#
# What the tests print, and these lines, go to the second serial port, which no kernel message cuts in
# two:
#
#   VM-START <release> <page size in KiB>
#   VM-NA <why>          what was wanted is not in this kernel; no test is run
#   VM-EXIT <status>     of the tests
#   VM-END
/bin/busybox --install -s /bin
export PATH=/bin

mkdir -p /proc /sys /dev /tmp /var
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
ln -s /tmp /var/tmp
# Pages of a tmpfs count as shared memory, those of a ramfs as a file's.
mkdir /ramfs
mount -t ramfs ramfs /ramfs
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
mount -t securityfs securityfs /sys/kernel/security

# param NAME DEFAULT prints a parameter of the kernel's command line.
param() {
	value=$(tr ' ' '\n' </proc/cmdline | sed -n "s/^oom\\.$1=//p" | tail -n 1)
	echo "${value:-$2}"
}

group=/sys/fs/cgroup
missing=
case $(param cgroup v2) in
v2)
	mount -t cgroup2 cgroup2 $group
	for controller in memory cpuset; do
		echo "+$controller" >$group/cgroup.subtree_control
	done
	grep -qw memory $group/cgroup.subtree_control || missing='no cgroup v2 memory controller'
	# What makes a task deaf to SIGKILL is only to be had from v1's freezer.
	mkdir /tmp/freezer
	if mount -t cgroup -o freezer freezer /tmp/freezer; then
		export FREEZER=/tmp/freezer
	fi
	;;
v1)
	mount -t tmpfs cgroup $group
	for controller in memory freezer cpuset; do
		mkdir $group/$controller
		mount -t cgroup -o $controller $controller $group/$controller || rmdir $group/$controller
	done
	if [ -e $group/memory/memory.limit_in_bytes ]; then
		# Before any child: without it a parent's limit does not bind them on 5.10.
		[ ! -e $group/memory/memory.use_hierarchy ] || echo 1 >$group/memory/memory.use_hierarchy
	else
		missing='no cgroup v1 memory controller'
	fi
	[ ! -d $group/freezer ] || export FREEZER=$group/freezer
	;;
esac
nodes=0
for node in /sys/devices/system/node/node[0-9]*; do
	[ ! -d "$node" ] || nodes=$((nodes + 1))
done
[ $nodes -ge "$(param nodes 0)" ] || missing="the kernel sees $nodes NUMA node"

ip link set lo up
echo 0 >/proc/sys/kernel/printk_ratelimit
echo 0 >/proc/sys/vm/panic_on_oom
echo -1000 >/proc/self/oom_score_adj
export HOME=/tmp TMPDIR=/tmp OOM_TEST_BUILD=/bin
cd /tmp || exit

# The port is closed before the machine goes, for that waits until all of it is out.
{
	echo "VM-START $(uname -r) $(awk '/^KernelPageSize/ { print $2; exit }' /proc/self/smaps)"
	if [ -n "$missing" ]; then
		echo "VM-NA $missing"
	else
		vm.test -test.v -test.run "$(param run '^TestVM')" -test.skip "$(param skip '')" -test.timeout "$(param timeout 200s)" 2>&1
		echo "VM-EXIT $?"
	fi
	echo VM-END
} >"/dev/$(param port ttyS1)" </dev/null
poweroff -f
