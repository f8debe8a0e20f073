# Where the things run that need KVM: here, or in the lab. Sourced by demo, run, soak and bench.
# shellcheck shell=bash disable=SC2034

cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.." || exit 1
target=${CARGO_TARGET_DIR:-$PWD/target}
stage=$target/stage

# kvm_problem: prints what keeps this machine from running guests itself, or nothing.
kvm_problem() {
  local report
  if ((EUID != 0)); then
    echo "not root"
  elif ! report=$(BULKHEAD_LIBEXEC=$stage/usr/local/libexec/bulkhead BULKHEAD_SHARE=$stage/usr/local/share/bulkhead \
    "$stage/usr/local/bin/bulkhead" check 2>&1); then
    # The first failure, or what kept the check from running at all.
    { sed -nE 's/^FAILURE +//p' <<<"$report"; echo "$report"; } | sed -n 1p
  fi
}

# choose_machine: sets $where to `here` or `lab`, and says why.
choose_machine() {
  local problem
  problem=$(kvm_problem)
  if [[ -z $problem ]]; then
    where=here
    echo "Running on this machine's own KVM."
  else
    where=lab
    echo "Running in the lab, an emulated machine that has KVM, because this one will not do: $problem"
  fi
}

# containerd_suite NAME [OPTION...]: the suite of the containerd runtime, or a part of it, with the containerd that there is. Uses count.sh.
containerd_suite() {
  local name=$1
  shift
  if [[ $where == lab ]] || command -v containerd >/dev/null; then
    suite "$name" with_kvm /usr/local/libexec/bulkhead-tests/containerd-suite "$@"
  else
    skipped "$name" "it is not installed"
  fi
}

# containerd_2_suite NAME [OPTION...]: the same with Debian forky's containerd 2.1, which is only to be had in the lab.
containerd_2_suite() {
  local name=$1
  shift
  where=lab BULKHEAD_LAB_RELEASE=forky suite "$name" with_kvm /usr/local/libexec/bulkhead-tests/containerd-suite "$@"
}

# with_kvm COMMAND...: runs a command, given by its path in the stage, where KVM is.
with_kvm() {
  if [[ $where == here ]]; then
    local command=$1
    shift
    BULKHEAD_PREFIX=$stage/usr/local PATH=$stage/usr/local/bin:$PATH "$stage$command" "$@"
  else
    in_lab "$@" || case $? in
      # Its machine hung (timeout) or ended (ssh): that says nothing about what ran in it.
      124 | 255)
        echo "once more, because the lab was lost"
        in_lab "$@"
        ;;
      *) return $? ;;
    esac
  fi
}

# in_lab COMMAND...: in a lab of its own, for an hour at most.
in_lab() {
  BULKHEAD_ARTIFACTS=$stage timeout --foreground --kill-after=60 3600 \
    tests/lab/lab run env BULKHEAD_RUNTIME="${BULKHEAD_RUNTIME:-io.containerd.bulkhead.v2}" "$@"
}
