# The running machine: its keeper, its state directory, up, down and status.
#
# A lab is a directory. `lock` in it is held by the keeper, a process that owns QEMU and the ssh connection: if one of
# them ends, it ends the other, and tidies up the directory `vm`. If the keeper itself is killed, the kernel kills both
# (PR_SET_PDEATHSIG), and whoever comes next finds the lock free, hence the directory stale.
# shellcheck shell=bash disable=SC2154,SC2054,SC2164

# Whether commands can be run; with "keeper", whether it has a keeper, if only a starting one.
alive() {
  [[ -e $lab/vm/${1:-ctl} ]] && ! flock --shared --nonblock "$lab/lock" true
}

qemu_command() {
  local image=$1 cmdline="console=ttyS0 panic=-1 lab.boot=$boot"
  # QEMU 7.2 takes the flags that cmpxchg16b leaves from the wrong instruction. An interrupt right after it then saves rubbish in
  # EFLAGS, and whoever was interrupted goes on in single steps or without interrupts. Kernels do without where the CPU has none.
  local cpu=EPYC,+svm,+npt,-cx16
  # Random addresses are what differs most between two runs of a short program.
  [[ $boot != bench ]] || cmdline+=" nokaslr norandmaps"
  qemu=(
    qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none -name "bulkhead-lab"
    -machine q35 -cpu $cpu -m "${BULKHEAD_LAB_MEMORY:-6G}"
    -kernel "$image/vmlinuz" -initrd "$image/initrd"
    -append "$cmdline ${BULKHEAD_LAB_CMDLINE:-}"
    -serial file:console.log
    -monitor unix:monitor,server=on,wait=off
    -device virtio-rng
    -drive "file=$image/root.img,format=raw,if=none,id=root,snapshot=on" -device virtio-blk,drive=root
    -device virtio-serial -chardev socket,id=link,path=link,server=on,wait=on
    -device virtserialport,chardev=link,name=lab.link
  )
  if [[ -e artifacts.tar ]]; then
    qemu+=(
      -drive file=artifacts.tar,format=raw,if=none,id=artifacts,readonly=on
      -device virtio-blk,drive=artifacts,serial=artifacts
    )
  fi
  case $boot in
    # With two CPUs, QEMU now and then forgets to open one of them to interrupts again after a guest has run on it.
    test) qemu+=(-accel tcg,thread=multi -smp "${BULKHEAD_LAB_CPUS:-1}") ;;
    # One instruction is one nanosecond; when idle the clock jumps to the next timer.
    bench) qemu+=(-accel tcg -icount shift=0,sleep=off -smp 1) ;;
  esac
}

# keeper IMAGE BOOT OWNER: runs in a process of its own, prints "ready", and stays until the machine ends. With OWNER
# not 0 it was started to get SIGTERM when that process dies.
keeper() {
  local image=$1 boot=$2 owner=$3 qemu asked=
  exec {lock}>"$lab/lock"
  flock --timeout 5 "$lock" || die "another keeper is at work in $lab"
  rm -rf "$lab/vm"
  mkdir "$lab/vm"
  cd "$lab/vm"
  exec 2>keeper.log
  trap 'asked=1; exit 143' TERM INT HUP
  trap clean_up EXIT
  # The owner may have died before this process asked to be told.
  ((owner == 0 || owner == PPID)) || kill -TERM "$BASHPID"
  ln -s "$image" image
  echo "$boot" >boot
  echo "$BASHPID" >keeper
  if [[ -n ${BULKHEAD_ARTIFACTS:-} ]]; then
    tar --owner=0 --group=0 --numeric-owner --sparse -C "$BULKHEAD_ARTIFACTS" -cf artifacts.tar .
  fi
  qemu_command "$image"
  setpriv --pdeathsig KILL "${qemu[@]}" </dev/null >qemu.log 2>&1 {lock}>&- &
  echo $! >qemu
  connect {lock}>&- &
  wait -n
}

# A machine that ended though nobody asked leaves its logs.
clean_up() {
  # shellcheck disable=SC2046
  kill -KILL $(jobs -p) 2>/dev/null || true
  wait
  if [[ -n $asked ]]; then
    rm -rf "$lab/vm"
  else
    find "$lab/vm" -mindepth 1 ! -name '*.log' -delete
  fi
}

up() {
  local owner=$1 image line keeper_out guard
  if [[ -n ${BULKHEAD_ARTIFACTS:-} ]]; then
    [[ -d $BULKHEAD_ARTIFACTS ]] || die "BULKHEAD_ARTIFACTS=$BULKHEAD_ARTIFACTS: no such directory"
    # The keeper works elsewhere.
    BULKHEAD_ARTIFACTS=$(realpath "$BULKHEAD_ARTIFACTS")
  fi
  mkdir -p "$lab"
  # Whoever comes while another boots the lab waits for that.
  exec {guard}>"$lab/up"
  flock "$guard"
  if alive; then
    [[ $(<"$lab/vm/boot") == "$boot" ]] || die "a lab is up, but for $(<"$lab/vm/boot"); take it down first"
    push_artifacts
    return
  fi
  need qemu-system-x86_64 socat ssh setpriv setsid flock
  image=$(setpriv --pdeathsig KILL "$here/lab" build) || die "there is no disk image to boot"
  exec {keeper_out}< <(start_keeper "$image" "$owner" {guard}>&-)
  if ! read -r -t "${BULKHEAD_LAB_TIMEOUT:-120}" line <&"$keeper_out" || [[ $line != ready ]]; then
    keep_logs boot
    down
    die "the machine did not come up"
  fi
  exec {keeper_out}<&- {guard}>&-
}

start_keeper() {
  local image=$1 owner=$2 death=()
  ((owner == 0)) || death=(setpriv --pdeathsig TERM)
  BULKHEAD_LAB=$lab exec setsid "${death[@]}" "$here/lab" keeper "$image" "$boot" "$owner" </dev/null
}

down() {
  if alive keeper; then
    kill -TERM "$(<"$lab/vm/keeper")" 2>/dev/null || true
    # Free once the keeper has cleaned up and gone.
    flock --shared "$lab/lock" true
  fi
  rm -rf "$lab/vm"
}

status() {
  if ! alive; then
    echo "down"
    return 3
  fi
  echo "up, $(<"$lab/vm/boot") boot, QEMU process $(<"$lab/vm/qemu"), state in $lab"
}
