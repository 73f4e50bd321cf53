#!/usr/bin/env bash
# Renders deploy/chart into a directory, a file for each template, as deploy/manifests has them; the descheduler into
# one below it, which kubectl apply -f DIR leaves out.
#
#   tools/deploy/manifests.sh DIR
#
# SET are further values (key=value), which are strings: a tag may have digits alone.
set -euo pipefail

cd "$(dirname "$0")/../.."
target=$(realpath -m "$1")
helm=$(tools/deploy/build.sh)/helm
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$helm" template oom-tracer deploy/chart --namespace oom-tracer --kube-version 1.30.0 \
	--values deploy/manifests-values.yaml --set descheduler.enabled=true --set-string "${SET:-}" --output-dir "$work" >/dev/null
mkdir -p "$target/descheduler"
rm -f "$target"/*.yaml "$target"/descheduler/*.yaml
cd "$work/oom-tracer/templates"
for file in *.yaml descheduler/*.yaml; do
	name=$file
	# kubectl apply -f DIR goes by name, and the others stand in the namespace.
	[[ $name != namespace.yaml ]] || name=00-namespace.yaml
	{
		echo '# Rendered from deploy/chart (make manifests): change it there.'
		# The file says itself where it comes from.
		sed '/^# Source: /d' "$file"
	} >"$target/$name"
done
