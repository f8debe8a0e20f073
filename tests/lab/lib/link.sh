# The way in: ssh over a virtio-serial port. One connection is made when the machine starts (its being there is what
# "ready" means), all commands are sessions of it: no network, no port numbers, one key exchange.
# shellcheck shell=bash disable=SC2154,SC2016,SC2164

ssh_options=(
  -F none -S ctl -o LogLevel=ERROR -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null
  # What costs least in an emulated guest.
  -o KexAlgorithms=curve25519-sha256 -o Ciphers=aes128-gcm@openssh.com
)

# Replaces the calling process, which is in the lab's vm directory.
connect() {
  exec setpriv --pdeathsig KILL ssh "${ssh_options[@]}" -M -N -i image/key \
    -o ProxyCommand='socat - UNIX-CONNECT:link,retry=100,interval=0.05' \
    -o PermitLocalCommand=yes -o LocalCommand='echo ready' root@lab </dev/null
}

# A session never makes a connection of its own.
session() {
  alive || die "no lab is up in $lab"
  cd "$lab/vm"
  exec ssh "${ssh_options[@]}" -o ProxyCommand=false "$@"
}

# remote COMMAND...: replaces the calling process by one that runs COMMAND in the lab, byte for byte and
# with its exit code; 128+n if a signal ended it, 255 if the lab was lost.
remote() {
  local command
  # The shell stays to turn a signal into an exit code, and must not comment on it.
  printf -v command '%q ' "$@"
  session root@lab "exec 3>&2 2>/dev/null; env -- $command 2>&3 3>&-; exit \$?"
}

shell() {
  session -t root@lab
}

# Both copy with modes, links and holes; DST is a directory, made if it is not there.
push() {
  local destination=${*: -1} sources=() source
  (($# >= 2)) || usage
  for source in "${@:1:$#-1}"; do
    sources+=(-C "$(realpath -s "$(dirname "$source")")" "$(basename "$source")")
  done
  tar --sparse --owner=0 --group=0 --numeric-owner -cf - "${sources[@]}" |
    (remote sh -c 'mkdir -p "$1" && exec tar -xf - -C "$1" --no-overwrite-dir --keep-directory-symlink' push "$destination")
}

pull() {
  local destination=${*: -1}
  (($# >= 2)) || usage
  mkdir -p "$destination"
  (remote sh -c 'for path; do set -- "$@" -C "$(dirname "$path")" "$(basename "$path")"; shift; done; exec tar --sparse -cf - "$@"' \
    pull "${@:1:$#-1}") </dev/null | tar -xf - -C "$destination" --no-same-owner
}

push_artifacts() {
  [[ -n ${BULKHEAD_ARTIFACTS:-} ]] || return 0
  tar --sparse --owner=0 --group=0 --numeric-owner -C "$BULKHEAD_ARTIFACTS" -cf - . |
    (remote tar -xf - -C / --no-overwrite-dir --keep-directory-symlink)
}
