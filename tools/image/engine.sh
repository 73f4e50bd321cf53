# shellcheck shell=bash
# Which program builds images, and how it is asked. Read by the scripts beside it.
#
# CONTAINER_TOOL (docker, podman or buildah) is the one that is there and works. None of them needs a daemon
# here but docker. Where there is none, buildah is installed, which gets by without namespaces (chroot).

# Of the scripts that read this.
# shellcheck disable=SC2034
base_name=localhost/debian:bookworm

find_engine() {
	local tool
	for tool in docker podman buildah; do
		command -v "$tool" >/dev/null || continue
		if [[ $tool != docker ]] || docker info >/dev/null 2>&1; then
			echo "$tool"
			return
		fi
	done
	return 1
}
if [[ -z ${CONTAINER_TOOL:-} ]] && ! CONTAINER_TOOL=$(find_engine); then
	"$(dirname "${BASH_SOURCE[0]}")/../install-deps.sh" "$CACHE/libbpf-bookworm-backports" buildah
	CONTAINER_TOOL=buildah
fi

# all_images prints the names of the images that Dockerfile.builder has.
all_images() { sed -n 's/^FROM base AS //p' "$(dirname "${BASH_SOURCE[0]}")/../../Dockerfile.builder"; }

# engine COMMAND... runs the tool.
engine() {
	if [[ $CONTAINER_TOOL == buildah && $1 == inspect ]]; then
		shift
		buildah inspect --type image "$@"
	else
		"$CONTAINER_TOOL" "$@"
	fi
}

# inspect_label NAME is the template that prints a label.
inspect_label() {
	case $CONTAINER_TOOL in
	buildah) printf '{{index .OCIv1.Config.Labels "%s"}}' "$1" ;;
	*) printf '{{index .Config.Labels "%s"}}' "$1" ;;
	esac
}

# engine_build ARGUMENT... builds. Nothing is pulled that is here.
engine_build() {
	case $CONTAINER_TOOL in
	docker) DOCKER_BUILDKIT=1 docker build "$@" ;;
	podman) podman build --layers --force-rm "$@" ;;
	buildah) buildah bud --layers --force-rm --isolation chroot "$@" ;;
	*)
		echo "CONTAINER_TOOL: must be docker, podman or buildah, not $CONTAINER_TOOL" >&2
		return 2
		;;
	esac
}
