#!/bin/bash
# Runs the ignored tests of guest.rs in a lab of their own: against the agent as process 1 of namespaces of its own, with the
# kernel's vsock loopback for the host and loop devices in the places of virtio-mmio slots. Arguments go to the test program.
set -euo pipefail
here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
root=$(realpath "$here/../..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"

# shellcheck source=../../tests/executable.sh
. tests/executable.sh
mkdir -p "$work/opt/agent"
strip -o "$work/opt/agent/agent" "$(executable bulkhead-agent build -p bulkhead-agent --features loopback)"
strip -o "$work/opt/agent/guest" "$(executable 'guest-[^"]*' test -p bulkhead-agent --test guest --no-run)"
cp "$here/in-lab.sh" "$work/opt/agent"
BULKHEAD_ARTIFACTS=$work tests/lab/lab run bash /opt/agent/in-lab.sh "$@"
