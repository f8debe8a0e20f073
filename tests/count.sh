# Runs checks and suites and adds up what passed and failed. Sourced by run and soak, which end with `finish`.
# shellcheck shell=bash

log=$(mktemp)
trap 'rm -f "$log"' EXIT
passed=0 failed=0

# check NAME COMMAND...: one check that has no count of its own.
check() {
  local name=$1
  shift
  if "$@" >"$log" 2>&1; then
    echo "ok: $name"
    passed=$((passed + 1))
  else
    cat "$log"
    echo "FAILED: $name"
    failed=$((failed + 1))
  fi
}

# suite NAME COMMAND...: a command that closes with counts, cargo's, libtest's or ours, which are added up.
suite() {
  local name=$1 code counts
  shift
  echo "running: $name"
  "$@" 2>&1 | tee "$log" | grep -E --line-buffered -A4 '^---- |^test .*FAILED|^FAIL |^(error|thread|skipped|once more)|panicked|^test result|^lab:'
  code=${PIPESTATUS[0]}
  counts=$(sed -nE 's/^(test result: .* )?([0-9]+) passed[;,] ([0-9]+) failed.*/\2 \3/p' "$log" | awk '{p += $1; f += $2} END {print p + 0, f + 0}')
  passed=$((passed + ${counts% *})) failed=$((failed + ${counts#* }))
  if ((code != 0)) && [[ ${counts#* } == 0 ]]; then
    tail -n 40 "$log"
    echo "FAILED: $name ended with exit code $code"
    failed=$((failed + 1))
  fi
}

# skipped NAME WHY
skipped() {
  echo "skipped: $1 ($2)"
}

# finish: the last line, and the exit code.
finish() {
  echo "$passed passed, $failed failed"
  ((failed == 0))
}
