#!/usr/bin/env bash
# Makes a disk with images for the node's containerd: what it would have pulled. They are unpacked by the same
# containerd on this machine, since an emulated one takes minutes for the checksums.
#
#   CACHE=DIRECTORY tools/node/images.sh NODE_DIR DISK TAG NATS_SERVER COREDNS POD
#
# NODE_DIR is root.sh's. TAG is that of our images (make image); the programs become localhost/nats,
# localhost/coredns, localhost/pause and localhost/pod. Needs root.
set -euo pipefail

node=$1 disk=$2 tag=$3 nats=$(readlink -f "$4") coredns=$(readlink -f "$5") pod=$(readlink -f "$6")
here=$(cd "$(dirname "$0")" && pwd)
cache=${CACHE:?}
# shellcheck source=tools/image/engine.sh
. "$here/../image/engine.sh"

temp=$(mktemp -d "$cache/.images-XXXXXX")
containerd_pid=
finish() {
	if [[ -n $containerd_pid ]]; then
		kill "$containerd_pid" 2>/dev/null || true
		wait "$containerd_pid" 2>/dev/null || true
	fi
	rm -rf "$temp"
}
trap finish EXIT

# image NAME PROGRAM: an image of one program.
image() {
	local context=$temp/context
	rm -rf "$context"
	mkdir "$context"
	cp "$2" "$context/program"
	printf 'FROM scratch\nCOPY program /%s\nENTRYPOINT ["/%s"]\n' "$(basename "${1%:*}")" "$(basename "${1%:*}")" >"$context/Dockerfile"
	engine_build -t "$1" "$context" >"$temp/log" 2>&1 || {
		cat "$temp/log" >&2
		exit 1
	}
}
nats_version=$("$nats" --version | sed 's/.*v//')
image "localhost/nats:$nats_version" "$nats"
image localhost/coredns:1 "$coredns"
image localhost/pause:1 "$pod"
image localhost/pod:1 "$pod"
names=("localhost/nats:$nats_version" localhost/coredns:1 localhost/pause:1 localhost/pod:1)
while read -r name; do names+=("localhost/$name:$tag"); done < <(all_images)

# The node's programs run here with the node's libraries.
run=("$node/programs/ld-linux-x86-64.so.2" --library-path "$node/programs")

mkdir "$temp/root" "$temp/state"
cat >"$temp/containerd.toml" <<END
version = 3
root = '$temp/root'
state = '$temp/state'
disabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime']
[grpc]
address = '$temp/containerd.sock'
END
"${run[@]}" "$node/programs/containerd" --config "$temp/containerd.toml" >"$temp/containerd.log" 2>&1 &
containerd_pid=$!
ctr() { "${run[@]}" "$node/programs/ctr" --address "$temp/containerd.sock" --namespace k8s.io "$@"; }
for ((i = 0; i < 100; i++)); do
	if ctr version >/dev/null 2>&1; then break; fi
	sleep 0.1
done
for name in "${names[@]}"; do
	case $CONTAINER_TOOL in
	buildah) buildah push "$name" "oci-archive:$temp/image.tar:$name" >"$temp/log" 2>&1 ;;
	*) "$CONTAINER_TOOL" save -o "$temp/image.tar" "$name" >"$temp/log" 2>&1 ;;
	esac || {
		cat "$temp/log" >&2
		echo "$0: no image $name: make image IMAGE_TAG=$tag" >&2
		exit 1
	}
	ctr images import --local --digests=false "$temp/image.tar" >"$temp/log" 2>&1 || {
		cat "$temp/log" "$temp/containerd.log" >&2
		exit 1
	}
	rm "$temp/image.tar"
done
ctr images list -q | sed 's/^/    /'
kill "$containerd_pid"
wait "$containerd_pid" || true
containerd_pid=
rm -f "$disk"
truncate -s 4G "$disk"
mkfs.ext4 -q -F -E root_owner=0:0 -O ^has_journal -d "$temp/root" "$disk"
