# Sourced by the scripts that take a test program into a lab.
# shellcheck shell=bash

# executable NAME CARGO-ARGUMENTS...: has cargo build, and prints where the program is whose name matches.
executable() {
  local name=$1
  shift
  cargo "$@" --quiet --locked --message-format=json |
    sed -n "s,.*\"executable\":\"\([^\"]*/$name\)\".*,\1,p" | tail -n 1
}
