#!/bin/bash
# The part of guest.sh that runs in the lab.
set -euo pipefail
cd /dev/shm
modprobe vsock_loopback

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
  exec /dev/shm/agent" &
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
  [[ -z $AGENT_PID || $(readlink "/proc/$AGENT_PID/exe") != /dev/shm/agent ]] || break
  sleep 0.1
done
export AGENT_PID
sleep 1
# One that could not have its ports is gone by now.
kill -0 "$AGENT_PID"
status=0
./guest --ignored --test-threads=1 "$@" || status=$?
dmesg | grep bulkhead-agent | tail -40 || true
exit "$status"
