//! The process `bulkhead-vmm`: how it is started, told apart from others and brought to its end.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use bulkhead_vmm::control::socket::{ControlSocket, SocketError};
use rustix::process::geteuid;

use crate::process::{Launch, Place, Process, ProcessError};
use crate::uid::UidLease;

/// Why there is no VMM.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// No control socket.
    #[error("cannot make the VMM's control socket")]
    Socket(#[from] SocketError),
    /// No process.
    #[error("the VMM {0}")]
    Process(PathBuf, #[source] ProcessError),
}

/// How a VMM is locked up.
#[derive(Debug)]
pub struct Jail<'a> {
    /// Whom it runs as. Only root can say so; without it the VMM keeps the caller's uid.
    pub uid: Option<&'a UidLease>,
    /// An empty directory that becomes its root.
    pub root: &'a Path,
    /// Its network namespace.
    pub network: Place,
    /// The directory of its cgroup, opened.
    pub cgroup: Option<&'a File>,
}

/// A running VMM. Dropped, it is killed.
#[derive(Debug)]
pub struct VmmProcess(Process);

impl VmmProcess {
    /// Starts the VMM. It has four descriptors: the control socket, `/dev/null` as standard input, the uid's lock as standard
    /// output, a pipe that never blocks as standard error. In a jail it is also the first process of a pid namespace, and killed
    /// when the calling thread ends: call this from one that lives as long as the process.
    ///
    /// # Errors
    /// [`VmmError`] when the executable cannot be run or the system is out of descriptors or processes.
    pub fn spawn(executable: &Path, jail: &Jail<'_>) -> Result<(Self, ControlSocket), VmmError> {
        let failed = |e| VmmError::Process(executable.to_owned(), e);
        let (ours, theirs) = ControlSocket::pair()?;
        let theirs = OwnedFd::from(theirs);
        let mut arguments = vec!["--control-fd".to_owned(), theirs.as_raw_fd().to_string()];
        let lease = jail.uid.filter(|_| geteuid().is_root());
        let mut stdout = None;
        if let Some(lease) = lease {
            let uid = lease.uid().to_string();
            arguments.extend(["--uid".to_owned(), uid.clone(), "--gid".to_owned(), uid, "--root".to_owned()]);
            arguments.push(jail.root.display().to_string());
            stdout = Some(lease.file());
        }
        let launch = Launch {
            executable,
            arguments,
            descriptors: &[theirs.as_fd()],
            stdout,
            network: &jail.network,
            cgroup: jail.cgroup,
            alone: lease.is_some(),
        };
        Ok((Self(Process::spawn(&launch).map_err(failed)?), ours))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.0.pid()
    }

    /// How it ended, if it does within `patience`, and what it last wrote to its standard error.
    pub(crate) async fn post_mortem(&mut self, patience: Duration) -> (Option<ExitStatus>, String) {
        self.0.post_mortem(patience).await
    }
}

