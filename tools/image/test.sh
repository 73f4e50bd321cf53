#!/usr/bin/env bash
# Runs the images on this kernel, as a cluster would: the tracer as its image's entrypoint, user 0 with the
# capabilities of CAPABILITIES and no other, no new privileges, a root that cannot be written to. It must see a
# real OOM kill in a cgroup of this test's own, and with any one capability less doctor must name that one.
#
# Then, by the tracer of the image: every stock kernel that the cache has fits the program, and a build for a
# kernel that lacks one field that is read is refused with the field named.
#
# The descheduler runs as in its pod, up to where it would need an API server.
#
#   tools/image/test.sh HOG             (make test-image builds the images and calls it; needs root)
#
# From the environment: PREFIX, TAG, VERSION, REVISION, CACHE, CONTAINER_TOOL as for build.sh.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tools/image/engine.sh
. "$here/engine.sh"
hog=$1 prefix=${PREFIX:?} tag=${TAG:?}

# What deploy/ asks for, too. SYS_RESOURCE is for the tracer's own oom_score_adj, and before Linux 5.11 for
# the memory of its maps; SYSLOG for the addresses of the tier stack.
CAPABILITIES='BPF PERFMON SYSLOG SYS_RESOURCE'

# Some machines give SYS_RESOURCE to nobody. Tracing does without it; then it must be named every time.
given=$CAPABILITIES
bounding=$(capsh "--decode=$(sed -n 's/^CapBnd:[[:space:]]*//p' /proc/self/status)")
if [[ ,${bounding#*=}, != *,cap_sys_resource,* ]]; then
	echo '  (this machine has no CAP_SYS_RESOURCE to give: the tracer runs without it)'
	given=${given% SYS_RESOURCE}
fi

temp=$(mktemp -d)
cgroup='' tracer=''
# Only what was started and made here.
clean() {
	[[ -z $tracer ]] || kill -KILL "$tracer" 2>/dev/null || true
	[[ -z $tracer ]] || wait "$tracer" 2>/dev/null || true
	[[ -z $cgroup ]] || rmdir "$cgroup" 2>/dev/null || true
	rm -rf "$temp"
}
trap clean EXIT

passed=0 failed=0
# check WHAT COMMAND... is one test.
check() {
	local what=$1
	shift
	if "$@" >"$temp/said" 2>&1; then
		passed=$((passed + 1))
		printf '  ok    %s\n' "$what"
	else
		failed=$((failed + 1))
		printf '  FAIL  %s\n' "$what"
		tail -n 20 "$temp/said" | sed 's/^/        /'
	fi
}

label() { [[ $(engine inspect --format "$(inspect_label "$2")" "$prefix$1:$tag") == "$3" ]]; }

# unpack IMAGE copies its files to temp/IMAGE.
unpack() {
	local id from
	mkdir "$temp/$1"
	if [[ $CONTAINER_TOOL == buildah ]]; then
		id=$(buildah from --pull-never "$prefix$1:$tag")
		from=$(buildah mount "$id")
		cp -a "$from/." "$temp/$1"
		buildah umount "$id" >/dev/null
		buildah rm "$id" >/dev/null
	else
		id=$(engine create "$prefix$1:$tag")
		engine export "$id" | tar -C "$temp/$1" -xf -
		engine rm "$id" >/dev/null
	fi
}

# programs IMAGE: its own program is the only one in it, and is static.
programs() {
	local found
	found=$(cd "$temp/$1" && find . -type f -perm /111)
	[[ $found == "./$1" ]] || {
		echo "programs: $found"
		return 1
	}
	! readelf --program-headers "$temp/$1/$1" | grep INTERP
}

# contained CAPABILITIES ARGUMENT... runs the tracer of its image.
contained() {
	local keep=$1 last drop=() bit name root=$temp/oom-tracer
	shift
	last=$(cat /proc/sys/kernel/cap_last_cap)
	for ((bit = 0; bit <= last; bit++)); do
		name=$(capsh "--decode=$(printf %x $((1 << bit)))")
		name=${name#*=cap_}
		[[ " ${keep,,} " == *" $name "* ]] || drop+=("cap_$name")
	done
	# As in a pod without hostPID: it is process 1 of its own namespace. The mounts are seen in there only, and
	# end with it.
	# shellcheck disable=SC2016 # the inner shell expands them
	exec unshare --mount --propagation private --pid --cgroup --fork --kill-child bash -euc '
		root=$1 drop=$2
		shift 2
		mount --bind "$root" "$root"
		mount -t proc proc "$root/proc"
		mount --rbind /sys "$root/sys"
		mount -t bpf bpf "$root/sys/fs/bpf"
		mount --bind "$root.state" "$root/var/lib/oom-tracer"
		mount --bind "$root.etc" "$root/etc/oom-tracer"
		mount -o remount,bind,ro "$root"
		if touch "$root/written" 2>/dev/null; then exit 99; fi
		exec capsh --chroot="$root" --inh= --drop="$drop" --no-new-privs --shell=/oom-tracer -- "$@"
	' bash "$root" "$(IFS=,; echo "${drop[*]}")" "$@"
}

# doctor_names CAPABILITY: without it, doctor says so, and fails if it must.
doctor_names() {
	local keep=" $CAPABILITIES " status=0
	keep=${keep/ $1 / }
	(contained "$keep" doctor --node-name image-test) >"$temp/doctor" 2>&1 || status=$?
	cat "$temp/doctor"
	case $1 in
	BPF | PERFMON) ((status == 1)) && grep -E "^fail  capabilities .*lacks .*CAP_$1 to" "$temp/doctor" ;;
	# Where this kernel shows its addresses to everyone, it is not needed, and doctor says that.
	SYS_RESOURCE) ((status == 0)) && grep -E "^warn  protection .*lacks CAP_SYS_RESOURCE to" "$temp/doctor" ;;
	SYSLOG) grep -E "^(warn  capabilities .*lacks .*CAP_SYSLOG to|ok    capabilities .*no need of CAP_SYSLOG)" "$temp/doctor" ;;
	esac
}

# --- what is in them

mapfile -t images < <(all_images)
check 'the Dockerfile has images' test "${#images[@]}" -gt 2
for image in "${images[@]}"; do
	unpack "$image"
	printf '  %s%s:%s: %d KiB\n' "$prefix" "$image" "$tag" "$(du -sk "$temp/$image" | cut -f1)"
	check "$image: its static program and no other, no shell" programs "$image"
	check "$image: has the roots of TLS" test -s "$temp/$image/etc/ssl/certs/ca-certificates.crt"
	check "$image: label of the version" label "$image" org.opencontainers.image.version "$VERSION"
	check "$image: label of the commit" label "$image" org.opencontainers.image.revision "$REVISION"
	check "$image: says the version" grep -F "$VERSION (revision $REVISION" <("$temp/$image/$image" --version)
done
check 'oom-tracer: label of the kernel' label oom-tracer oom-tracer.kernel.btf portable
for image in "${images[@]:1}"; do
	check "$image: label of no kernel" label "$image" oom-tracer.kernel.btf none
	check "$image: runs as a user that is nobody" chroot --userspec=65532:65532 "$temp/$image" "/$image" --version
done

# --- the tracer

mkdir -p "$temp"/oom-tracer/{proc,sys,var/lib/oom-tracer,etc/oom-tracer} "$temp"/oom-tracer.{state,etc}
cat >"$temp/oom-tracer.etc/config.yaml" <<'END'
nats: {embedded: {listen: "127.0.0.1:0"}}
metrics: {listen: ""}
END

check "doctor is content with $given" eval "(contained '$given' doctor --node-name image-test)"
sed 's/^/        /' "$temp/said" | cut -c 1-180
for capability in $CAPABILITIES; do
	check "doctor names CAP_$capability where it lacks" doctor_names "$capability"
	tail -n 1 "$temp/said" | sed 's/^/        /'
done

(contained "$given" --node-name image-test) >"$temp/tracer.out" 2>"$temp/tracer.log" &
tracer=$!
for ((i = 0; i < 300; i++)); do
	grep -q '"msg":"tracing"\|msg=tracing' "$temp/tracer.log" && break
	kill -0 "$tracer" 2>/dev/null || break
	sleep 0.1
done
check 'it runs with the capabilities of the manifest and no other' grep -E 'msg"?[:=]"?tracing' "$temp/tracer.log"
pid=$(pgrep -P "$tracer" || true)
# holds: the running tracer has what was given and no more.
holds() {
	local bits want
	bits=$(sed -n 's/^CapEff:[[:space:]]*//p' "/proc/$pid/status")
	grep -E '^(Cap|NoNewPrivs|Uid)' "/proc/$pid/status"
	cat "/proc/$pid/oom_score_adj"
	want=$(for capability in $given; do echo "cap_${capability,,}"; done | sort)
	diff <(echo "$want") <(capsh "--decode=$bits" | sed 's/.*=//' | tr ',' '\n' | sort) || return 1
	grep -qx $'NoNewPrivs:\t1' "/proc/$pid/status" || return 1
	[[ $given != *SYS_RESOURCE* || $(cat "/proc/$pid/oom_score_adj") == -998 ]]
}
check 'it has those capabilities and no other, no new privileges, and where it can oom_score_adj -998' holds
grep CapEff "$temp/said" | sed 's/^/        /' || true

# A kill in a cgroup of our own.
memory=/sys/fs/cgroup
limit=memory.max
if ! [[ -e $memory/cgroup.controllers ]] || ! grep -qw memory "$memory/cgroup.controllers"; then
	memory=$(awk '$3 == "cgroup" && $4 ~ /(^|,)memory(,|$)/ { print $2; exit }' /proc/mounts)
	limit=memory.limit_in_bytes
fi
[[ $limit == memory.max ]] && ! grep -qw memory "$memory/cgroup.subtree_control" && {
	echo "$0: the root cgroup does not hand on its memory controller" >&2
	exit 1
}
cgroup=$memory/oom-image-test-$$
mkdir "$cgroup"
echo $((16 << 20)) >"$cgroup/$limit"
HOG_CGROUP=$cgroup timeout 60 "$hog" 1 64 <<<x >"$temp/hog" 2>&1 || true
sed 's/^/        hog: /' "$temp/hog"
victim=$(grep -oE '[0-9]+' "$temp/hog" | head -n 1)
for ((i = 0; i < 100; i++)); do
	grep -q "hog\[$victim\]" "$temp/tracer.out" && break
	sleep 0.1
done
check "it reports the kill of hog[$victim], in its cgroup" grep -E "image-test +killed .* hog\[$victim\] .*/oom-image-test-$$" "$temp/tracer.out"
grep -F "hog[$victim]" "$temp/tracer.out" | sed 's/^/        /' || cat "$temp/tracer.log"

kill "$pid"
ended() {
	local status=0
	wait "$tracer" || status=$?
	tail -n 3 "$temp/tracer.log"
	((status == 0))
}
check 'it ends cleanly on SIGTERM' ended
tracer=''

# --- other kernels

"$here/../install-deps.sh" "$CACHE/libbpf-bookworm-backports" bpftool zstd lz4 xz=xz-utils busybox=busybox-static
fits() { "$temp/oom-tracer/oom-tracer" doctor --btf "$1"; }
KERNELS=${KERNELS:-5.10 newest} "$here/../vm/kernels.sh" >"$temp/kernels"
while read -r name directory <&3; do
	check "the kernel $name: its BTF is found" env KERNEL_IMAGE="$directory/vmlinuz" RAW="$temp/$name.btf" \
		"$here/../vmlinux.sh" "$(dpkg --print-architecture)" "$temp/$name"
	check "the kernel $name: the program fits it" fits "$temp/$name.btf"
	grep '^ok    relocations' "$temp/said" | sed 's/^/        /' || true
done 3<"$temp/kernels"

# rename OLD NEW: a kernel whose field is called otherwise has no such field. (The names lie in one string
# table, each between two zeros; the header and the sizes stay as they are.)
rename() {
	cp /sys/kernel/btf/vmlinux "$temp/without.btf"
	sed -i "s/\\x00$1\\x00/\\x00$2\\x00/" "$temp/without.btf"
	! cmp -s "$temp/without.btf" /sys/kernel/btf/vmlinux
}
# refused WORDS COMMAND... must fail with them.
refused() {
	local words=$1 status=0
	shift
	"$@" >"$temp/refused" 2>&1 || status=$?
	((status != 0)) && grep -E "$words" "$temp/refused" && return
	echo "exit status $status:"
	tail -n 20 "$temp/refused"
	return 1
}
image_for() { make -C "$here/../.." image KERNEL_BTF="$1" IMAGE_TAG="$tag" BASE="$BASE" CONTAINER_TOOL="$CONTAINER_TOOL"; }
shows() { sed 's/^ */        /' "$temp/said" | head -n 1; }

check 'a kernel is made that lacks oom_score_adj of signal_struct' rename oom_score_adj oom_score_old
check 'doctor refuses it, and names the field' refused 'lacks what .*struct signal_struct.oom_score_adj' fits "$temp/without.btf"
shows
check 'make image for it is refused, and names the field' refused "oom_score_adj' in 'struct signal_struct" image_for "$temp/without.btf"
shows
# Here the program has names of its own for what kernels call differently, so that it compiles for any.
check 'a kernel is made that lacks rss_stat of mm_struct' rename rss_stat rss_stot
check 'doctor refuses it, and names the field' refused 'lacks what .*struct mm_struct.*.rss_stat' fits "$temp/without.btf"
check 'make image for it is refused, and names the field' refused 'lacks what .*struct mm_struct.*.rss_stat' image_for "$temp/without.btf"
shows
check 'make image for this kernel' image_for /sys/kernel/btf/vmlinux
digest=$(sha256sum /sys/kernel/btf/vmlinux | cut -d' ' -f1)
tag+=-btf-${digest:0:12}
check 'oom-tracer: label of that kernel' label oom-tracer oom-tracer.kernel.btf "sha256:$digest"

# --- the descheduler

mkdir -p "$temp"/oom-descheduler{.etc,/etc/oom-descheduler}
cp "$here/../../deploy/descheduler/policy.yaml" "$temp/oom-descheduler.etc"
sed 's/maxAge:/maxage:/' "$temp/oom-descheduler.etc/policy.yaml" >"$temp/oom-descheduler.etc/mistyped.yaml"
cat >"$temp/oom-descheduler.etc/kubeconfig" <<'END'
{apiVersion: v1, kind: Config, current-context: a, contexts: [{name: a, context: {cluster: a, user: a}}],
 clusters: [{name: a, cluster: {server: "http://127.0.0.1:1"}}], users: [{name: a, user: {}}]}
END
# descheduler ARGUMENT... runs it as nobody, without a capability, with a root that cannot be written to, and without
# a network.
descheduler() {
	# shellcheck disable=SC2016 # the inner shell expands them
	timeout 60 unshare --mount --net --propagation private bash -euc '
		root=$1
		shift
		mount --bind "$root" "$root"
		mount --bind "$root.etc" "$root/etc/oom-descheduler"
		mount -o remount,bind,ro "$root"
		if touch "$root/written" 2>/dev/null; then exit 99; fi
		exec capsh --chroot="$root" --inh= --drop=all --no-new-privs --gid=65532 --groups=65532 --uid=65532 \
			--shell=/oom-descheduler -- "$@"
	' bash "$temp/oom-descheduler" "$@"
}
descheduler_with() {
	descheduler --kubeconfig=/etc/oom-descheduler/kubeconfig --policy-config-file="/etc/oom-descheduler/$1" \
		--descheduling-interval=1m --v=1
}
check 'oom-descheduler: says which descheduler it is' grep -E 'descheduler v0\.[0-9]+\.[0-9]+$' <(descheduler --version)
check 'it refuses a policy that is not there, and names it' refused 'failed to read policy config file .*/nowhere.yaml' descheduler_with nowhere.yaml
check 'it refuses a key that is none, and names it' refused 'unknown field .*maxage' descheduler_with mistyped.yaml
check 'it takes the policy that is shipped, and asks for the API server' refused 'dial tcp 127.0.0.1:1:.* unreachable' descheduler_with policy.yaml
check 'it serves its metrics meanwhile' grep -F 'Serving securely on [::]:10258' "$temp/refused"

echo "$passed passed, $failed failed (after $SECONDS s)"
((passed > 0 && failed == 0))
