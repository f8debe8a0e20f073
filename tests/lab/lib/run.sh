# One command in a lab of its own, of which nothing stays but, on failure, the logs.
# shellcheck shell=bash disable=SC2154

# keep_logs NAME: saves what tells why something failed, and says where.
keep_logs() {
  local dir
  [[ -d $lab/vm ]] || return 0
  dir=$target/lab-logs/$(date +%Y%m%d-%H%M%S)-$1-$$
  mkdir -p "$dir"
  if alive; then
    (remote -n -- dmesg) >"$dir/dmesg.log" 2>&1 &
    (remote -n -- tar -C /var -cf - log) 2>/dev/null | tar -xf - -C "$dir" --no-same-owner 2>/dev/null || true
    wait $! || true
  fi
  cp "$lab"/vm/*.log "$dir"
  say "logs are kept in $dir"
}

# A lab whose keeper was killed together with its owner has left an empty shell behind.
sweep() {
  local left
  for left in "$target"/lab/run.*/; do
    [[ -e $left/vm/keeper ]] || continue
    (lab=${left%/} && ! alive && rm -rf "$left") || true
  done
}

run() {
  local code=0 child=
  sweep
  mkdir -p "$target/lab"
  lab=$(mktemp -d "$target/lab/run.XXXXXX")
  trap 'down; rm -rf "$lab"' EXIT
  # A trap runs as soon as `wait` is interrupted; the command itself is left to the machine's end.
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  up $$
  (remote -- "$@") <&0 &
  child=$!
  wait "$child" || code=$?
  ((code == 0)) || keep_logs run
  exit "$code"
}
