#!/usr/bin/env bash
# Builds the kube-apiserver and the etcd of tools/kube/go.mod, if they are not there yet, and prints the
# directory that holds them. Tests run both as processes of their own.
#
#   tools/kube/build.sh
#
# They lie in the user's cache directory under Kubernetes' version, so that another version is another
# directory. The build is 2,100 packages, takes 2 GB of memory and, on two cores, from 4 minutes to 12 on a busy
# machine.
set -euo pipefail

cd "$(dirname "$0")"
go=${GO:-$(command -v go || echo /usr/local/go/bin/go)} # as the Makefile has it
version=$("$go" list -m -f '{{.Version}}' k8s.io/kubernetes)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/oom-tracer
dir=$cache/kube-$version

# progress counts the packages that go build -v names, and says so now and then. What is no package's name
# is an error, and passed on.
progress() {
	local line packages=0 said=0
	while read -r line; do
		if [[ $line =~ ^[A-Za-z0-9._/~-]+$ ]]; then
			packages=$((packages + 1))
		elif [[ $line != 'go: downloading '* ]]; then
			printf '%s\n' "$line"
		fi
		if ((SECONDS >= said + 20)); then
			said=$SECONDS
			echo "    $packages packages after $said s"
		fi
	done
	echo "    done: $packages packages, $SECONDS s"
}

# A directory is moved into place whole: what is there is complete.
if [[ ! -d $dir ]]; then
	echo "==> building kube-apiserver and etcd for Kubernetes $version, once: 2,100 packages, about 4 minutes" >&2
	mkdir -p "$cache"
	partial=$(mktemp -d "$cache/.kube-XXXXXX")
	trap 'rm -rf "$partial"' EXIT
	IFS=. read -r major minor _ <<<"${version#v}"
	# Clients cannot parse the server's version if it has none.
	set_version=k8s.io/component-base/version.git
	CGO_ENABLED=0 "$go" build -v -trimpath -o "$partial/" \
		-ldflags "-s -w -X ${set_version}Version=$version -X ${set_version}Major=$major -X ${set_version}Minor=$minor" \
		k8s.io/kubernetes/cmd/kube-apiserver go.etcd.io/etcd/server/v3 2>&1 | progress >&2
	mv "$partial/server" "$partial/etcd" # Go names it by its directory
	chmod 755 "$partial"
	# Another may have built it meanwhile.
	mv -T "$partial" "$dir" 2>/dev/null || [[ -d $dir ]]
fi
echo "$dir"
