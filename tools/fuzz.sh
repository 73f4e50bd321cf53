#!/usr/bin/env bash
# Runs every fuzz target of the repository, and counts its executions: in this run, and in all runs on this machine.
#
# usage: tools/fuzz.sh TOTALS
#
# TOTALS is a file with a line for each target: its name and the sum. In the environment: GO; FUZZTIME (30s); RUN, a regular
# expression for the targets; KEEP=1 copies up to 16 of the shortest inputs that each target found interesting into its
# testdata/fuzz, where every go test runs them.
set -euo pipefail

totals=$1
mkdir -p "$(dirname "$totals")" && touch "$totals"
output=$(mktemp) && trap 'rm -f "$output"' EXIT
corpus=$("$GO" env GOCACHE)/fuzz
status=0 sum=0

printf '%-44s %12s %10s %15s\n' target executions 'a second' 'in all'
while IFS=: read -r file name; do
	dir=$(dirname "$file") target=${dir#go/}.$name
	[[ $target =~ ${RUN:-} ]] || continue
	begun=$SECONDS
	# To make an interesting input shorter is worth ten tries: with Go's 60 s some targets do nothing else.
	(cd "$dir" && "$GO" test -run '^$' -fuzz "^$name\$" -fuzztime "${FUZZTIME:-30s}" -fuzzminimizetime 10x .) >"$output" 2>&1 || { status=1 && cat "$output" >&2; }
	executions=$(grep -o 'execs: [0-9]*' "$output" | tail -n 1 | cut -d' ' -f2) || executions=0
	((executions > 0)) || { status=1 && echo "$target did nothing" >&2; }
	before=$(awk -v target="$target" '$1 == target { print $2 }' "$totals")
	total=$((${before:-0} + executions))
	{ awk -v target="$target" '$1 != target' "$totals" && echo "$target $total"; } | sort >"$totals.tmp"
	mv "$totals.tmp" "$totals"
	printf '%-44s %12d %10d %15d\n' "$target" "$executions" $((executions / (SECONDS - begun + 1))) "$total"
	sum=$((sum + executions))
	found=$corpus/$(cd "$dir" && "$GO" list .)/$name
	if [[ ${KEEP:-} && -d $found ]]; then
		mkdir -p "$dir/testdata/fuzz/$name"
		find "$found" -type f -size -3 -printf '%s %p\n' | sort -n | head -n 16 | cut -d' ' -f2 | xargs -r cp -t "$dir/testdata/fuzz/$name"
	fi
done < <(grep -rnoE '^func Fuzz\w+' go --include='*_test.go' | sed -E 's/:[0-9]+:func /:/')
printf '%-44s %12d %10s %15d\n' all "$sum" '' "$(awk '{ sum += $2 } END { print sum + 0 }' "$totals")"
exit $status
