#!/usr/bin/env bash
# Renders deploy/chart into a directory, a file for each template, as deploy/manifests has them.
#
#   tools/deploy/manifests.sh DIR
set -euo pipefail

cd "$(dirname "$0")/../.."
target=$1
helm=$(tools/deploy/build.sh)/helm
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$helm" template oom-tracer deploy/chart --namespace oom-tracer --kube-version 1.30.0 \
	--values deploy/manifests-values.yaml --output-dir "$work" >/dev/null
mkdir -p "$target"
rm -f "$target"/*.yaml
for file in "$work"/oom-tracer/templates/*.yaml; do
	name=${file##*/}
	# kubectl apply -f DIR goes by name, and the others stand in the namespace.
	[[ $name != namespace.yaml ]] || name=00-namespace.yaml
	{
		echo '# Rendered from deploy/chart (make manifests): change it there.'
		# The file says itself where it comes from.
		sed '/^# Source: /d' "$file"
	} >"$target/$name"
done
