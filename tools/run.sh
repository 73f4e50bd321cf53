#!/usr/bin/env bash
# Runs oom-tracer and, where KUBECONFIG names a cluster, oom-annotator beside it, until one of them ends.
#
#   tools/run.sh CONFIG
set -euo pipefail

config=$1
if [[ -z "${KUBECONFIG:-}" ]]; then
	exec build/oom-tracer --config "$config"
fi

# Each ends within five seconds of a SIGTERM. A ^C of the terminal reaches them without us; the second
# signal that they would get from here would end them at once, so they are told only once, and only here.
set -m # groups of their own
build/oom-tracer --config "$config" &
tracer=$!
build/oom-annotator --config "$config" --kubeconfig "$KUBECONFIG" &
annotator=$!
stop() { kill -TERM "$tracer" "$annotator" 2>/dev/null || true; }
trap stop INT TERM

status=0
wait -n "$tracer" "$annotator" || status=$?
trap '' INT TERM
stop
wait "$annotator" 2>/dev/null || true
wait "$tracer" 2>/dev/null || true
# 128 + SIGINT or SIGTERM: it was we who were told to end.
if ((status == 130 || status == 143)); then
	status=0
fi
exit "$status"
