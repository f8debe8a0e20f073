#!/bin/bash
# The part of guest.sh that runs in the lab.
set -euo pipefail
cd "$(dirname "$0")"
modprobe vsock_loopback

# image NAME: an EROFS image of the directory of that name.
image() {
  mkfs.erofs --quiet "$1.erofs" "$1" >mkfs.log 2>&1 || {
    cat mkfs.log
    exit 1
  }
}

# A busybox system, what lies above it, one that means harm, and many small layers.
images() {
  local applet n
  mkdir -p base/{bin,dev,proc,sys,tmp,etc,ro,var/www,scratch} top
  cp "$(command -v busybox)" base/bin/busybox
  for applet in $(base/bin/busybox --list); do
    ln -s busybox "base/bin/$applet" 2>/dev/null || true
  done
  printf 'root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:web:/var/www:/bin/sh\n' >base/etc/passwd
  printf 'root:x:0:\nlog:x:4:web\nweb:x:33:\n' >base/etc/group
  printf 'not a program' >base/bin/garbage
  printf '#!/nonesuch\n' >base/bin/orphan
  chmod 755 base/bin/garbage base/bin/orphan
  echo base >base/layer
  echo old >base/gone
  ln -s /proc base/to-proc
  echo top >top/layer
  mknod top/gone c 0 0
  cp -a base hostile
  rmdir hostile/dev
  ln -s /run/bulkhead hostile/dev
  for n in base top hostile; do
    image "$n"
  done
  for n in {1..100}; do
    mkdir -p "many$n/many"
    touch "many$n/many/$n"
    image "many$n"
  done
}

images

# Slots from 4 on are loop devices; the kernel's partition scan and driver core are not what is tested here.
slots=$(mktemp -d)
number=4
truncate -s 64M scratch.ext4
mkfs.ext4 -q -F scratch.ext4
loops=()
for image in base.erofs top.erofs scratch.ext4 hostile.erofs many{1..100}.erofs; do
  loop=$(losetup --find --show "$image")
  loops+=("$loop")
  mkdir -p "$slots/virtio-mmio.$number/"{driver,"virtio$number/block/${loop#/dev/}"}
  number=$((number + 1))
done

unshare --pid --mount --fork --propagation private bash -c "
  mount --bind $slots /sys/bus/platform/devices
  mount -t proc proc /proc
  echo 0 >/sys/fs/cgroup/cgroup.procs
  exec $PWD/agent" &
unshare=$!
finish() {
  kill -9 "$AGENT_PID" 2>/dev/null || true
  wait "$unshare" 2>/dev/null || true
  losetup -d "${loops[@]}" || true
  # A test that failed has left its own.
  find /sys/fs/cgroup/bulkhead -depth -type d -exec rmdir {} \; || true
}
AGENT_PID=
trap finish EXIT
for _ in {1..100}; do
  AGENT_PID=$(cat "/proc/$unshare/task/$unshare/children" | tr -d ' ')
  [[ -z $AGENT_PID || $(readlink "/proc/$AGENT_PID/exe") != "$PWD/agent" ]] || break
  sleep 0.1
done
export AGENT_PID
sleep 1
# One that could not have its ports is gone by now.
kill -0 "$AGENT_PID"
# There is no virtio-fs device. What stands for it, from then on: the tests put files and directories there; one is a root.
no_device=runtime::shares::nothing_is_shared_without_a_device
./guest --ignored --exact "$no_device"
mkdir -p "/proc/$AGENT_PID/root/run/bulkhead/shares"
nsenter --target "$AGENT_PID" --mount mount -t tmpfs -o mode=755 shares /run/bulkhead/shares
cp -a base "/proc/$AGENT_PID/root/run/bulkhead/shares/root"
status=0
./guest --ignored --test-threads=1 --skip "$no_device" "$@" || status=$?
dmesg | grep bulkhead-agent | tail -40 || true
exit "$status"
