#!/usr/bin/env bash
# Makes the disk of the node that test-node boots, if it is not there yet, and prints the directory with it: root.img
# (Debian trixie, systemd, containerd, runc, CNI, kubelet, kube-proxy), vmlinuz and initrd (a stock kernel of
# bookworm-backports), programs (containerd and ctr for this machine) and packages (what they came in).
#
#   tools/node/root.sh KUBE_NODE_DIR
#
# Needs root. It is kept in the user's cache directory under a hash of what made it; 2 minutes the first time, and
# some seconds where only files/ has changed.
set -euo pipefail

kube=$1
here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/oom-tracer
hash=$(cat "$0" "$here/init.sh" <(echo "$kube") | sha256sum | cut -c1-12)
dir=$cache/node-$hash
mkdir -p "$cache"
exec 9>"$cache/.node.lock"
flock 9
say() { echo "==> $* (after $SECONDS s)" >&2; }

# make_root TEMP makes all but the disk itself.
make_root() {
	local temp=$1
	local root=$temp/root uri include release block unit file
	uri=$("$here/../fetch-deb.sh" --mirror debian)

	say "node disk: debootstrap trixie, once"
	include=apparmor,ca-certificates,conntrack,dbus,ethtool,iproute2,iptables,kmod,libseccomp2,mount,netbase,nftables,procps,socat,systemd-sysv,udev
	if ! debootstrap --variant=minbase --keyring=/usr/share/keyrings/debian-archive-keyring.gpg --include=$include \
		trixie "$root" "$uri" >"$temp/log" 2>&1; then
		tail -n 20 "$temp/log" >&2
		exit 1
	fi
	rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}

	say "node disk: containerd, runc and CNI plugins of sid"
	"$here/../fetch-deb.sh" sid "$temp/sid" containerd runc containernetworking-plugins
	mv "$temp/sid/.packages" "$temp/packages"
	rm -rf "$temp/sid/usr/share"
	cp -a "$temp/sid/." "$root"

	say "node disk: kernel of bookworm-backports"
	"$here/../fetch-deb.sh" bookworm-backports "$temp/kernel" linux-image-cloud-amd64
	cat "$temp/kernel/.packages" >>"$temp/packages"
	release=$(basename "$temp"/kernel/lib/modules/*)
	mv "$temp/kernel/boot/vmlinuz-$release" "$temp/vmlinuz"
	cp -a "$temp/kernel/lib/modules" "$root/usr/lib/"
	chroot "$root" depmod "$release"

	# The initramfs finds the disk. All else that it takes to mount it is built into the kernel.
	mkdir -p "$temp/initrd/bin"
	cp "$(command -v busybox)" "$temp/initrd/bin/busybox"
	cp "$here/init.sh" "$temp/initrd/init"
	chmod 755 "$temp/initrd/init"
	block=$(find "$root/usr/lib/modules" -name 'virtio_blk.ko*')
	case $block in
	*.xz) xz -dc "$block" ;;
	*.zst) zstd -qdc "$block" ;;
	*) cat "$block" ;;
	esac >"$temp/initrd/virtio_blk.ko"
	(cd "$temp/initrd" && find . | cpio -o -H newc --quiet | gzip -1) >"$temp/initrd.gz"

	say "node disk: kubelet, kube-proxy and settings"
	install -m 755 "$kube/kubelet" "$kube/kube-proxy" "$root/usr/local/bin/"
	mkdir -p "$root/etc/kubernetes/manifests" "$root/var/lib/nats-volume" "$root/var/lib/kubelet"
	chmod 777 "$root/var/lib/nats-volume"
	# The node is who it is from boot to boot; nobody logs in.
	printf 'deadbeefdeadbeefdeadbeefdeadbeef\n' >"$root/etc/machine-id"
	for unit in node-setup node-shell containerd kubelet kube-proxy; do
		mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
		file=/etc/systemd/system/$unit.service
		[[ -e $here/files$file ]] || file=/usr/lib/systemd/system/$unit.service
		ln -sf "$file" "$root/etc/systemd/system/multi-user.target.wants/$unit.service"
	done
	# What costs an emulated CPU time and does nothing for a node.
	for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer \
		getty@tty1.service serial-getty@ttyS0.service man-db.timer systemd-tmpfiles-clean.timer; do
		ln -sf /dev/null "$root/etc/systemd/system/$unit"
	done

	mkdir "$temp/programs"
	cp -a "$root/usr/bin/containerd" "$root/usr/bin/ctr" "$temp/programs/"
	cp -aL "$root"/lib64/ld-linux-x86-64.so.2 "$root"/usr/lib/x86_64-linux-gnu/lib{c,m,resolv,pthread,dl,seccomp}.so.* "$temp/programs/"
	rm -rf "$temp/sid" "$temp/kernel" "$temp/initrd" "$temp/log"
	mv "$temp/initrd.gz" "$temp/initrd"
	echo "linux $release" >>"$temp/packages"
	chmod 755 "$temp"
}

if [[ ! -d $dir ]]; then
	temp=$(mktemp -d "$cache/.node-XXXXXX")
	trap 'rm -rf "$temp"' EXIT
	make_root "$temp"
	mv -T "$temp" "$dir"
	# Those that were made otherwise are of no use any more.
	find "$cache" -maxdepth 1 -name 'node-????????????' ! -path "$dir" -exec rm -rf {} +
fi
if [[ ! -e $dir/root.img || -n $(find "$here/files" -newer "$dir/root.img") ]]; then
	say "node disk: ext4"
	cp -r --preserve=mode "$here/files/." "$dir/root"
	rm -f "$dir"/root.img "$dir"/.root.img
	truncate -s 8G "$dir/.root.img"
	mkfs.ext4 -q -F -E root_owner=0:0 -O ^has_journal -d "$dir/root" "$dir/.root.img"
	mv "$dir/.root.img" "$dir/root.img"
	say "node disk: done"
fi
echo "$dir"
