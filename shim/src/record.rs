//! What is written down of a shim and its VMM, so that `delete` finds them, and never takes another process for them.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Name of the VMM's record in the pod's directory.
pub(crate) const VMM: &str = "vmm";
/// And of the file server's.
pub(crate) const FILE_SERVER: &str = "fs";
/// Longest record that is read, in bytes.
const RECORD_MAX: usize = 64;

/// A process, told from a later one with the same id by the time of its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Recorded {
    pid: i32,
    /// Ticks between the host's boot and the start of the process.
    started: u64,
}

impl Recorded {
    /// A process that runs.
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).map_err(io::Error::other)?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let started = started(&stat).ok_or_else(|| io::Error::other("/proc/PID/stat has no start time"))?;
        Ok(Self { pid, started })
    }

    fn parse(text: &str) -> Option<Self> {
        let (pid, started) = text.trim_end().split_once(' ')?;
        Some(Self { pid: pid.parse().ok().filter(|pid| *pid > 0)?, started: started.parse().ok()? })
    }

    /// What tells the end of the process, if it still runs.
    pub(crate) fn open(self) -> Option<OwnedFd> {
        // First the descriptor, then the look: whom it stands for cannot change any more.
        let pidfd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        (Self::of(self.pid()).ok()? == self).then_some(pidfd)
    }

    /// Kills the process if it still runs. Returns what tells its end.
    pub(crate) fn kill(self) -> Option<OwnedFd> {
        let pidfd = self.open()?;
        pidfd_send_signal(&pidfd, Signal::KILL).ok()?;
        Some(pidfd)
    }

    /// Its process id.
    pub(crate) fn pid(self) -> u32 {
        self.pid.unsigned_abs()
    }

    /// As a record's line.
    pub(crate) fn line(self) -> String {
        format!("{} {}\n", self.pid, self.started)
    }
}

/// Field 22 of /proc/PID/stat (`man 5 proc_pid_stat`). The second is the name in parentheses, in which anything may be.
fn started(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// Writes down a process of a pod.
pub(crate) fn write(directory: &Path, name: &str, pid: u32) -> io::Result<()> {
    fs::write(directory.join(name), Recorded::of(pid)?.line())
}

/// The process of a record.
pub(crate) fn read(path: &Path) -> Option<Recorded> {
    let text = fs::read_to_string(path).ok().filter(|text| text.len() <= RECORD_MAX)?;
    Recorded::parse(&text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_recorded_process_is_killed_and_a_later_one_with_its_id_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        write(directory.path(), VMM, child.id()).unwrap();
        let recorded = read(&directory.path().join(VMM)).unwrap();
        let later = Recorded { started: recorded.started - 1, ..recorded };
        assert!(later.kill().is_none());
        assert!(child.try_wait().unwrap().is_none());
        assert!(recorded.kill().is_some());
        assert_eq!(child.wait().unwrap().signal(), Some(9));
        assert!(recorded.kill().is_none());
    }

    #[test]
    fn the_name_of_a_process_does_not_hide_its_start() {
        let fields = (3..=22).map(|n| n.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(started(&format!("7 (a) b (c)) {fields} 0")), Some(22));
        assert_eq!(started("7 (a) S 1"), None);
    }

    proptest! {
        #[test]
        fn a_damaged_record_is_none_or_a_process(text in "\\PC{0,70}") {
            if let Some(recorded) = Recorded::parse(&text) {
                prop_assert!(recorded.pid > 0);
            }
        }
    }
}
