//! The process `bulkhead-vmm`: how it is started, told apart from others and brought to its end.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use bulkhead_vmm::control::socket::{ControlSocket, SocketError};
use nix::errno::Errno;
use nix::libc;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, geteuid, pidfd_open};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use tokio::io::Interest;
use tokio::time::timeout;

use crate::console::escape;
use crate::uid::UidLease;
use crate::watch::watch;

/// Most that is shown of a VMM's standard error, in bytes.
const MESSAGE_MAX: u64 = 2048;

/// Why there is no VMM.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// No control socket.
    #[error("cannot make the VMM's control socket")]
    Socket(#[from] SocketError),
    /// No pipe for its standard error.
    #[error("cannot set up the VMM's process")]
    Setup(#[source] io::Error),
    /// It does not start.
    #[error("cannot start {0}: install Bulkhead completely, or say where it is with BULKHEAD_LIBEXEC")]
    Spawn(PathBuf, #[source] io::Error),
    /// The kernel cannot keep the caller's descriptors from it.
    #[error("cannot keep this program's descriptors from the VMM: it takes Linux 5.11 or later")]
    Kernel(#[source] io::Error),
}

/// How a VMM is locked up.
#[derive(Debug)]
pub struct Jail<'a> {
    /// Whom it runs as. Only root can say so; without it the VMM keeps the caller's uid.
    pub uid: Option<&'a UidLease>,
    /// An empty directory that becomes its root.
    pub root: &'a Path,
}

/// A running VMM. Dropped, it is killed.
#[derive(Debug)]
pub struct VmmProcess {
    child: Child,
    stderr: File,
}

impl VmmProcess {
    /// Starts the VMM. It has no environment, its own process group (a terminal's ^C is not for it) and four descriptors: the
    /// control socket, `/dev/null` as standard input, the uid's lock as standard output, a pipe that never blocks as standard
    /// error. In a jail it is also the first process of a pid namespace, and killed when the calling thread ends: call this
    /// from one that lives as long as the process.
    ///
    /// # Errors
    /// [`VmmError`] when the executable cannot be run or the system is out of descriptors or processes.
    pub fn spawn(executable: &Path, jail: &Jail<'_>) -> Result<(Self, ControlSocket), VmmError> {
        let (ours, theirs) = ControlSocket::pair()?;
        let theirs = OwnedFd::from(theirs);
        let setup = |e: rustix::io::Errno| VmmError::Setup(e.into());
        let (stderr, their_stderr) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(setup)?;
        let mut command = Command::new(executable);
        command.arg("--control-fd").arg(theirs.as_raw_fd().to_string()).env_clear().process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(their_stderr);
        let control = theirs.as_raw_fd();
        // SAFETY: the closure runs in the forked child and makes two system calls, the second on a descriptor that the child
        // has a copy of: the parent closes its own only after `spawn` has returned.
        unsafe {
            command.pre_exec(move || {
                close_all_on_exec()?;
                Ok(fcntl_setfd(BorrowedFd::borrow_raw(control), FdFlags::empty())?)
            });
        }
        let lease = jail.uid.filter(|_| geteuid().is_root());
        if let Some(lease) = lease {
            let uid = lease.uid().to_string();
            command.args(["--uid", &uid, "--gid", &uid, "--root"]).arg(jail.root);
            command.stdout(lease.file().try_clone().map_err(VmmError::Setup)?);
        }
        let mut spawn = || {
            command.spawn().map_err(|e| match e.raw_os_error() {
                Some(libc::ENOSYS | libc::EINVAL) => VmmError::Kernel(e),
                _ => VmmError::Spawn(executable.to_owned(), e),
            })
        };
        let child = if lease.is_some() { in_new_pid_namespace(spawn)? } else { spawn()? };
        drop(theirs);
        Ok((Self { child, stderr: stderr.into() }, ours))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it does within `patience`, and what it last wrote to its standard error.
    pub(crate) async fn post_mortem(&mut self, patience: Duration) -> (Option<ExitStatus>, String) {
        // Late or not: what is known by then is told. The child has not been waited for, so its pid is still its own.
        let pidfd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty());
        if let Some(gone) = pidfd.ok().and_then(|pidfd| watch(pidfd, Interest::READABLE).ok()) {
            let _ = timeout(patience, gone.readable()).await;
        }
        let status = self.child.try_wait().ok().flatten();
        let mut written = Vec::new();
        // The pipe does not block: what is there is all there is, and a read error after it changes nothing.
        let _ = (&self.stderr).take(MESSAGE_MAX).read_to_end(&mut written);
        (status, escape(written.trim_ascii()).replace("\\n", "; "))
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        // It fails when the process has ended already, which is just as well. Nobody waits for the machine to be torn
        // down: whoever reaps the owner reaps the VMM.
        let _ = self.child.kill();
        let _ = self.child.try_wait();
    }
}

/// Has `exec` close every descriptor but the standard ones, among them those that whoever started this program forgot. Safe in a
/// forked child.
fn close_all_on_exec() -> io::Result<()> {
    // SAFETY: takes integers, touches no memory.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    Ok(Errno::result(result).map(drop)?)
}

/// Runs `spawn`, whose child is born into a pid namespace of its own, so that it can neither see nor signal anyone.
fn in_new_pid_namespace(spawn: impl FnOnce() -> Result<Child, VmmError>) -> Result<Child, VmmError> {
    let setup = |e: rustix::io::Errno| VmmError::Setup(e.into());
    let own = File::open("/proc/thread-self/ns/pid").map_err(VmmError::Setup)?;
    // SAFETY: unshares nothing but the namespace of future children of this thread, and no descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.map_err(setup)?;
    let spawned = spawn();
    // Later children of this thread have nothing to do with the VMM.
    let back = move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID)).map_err(setup);
    let mut child = spawned?;
    if let Err(error) = back {
        let _ = child.kill();
        return Err(error);
    }
    Ok(child)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::ExitStatusExt;

    use bulkhead_vmm::control::message::FromVmm;
    use rustix::event::{PollFd, PollFlags};

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
        fs::write(&executable, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&executable, fs::Permissions::from_mode(0o755)).unwrap();
        let spawned = VmmProcess::spawn(&executable, &Jail { uid, root: dir.path() });
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
        rustix::event::poll(&mut [PollFd::new(&process.stderr, PollFlags::IN)], None).unwrap();
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
        rustix::event::poll(&mut [PollFd::new(&process.stderr, PollFlags::IN)], None).unwrap();
        drop(lease);
        assert!(UidLease::take(uids, &lock).is_err(), "the uid is free although its VMM runs");
        process.child.kill().unwrap();
        let (status, message) = process.post_mortem(Duration::from_mins(1)).await;
        assert_eq!((status.unwrap().signal(), message.as_str()), (Some(9), "ready"));
        assert!(UidLease::take(uids, &lock).is_ok());
        // Children of this thread are in its own namespace again.
        assert!(Command::new("/bin/true").status().unwrap().success());
    }

    #[test]
    fn a_missing_executable_is_named() {
        let jail = Jail { uid: None, root: Path::new("/") };
        let error = VmmProcess::spawn(Path::new("/nonexistent/bulkhead-vmm"), &jail).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/bulkhead-vmm"), "{error}");
    }
}
