#!/usr/bin/env bash
# Builds what OOM Tracer is compared with, from Go modules, and prints the versions.
#
#   tools/sidebyside/build.sh DIRECTORY CLANG...      CLANG compiles BPF
#
# Into DIRECTORY come: sidebyside, a static program; kernel-monitor.json, the rules of node-problem-detector; and
# trace_oomkill.bpf.o, the BPF program of Inspektor Gadget. Inspektor Gadget itself runs gadgets from OCI images of registries.
set -euo pipefail

out=$1
shift
clang=("$@")
root=$PWD
cd "$(dirname "$0")"
go=${GO:-$(command -v go || echo /usr/local/go/bin/go)} # as the Makefile has it
gadgets=github.com/inspektor-gadget/inspektor-gadget@v0.45.0

CGO_ENABLED=0 "$go" build -ldflags '-s -w' -o "$root/$out/sidebyside" .
install -m 644 "$("$go" list -m -f '{{.Dir}}' k8s.io/node-problem-detector)/config/kernel-monitor.json" "$root/$out"
dir=$("$go" mod download -json $gadgets | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
cd "$root"
"${clang[@]}" -I"$dir/include" -c "$dir/gadgets/trace_oomkill/program.bpf.c" -o "$out/trace_oomkill.bpf.o"
llvm-strip -g "$out/trace_oomkill.bpf.o"
