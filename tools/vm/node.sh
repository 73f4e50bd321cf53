#!/bin/busybox sh
# shellcheck shell=dash
#
# A node with pods, for TestVM of go/cmd/oom-annotator: a tracer as it ships, whose NATS is one of the host
# that runs the machine, and then three kills: by the limit of a container, by that of all pods together, and
# of the whole node, where another pod holds more than the one that is hit. init.sh runs this in the place of vm.test. It ends with the machine. On the kernel's
# command line:
#
#   oom.shell=ttyS2                  for TestVMChaos: nothing of this, but what comes from that port is run
#   oom.node=NAME oom.nats=PORT
#   oom.container=UID/ID oom.kubepods=UID/ID oom.global=UID/ID     the pod and container that each kill hits
#   oom.holder=UID/ID                                              those that hold 64 MiB, and cannot be hit
set -eu

param() { tr ' ' '\n' </proc/cmdline | sed -n "s/^oom\\.$1=//p"; }

memory=/sys/fs/cgroup limit=memory.max none=max
if [ -d $memory/memory ]; then
	memory=$memory/memory limit=memory.limit_in_bytes none=-1
fi

# container UID/ID makes the cgroup of a pod's container, as a kubelet does, and prints its directory.
container() {
	dir=$memory
	for name in kubepods burstable "pod${1%/*}" "${1#*/}"; do
		[ $limit != memory.max ] || echo +memory >"$dir/cgroup.subtree_control"
		dir=$dir/$name
		mkdir -p "$dir"
	done
	echo "$dir"
}

# hog CGROUP MIB has a process in a cgroup take memory. init's children are out of the OOM killer's reach.
hog() { echo | HOG_CGROUP=$1 sh -c "echo 0 >/proc/self/oom_score_adj; exec hog 1 $2 plain"; }

insmod /bin/vmxnet3.ko
ip link set eth0 up
ip addr add 10.0.2.15/24 dev eth0
port=/dev/$(param shell)
if [ -c "$port" ]; then
	set +eu
	exec 3<>"$port"
	stty raw -echo <&3
	echo SHELL
	# shellcheck source=/dev/null
	. "$port" >&3 2>&1
	exit
fi
echo "nats: {url: \"nats://10.0.2.2:$(param nats)\"}" >/tmp/config.yaml # the host's loopback
oom-tracer --config /tmp/config.yaml --node-name "$(param node)" &
until wget -qO /dev/null http://127.0.0.1:9105/readyz 2>/dev/null; do sleep 1; done

own=$(container "$(param container)")
echo 16M >"$own/$limit"
hog "$own" 32
pods=$(container "$(param kubepods)")
echo 48M >$memory/kubepods/$limit
hog "$pods" 96
echo $none >$memory/kubepods/$limit
holder=$(container "$(param holder)")
# shellcheck disable=SC2016 # for the inner shell
echo | sh -c 'echo $$ >"$0/cgroup.procs"; exec hog 0 64 hold' "$holder" &
sleep 11 # a tracer reads the pods' memory that often
hog "$(container "$(param global)")" 4096
wait
