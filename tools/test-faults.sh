#!/usr/bin/env bash
# Shows that the selftest can fail: the BPF program gets one wrong field at a time (src/faults.bpf.h), and
# the selftest must name it and end non-zero. Without a fault it must be content.
#
#   tools/test-faults.sh ORACLE        a tracer built with OOM_FAULTS and the tag faults
set -euo pipefail

tracer=$1
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
printf 'nats: {embedded: {listen: "127.0.0.1:0", dir: %s}}\nmetrics: {listen: ""}\n' "$temp/nats" >"$temp/config.yaml"

failed=0
# check NUMBER FIELD: with that fault the selftest must complain of the field; an empty field means that it
# must be content.
check() {
	local number=$1 field=$2 status=0 right=0
	OOM_TRACER_FAULT=$number "$tracer" selftest --config "$temp/config.yaml" --node-name faulty >"$temp/out" 2>&1 || status=$?
	if [[ -z $field ]]; then
		((status == 0)) && right=1
	else
		((status != 0)) && grep -q "^WRONG $field" "$temp/out" && right=1
	fi
	if ((right)); then
		printf '  ok    fault %-3s exit %d  %s\n' "$number" "$status" "$(grep -m 1 '^WRONG' "$temp/out" || true)"
	else
		printf '  FAIL  fault %-3s exit %d, want "WRONG %s"\n' "$number" "$status" "$field"
		sed 's/^/        /' "$temp/out"
		failed=1
	fi
}

check 0 ''
check 1 victim.pid
check 2 victim.tid
check 3 victim.start_boottime_ns
check 4 victim.comm
check 5 victim.uid
check 6 victim.oom_score_adj
check 7 victim.cgroup.id
check 8 victim.cgroup.path
check 9 scope
check 10 outcome
check 11 victim.memory.total_vm
check 12 victim.memory.anon_rss
check 13 victim.memory.file_rss
check 14 victim.memory.shmem_rss
check 15 victim.memory.pgtables
check 16 limit.max
check 17 limit.cgroup.id
check 20 trigger.pid
exit $failed
