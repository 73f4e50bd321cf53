#!/usr/bin/env bash
# make bench-scale: runs the benches that are about size, one after the other, and writes what they measured to standard output and
# build/scale.md. A bench that fails does not stop the others; after 20 minutes all end. There is no seed: the data is the same in each run,
# and the jitter is that of the programs.
#   CONNECTIONS=10000 STORM=1000 KILLS=10 MESSAGES=1000000 PODS=10000 SIMULATED="150000 500000"
set -euo pipefail
cd "$(dirname "$0")/.."

connections=${CONNECTIONS:-10000} storm=${STORM:-$((${CONNECTIONS:-10000} / 10))} kills=${KILLS:-10} messages=${MESSAGES:-1000000}
pods=${PODS:-10000} simulated=${SIMULATED:-150000 500000}
go=${GO:-go} failed=0
export OOM_TEST_BUILD=$PWD/build

# A connection is a file here, and one in a server.
ulimit -n "$(ulimit -Hn)"
if ((connections + 1000 > $(ulimit -n))); then
	echo "CONNECTIONS=$connections needs more files than the $(ulimit -n) that the hard limit permits: raise it, or lower CONNECTIONS" >&2
	exit 1
fi

# bench TITLE TESTS PACKAGE [FLAG...]
bench() {
	local title=$1 tests=$2 package=$3 began=$SECONDS status=0
	shift 3
	printf '\n## %s\n\n```\n' "$title"
	"$go" test -tags "bench,${TAGS:-netgo,osusergo}" -count=1 -timeout $((SECONDS < 1190 ? 1200 - SECONDS : 10))s -run "$tests" -v "$package" "$@" >build/bench-scale.log 2>&1 || status=$?
	if ((status)); then
		cat build/bench-scale.log
	else
		sed -nE 's/^ +[a-z_]+_test\.go:[0-9]+: //p' build/bench-scale.log
	fi
	printf '```\n\n%s, %d s.\n' "$( ((status)) && echo FAILED || echo ok)" $((SECONDS - began))
	return $status
}

{
	printf '# make bench-scale\n\nOOM Tracer %s, %s, %s. %s, %s processors, %s MiB, load %s.\n' "$(git describe --tags --always --dirty)" \
		"$("$go" version | cut -d' ' -f3)" "$(build/nats-server --version)" "$(uname -sr)" "$(nproc)" "$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)" \
		"$(cut -d' ' -f1 /proc/loadavg)"
	OOM_SCALE_CONNECTIONS=$connections OOM_SCALE_STORM=$storm OOM_SCALE_KILLS=$kills \
		bench "$connections tracers on three NATS servers" '^TestScale$' ./go/internal/deploy || failed=1
	OOM_BENCH_PODS=$pods bench "oom-annotator with $pods real pods" '^TestBenchRealPods$' ./go/cmd/oom-annotator || failed=1
	for n in $simulated; do
		OOM_BENCH_SIMULATED=$n bench "oom-annotator with $n simulated pods" '^TestBenchMemory$' ./go/cmd/oom-annotator || failed=1
	done
	bench "Reading $messages messages" '^TestTopMillion$' ./go/internal/tap -messages "$messages" || failed=1
	printf '\nAll of it: %d s.\n' "$SECONDS"
	exit "$failed"
} | tee build/scale.md
