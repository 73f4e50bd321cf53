#!/usr/bin/env bash
# 1,000 kills in a cgroup of this machine, at its full speed, seen by OOM Tracer, the kmsg tailer and
# node-problem-detector. Prints rows for deploy/docs/comparison.md. Needs root.
#
#   unshare --net -- tools/sidebyside/burst.sh BUILD      where make has built them
set -euo pipefail

build=$1
dir=$(mktemp -d)
version=2
group=/sys/fs/cgroup/oom-side-by-side
limit=memory.max
own=$(sed -n 's/^[0-9]*:memory://p' /proc/self/cgroup)
if [[ -n $own ]]; then
	version=1
	group=/sys/fs/cgroup/memory${own%/}/oom-side-by-side
	limit=memory.limit_in_bytes
fi
trap 'kill $(jobs -p) 2>/dev/null || true; wait; rmdir "$group"; rm -rf "$dir"' EXIT
exec 9>"${TMPDIR:-/tmp}/oom-tracer-tests.lock" # as the tests have it
flock 9
mkdir "$group"
echo 4M >"$group/$limit"
ip link set lo up

cat >"$dir/config.yaml" <<END
node: {state_file: $dir/state.json}
kernel: {pin_dir: ""}
nats: {embedded: {listen: "127.0.0.1:4222", dir: $dir/nats}}
END
"$build/oom-tracer" --config "$dir/config.yaml" >/dev/null 2>"$dir/log" 9>&- &
"$build/sidebyside/sidebyside" oomparser >"$dir/tailer" 2>/dev/null 9>&- &
"$build/sidebyside/sidebyside" npd "$build/sidebyside/kernel-monitor.json" >"$dir/npd" 2>/dev/null 9>&- &
kill_some() { HOG_CGROUP=$group "$build/hog" "$1" 8 <<<x | sed -n 's/ signal 9$//p'; }
for ((try = 0; try < 40; try++)); do
	kill_some 1 >/dev/null
	sleep 2
	# oom-tap ends where there is no NATS yet.
	if ! jobs -r | grep -q oom-tap; then
		"$build/oom-tap" --config "$dir/config.yaml" --kills --output json >>"$dir/ours" 2>/dev/null 9>&- &
	fi
	[[ ! -s $dir/ours || ! -s $dir/tailer || ! -s $dir/npd ]] || break
done
counted() { grep -c '"count":true' "$dir/npd" || true; }
before=$(counted)
sleep 6 # the kernel says why of ten kills in five seconds
began=$(date +%s%N)
kill_some 1000 >"$dir/killed"
took=$(($(date +%s%N) - began))
sleep 15

# of FILE KEY: how many of the killed it names.
of() { grep -oE "$2[0-9]+" "$1" | grep -oE '[0-9]+$' | sort -u | grep -cxFf - "$dir/killed" || true; }
all=$(wc -l <"$dir/killed") ours=$(of "$dir/ours" '"victim":\{"pid":')
cat <<END
SIDE 
SIDE #### Linux $(uname -r), cgroup v$version
SIDE 
SIDE | kind of kill | OOM Tracer | kmsg tailer | node-problem-detector |
SIDE |---|---|---|---|
SIDE | burst of $all in a cgroup, in $((took / 1000000000)) s | $ours of $all | $(of "$dir/tailer" '"pid":') of $all | $(of "$dir/npd" '"pid":') of $all (its metric: $(($(counted) - before))) |
END
((all == 1000 && ours == all))
