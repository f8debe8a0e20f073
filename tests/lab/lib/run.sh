# One command in a lab of its own, of which nothing stays but, on failure, the logs.
# shellcheck shell=bash disable=SC2154

# keep_logs NAME: saves what tells why something failed, and says where.
keep_logs() {
  local dir
  [[ -d $lab/vm ]] || return 0
  dir=$target/lab-logs/$(date +%Y%m%d-%H%M%S)-$1-$$
  mkdir -p "$dir"
  cp "$lab"/vm/*.log "$dir"
  if alive; then
    ask_guest dmesg >"$dir/dmesg.log" || true
    ask_guest tar -C /var -cf - log | tar -xf - -C "$dir" --no-same-owner || true
  fi
  say "logs are kept in $dir"
}

# A broken guest may not answer.
ask_guest() {
  BULKHEAD_LAB=$lab timeout 20 "$here/lab" exec "$@" </dev/null 2>/dev/null
}

# A lab whose keeper was killed together with its owner has left an empty shell behind.
sweep() {
  local left
  for left in "$target"/lab/run.*/; do
    [[ -e $left/vm/keeper ]] || continue
    (lab=${left%/} && ! alive keeper && rm -rf "$left") || true
  done
}

run() {
  local code=0 child=
  sweep
  mkdir -p "$target/lab"
  lab=$(mktemp -d "$target/lab/run.XXXXXX")
  trap 'kill ${child:-} 2>/dev/null || true; down; rm -rf "$lab"' EXIT
  # A trap runs as soon as `wait` is interrupted; the command itself is left to the machine's end.
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  up $$
  (remote "$@") <&0 &
  child=$!
  wait "$child" || code=$?
  ((code == 0)) || keep_logs run
  exit "$code"
}
