//! An end for guests that hang. The lab's QEMU delivers an interrupt that KVM injects a second time when its instruction counter
//! has run out meanwhile: the guest then now and then waits for a lock that it holds itself (docs/lab.md). It is not the fault of
//! what is measured, and would keep the benchmark from ending.

use std::fs::{read_dir, read_to_string};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use bulkhead_tests::vm::Result;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Several times what the slowest thing takes that starts a machine, and minutes on a host that emulates a guest that spins.
const DEADLINE: Duration = Duration::from_secs(3);

/// What a machine's process is called; the kernel cuts names at 15 bytes.
const MACHINES: [&str; 2] = ["bulkhead-vmm", "qemu-system-x86"];

/// Does something, and ends the machine that was started last when it takes too long. Says whether it had to.
pub(crate) fn watched<T>(action: impl FnOnce() -> Result<T>) -> (Result<T>, bool) {
    let (done, watch) = channel::<()>();
    let dog = thread::spawn(move || {
        let hung = matches!(watch.recv_timeout(DEADLINE), Err(RecvTimeoutError::Timeout));
        if hung && let Some(pid) = youngest_machine() {
            // It may just have ended by itself.
            let _ = kill(pid, Signal::SIGKILL);
        }
        hung
    });
    let result = action();
    drop(done);
    (result, dog.join().unwrap_or(false))
}

fn youngest_machine() -> Option<Pid> {
    let processes = read_dir("/proc").ok()?.filter_map(std::result::Result::ok);
    let stats = processes.filter_map(|entry| read_to_string(entry.path().join("stat")).ok());
    stats.filter_map(|stat| machine(&stat)).max().map(|(_, pid)| Pid::from_raw(pid))
}

/// Start time and process id, if a `/proc/PID/stat` is that of a machine.
fn machine(stat: &str) -> Option<(u64, i32)> {
    let (pid, rest) = stat.split_once(" (")?;
    let (name, rest) = rest.rsplit_once(") ")?;
    // The 22nd field of all; `rest` begins with the third.
    let started = rest.split(' ').nth(19)?.parse().ok()?;
    MACHINES.contains(&name).then_some((started, pid.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_known_by_their_name() {
        let stat = |name: &str| {
            format!("706 ({name}) S 705 706 682 0 -1 64 22 0 0 0 208 0 0 0 20 0 4 0 7793775 1214590976 13772")
        };
        assert_eq!(machine(&stat("bulkhead-vmm")), Some((7_793_775, 706)));
        assert_eq!(machine(&stat("qemu-system-x86")), Some((7_793_775, 706)));
        assert_eq!(machine(&stat("bulkhead")), None);
    }

    #[test]
    fn what_is_done_in_time_is_not_said_to_have_hung() {
        let (result, hung) = watched(|| Ok(7));
        assert_eq!((result.unwrap(), hung), (7, false));
    }
}
