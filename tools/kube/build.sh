#!/usr/bin/env bash
# Builds programs of Kubernetes from tools/kube/go.mod, if they are not there yet, and prints the directory that
# holds them.
#
#   tools/kube/build.sh          kube-apiserver and etcd: what tests run as processes of their own
#   tools/kube/build.sh node     kubelet, kube-proxy, kubectl, kube-controller-manager, kube-scheduler: the rest of a cluster
#
# They lie in the user's cache directory under Kubernetes' version, so that another version is another
# directory. On two cores the API server takes 4 minutes (12 on a busy machine), 2,100 packages and 2 GB of memory;
# the rest takes 5 more.
set -euo pipefail

cd "$(dirname "$0")"
go=${GO:-$(command -v go || echo /usr/local/go/bin/go)} # as the Makefile has it
version=$("$go" list -m -f '{{.Version}}' k8s.io/kubernetes)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/oom-tracer
case ${1:-} in
'')
	dir=$cache/kube-$version
	packages=(k8s.io/kubernetes/cmd/kube-apiserver go.etcd.io/etcd/server/v3)
	;;
node)
	dir=$cache/kube-node-$version
	packages=(k8s.io/kubernetes/cmd/{kubelet,kube-proxy,kubectl,kube-controller-manager,kube-scheduler})
	;;
*)
	echo "usage: $0 [node]" >&2
	exit 2
	;;
esac

# A directory is moved into place whole: what is there is complete.
if [[ ! -d $dir ]]; then
	echo "==> building ${packages[*]##*/cmd/} $version, once: some minutes" >&2
	mkdir -p "$cache"
	partial=$(mktemp -d "$cache/.kube-XXXXXX")
	trap 'rm -rf "$partial"' EXIT
	IFS=. read -r major minor _ <<<"${version#v}"
	# Clients cannot parse a server's version if it has none.
	set_version=k8s.io/component-base/version.git
	CGO_ENABLED=0 "$go" build -v -trimpath -o "$partial/" \
		-ldflags "-s -w -X ${set_version}Version=$version -X ${set_version}Major=$major -X ${set_version}Minor=$minor" \
		"${packages[@]}" 2>&1 | ../progress.sh >&2
	[[ ! -e $partial/server ]] || mv "$partial/server" "$partial/etcd" # Go names it by its directory
	chmod 755 "$partial"
	# Another may have built it meanwhile.
	mv -T "$partial" "$dir" 2>/dev/null || [[ -d $dir ]]
fi
echo "$dir"
