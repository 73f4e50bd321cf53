#!/usr/bin/env bash
# Builds programs of Kubernetes from tools/kube/go.mod, if they are not there yet, and prints the directory that
# holds them.
#
#   tools/kube/build.sh          kube-apiserver and etcd: what tests run as processes of their own
#   tools/kube/build.sh node     kubelet, kube-proxy, kubectl, kube-controller-manager, kube-scheduler: the rest of a cluster
#
# On two cores the API server takes 4 minutes (12 on a busy machine), 2,100 packages and 2 GB of memory; the rest takes 5 more.
set -euo pipefail

cd "$(dirname "$0")"
# shellcheck source=tools/cache.sh
. ../cache.sh
case ${1:-} in
'') packages=(k8s.io/kubernetes/cmd/kube-apiserver go.etcd.io/etcd/server/v3) ;;
node) packages=(k8s.io/kubernetes/cmd/{kubelet,kube-proxy,kubectl,kube-controller-manager,kube-scheduler}) ;;
*)
	echo "usage: $0 [node]" >&2
	exit 2
	;;
esac
version=$(version k8s.io/kubernetes)

build() {
	local major minor
	IFS=. read -r major minor _ <<<"${version#v}"
	# Clients cannot parse a server's version if it has none.
	local set_version=k8s.io/component-base/version.git
	CGO_ENABLED=0 "$go" build -v -trimpath -o "$1/" \
		-ldflags "-s -w -X ${set_version}Version=$version -X ${set_version}Major=$major -X ${set_version}Minor=$minor" \
		"${packages[@]}" 2>&1 | "$tools/progress.sh"
	[[ ! -e $1/server ]] || mv "$1/server" "$1/etcd" # Go names it by its directory
}
once "kube-${1:+$1-}$version" "building ${packages[*]##*/cmd/} $version, some minutes" build
