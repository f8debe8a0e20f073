#!/bin/bash
# Runs the ignored tests of guest.rs in the lab: against the agent as process 1 of namespaces of its own, with the kernel's
# vsock loopback for the host and loop devices in the places of virtio-mmio slots. Arguments go to the test program.
set -euo pipefail
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
root=$(realpath "$here/../..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# EROFS images of a busybox system and of what lies above it.
images() {
  local base=$work/base top=$work/top hostile=$work/hostile applet image n
  mkdir -p "$base"/{bin,dev,proc,sys,tmp,etc,ro,var/www,scratch} "$top" "$hostile"
  cp "$(command -v busybox)" "$base/bin/busybox"
  for applet in $("$base/bin/busybox" --list); do
    ln -s busybox "$base/bin/$applet" 2>/dev/null || true
  done
  printf 'root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:web:/var/www:/bin/sh\n' >"$base/etc/passwd"
  printf 'root:x:0:\nlog:x:4:web\nweb:x:33:\n' >"$base/etc/group"
  printf 'not a program' >"$base/bin/garbage"
  printf '#!/nonesuch\n' >"$base/bin/orphan"
  chmod 755 "$base/bin/garbage" "$base/bin/orphan"
  echo base >"$base/layer"
  echo old >"$base/gone"
  echo top >"$top/layer"
  mknod "$top/gone" c 0 0
  cp -a "$base/." "$hostile"
  rmdir "$hostile/dev"
  ln -s /run/bulkhead "$hostile/dev"
  for image in base top hostile; do
    image "$image"
  done
  for n in {1..100}; do
    mkdir -p "$work/many$n/many"
    touch "$work/many$n/many/$n"
    image "many$n"
  done
}

image() {
  mkfs.erofs --quiet "$work/$1.erofs" "$work/$1" >"$work/log" 2>&1 || {
    cat "$work/log"
    exit 1
  }
}

build() {
  cargo build --quiet -p bulkhead-agent --features loopback --target-dir "$root/target/agent-loopback"
  strip -o "$work/agent" "$root"/target/agent-loopback/x86_64-unknown-linux-gnu/debug/bulkhead-agent
  local program
  program=$(cargo test --quiet -p bulkhead-agent --test guest --no-run --message-format=json |
    sed -n 's,.*"executable":"\([^"]*/guest-[^"]*\)".*,\1,p' | tail -1)
  strip -o "$work/guest" "$program"
}

images
build
cp "$here/in-lab.sh" "$work"
"$root/tests/lab/lab" up
"$root/tests/lab/lab" push "$work"/{agent,guest,in-lab.sh} "$work"/*.erofs /dev/shm
"$root/tests/lab/lab" exec -- bash /dev/shm/in-lab.sh "$@"
