#!/usr/bin/env bash
# Builds the images for amd64 and arm64 and puts both under one name, NAME:TAG-index: an image index. `make image-index` calls it.
#
#   tools/image/index.sh [DIRECTORY]
#
# The environment is that of build.sh. With DIRECTORY each index is also written there, as the OCI archive NAME.tar, and its digest into
# images.txt. BUILT=1: the images are built already.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tools/image/engine.sh
. "$here/engine.sh"
out=${1:-}

if [[ $CONTAINER_TOOL == docker ]]; then
	echo "$0: docker makes an index only in a registry: use CONTAINER_TOOL=podman or buildah" >&2
	exit 2
fi
host=$("$GO" env GOHOSTARCH)
if [[ -z ${BUILT:-} ]]; then
	for arch in amd64 arm64; do ARCH=$arch KERNEL_BTF='' "$here/build.sh"; done
fi
mapfile -t images < <(all_images)
for image in ${IMAGES:-${images[@]}}; do
	name=$PREFIX$image:$TAG index=$PREFIX$image:$TAG-index
	"$CONTAINER_TOOL" manifest rm "$index" >/dev/null 2>&1 || true
	"$CONTAINER_TOOL" manifest create "$index" >/dev/null
	for arch in amd64 arm64; do
		from=$name
		[[ $arch == "$host" ]] || from+=-$arch
		"$CONTAINER_TOOL" manifest add "$index" "containers-storage:$from" >/dev/null
	done
	echo "==> $index: amd64 and arm64"
	[[ -n $out ]] || continue
	digest=$(mktemp)
	"$CONTAINER_TOOL" manifest push --quiet --all --format oci --digestfile "$digest" "$index" "oci-archive:$out/$image.tar:$image:$TAG"
	printf '%s:%s@%s\n' "$image" "$TAG" "$(cat "$digest")" >>"$out/images.txt"
	rm "$digest"
done
