#!/bin/busybox sh
# shellcheck shell=dash
#
# /init of the node's initramfs: mounts the disk and starts its systemd.
/bin/busybox insmod /virtio_blk.ko
/bin/busybox mkdir /proc /dev /root
/bin/busybox mount -t devtmpfs devtmpfs /dev
until [ -b /dev/vda ]; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 /dev/vda /root || /bin/busybox poweroff -f
exec /bin/busybox switch_root /root /lib/systemd/systemd