#[cfg(test)]
#[path = "../tests/support/executable.rs"]
mod executable;

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use bulkhead_vmm::control::message::FromVmm;
    use rustix::event::{PollFd, PollFlags};
    use rustix::io::{FdFlags, fcntl_setfd};

    use super::*;
    use crate::config::Uids;

    fn spawn(script: &str) -> (tempfile::TempDir, Result<(VmmProcess, ControlSocket), VmmError>) {
        spawn_as(script, None)
    }

    fn spawn_as(
        script: &str,
        uid: Option<&UidLease>,
    ) -> (tempfile::TempDir, Result<(VmmProcess, ControlSocket), VmmError>) {
        let dir = tempfile::tempdir().unwrap();
        let executable = dir.path().join("vmm");
        executable::script(&executable, script);
        let spawned = VmmProcess::spawn(
            &executable,
            &Jail { uid, root: dir.path(), network: Place::Owners, cgroup: None },
        );
        (dir, spawned)
    }

    #[tokio::test]
    async fn a_vmm_that_fails_at_once_leaves_its_message_and_closes_the_socket() {
        let (_dir, spawned) = spawn("echo 'cannot\tjail myself' >&2; exit 3");
        let (mut process, socket) = spawned.unwrap();
        assert!(matches!(socket.receive::<FromVmm>(), Err(SocketError::Closed)));
        let (status, message) = process.post_mortem(Duration::from_mins(1)).await;
        assert_eq!((status.unwrap().code(), message.as_str()), (Some(3), "cannot\\tjail myself"));
    }

    #[tokio::test]
    async fn a_vmm_that_is_not_gone_in_time_has_its_message_told_without_its_status() {
        let (_dir, spawned) = spawn("echo last >&2; exec sleep 600");
        let (mut process, _socket) = spawned.unwrap();
        rustix::event::poll(&mut [PollFd::new(process.0.stderr(), PollFlags::IN)], None).unwrap();
        let (status, message) = process.post_mortem(Duration::from_millis(1)).await;
        assert_eq!((status, message.as_str()), (None, "last"));
    }

    #[tokio::test]
    async fn it_gets_no_environment_and_its_own_process_group() {
        let (_dir, spawned) = spawn("[ -z \"$CARGO_MANIFEST_DIR\" ] && [ $(ps -o pgid= $$) = $$ ] && exit 7");
        let (mut process, _socket) = spawned.unwrap();
        let (status, message) = process.post_mortem(Duration::from_mins(1)).await;
        assert_eq!(status.unwrap().code(), Some(7), "{message}");
    }

    #[tokio::test]
    async fn it_inherits_no_descriptor_but_its_own() {
        let null = File::open("/dev/null").unwrap();
        // A high number, which the shell does not use for itself.
        let leaked = rustix::io::fcntl_dupfd_cloexec(&null, 100).unwrap();
        fcntl_setfd(&leaked, FdFlags::empty()).unwrap();
        let script =
            format!("[ -e /proc/self/fd/$2 ] && [ ! -e /proc/self/fd/{} ] && exit 7", leaked.as_raw_fd());
        let (_dir, spawned) = spawn(&script);
        let (mut process, _socket) = spawned.unwrap();
        let (status, message) = process.post_mortem(Duration::from_mins(1)).await;
        assert_eq!(status.unwrap().code(), Some(7), "{message}");
    }

    #[tokio::test]
    async fn a_jailed_one_is_alone_in_its_pid_namespace_and_keeps_its_uid() {
        if !geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (uids, lock) = (Uids { first: 70_000, count: 1 }, dir.path().join("uids"));
        let lease = UidLease::take(uids, &lock).unwrap();
        let script = "[ $$ = 1 ] && [ -e /proc/self/fd/$2 ] || exit 9\n\
                      case \"$*\" in *'--uid 70000 --gid 70000 --root /'*) echo ready >&2; exec sleep 600;; esac";
        let (_dir, spawned) = spawn_as(script, Some(&lease));
        let (mut process, _socket) = spawned.unwrap();
        rustix::event::poll(&mut [PollFd::new(process.0.stderr(), PollFlags::IN)], None).unwrap();
        drop(lease);
        assert!(UidLease::take(uids, &lock).is_err(), "the uid is free although its VMM runs");
        process.0.kill();
        let (status, message) = process.post_mortem(Duration::from_mins(1)).await;
        assert_eq!((status.unwrap().signal(), message.as_str()), (Some(9), "ready"));
        // Another test's child may have the lock's descriptor for a moment, between its fork and its exec.
        let free = || {
            std::thread::sleep(Duration::from_millis(10));
            UidLease::take(uids, &lock).is_ok()
        };
        assert!((0..1000).any(|_| free()), "the uid is not free again");
        // Children of this thread are in its own namespace again.
        assert!(Command::new("/bin/true").status().unwrap().success());
    }

    #[test]
    fn a_missing_executable_is_named() {
        let jail = Jail { uid: None, root: Path::new("/"), network: Place::Owners, cgroup: None };
        let error = VmmProcess::spawn(Path::new("/nonexistent/bulkhead-vmm"), &jail).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/bulkhead-vmm"), "{error}");
    }
}
