//! A process that this one starts, locks up and owns: the VMM, the file server.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use tokio::io::Interest;
use tokio::time::timeout;

use crate::console::escape;
use crate::watch::watch;

/// Most that is shown of a process's standard error, in bytes.
const MESSAGE_MAX: u64 = 2048;

/// Why there is no process.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// No pipe, no namespace.
    #[error("cannot set up its process")]
    Setup(#[source] io::Error),
    /// It does not start.
    #[error("cannot be executed: install Bulkhead completely, or say where it is with BULKHEAD_LIBEXEC")]
    Spawn(#[source] io::Error),
    /// The kernel cannot keep the caller's descriptors from it.
    #[error("cannot keep this program's descriptors from it: it takes Linux 5.11 or later")]
    Kernel(#[source] io::Error),
}

/// The network namespace of a process.
#[derive(Debug, Default)]
pub enum Place {
    /// That of its owner.
    #[default]
    Owners,
    /// A new one.
    New,
    /// This one, an open file of `/proc/PID/ns/net` or of a bind mount of such.
    Namespace(File),
}

/// How a process is started.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    /// What it runs.
    pub(crate) executable: &'a Path,
    /// With which arguments.
    pub(crate) arguments: Vec<String>,
    /// The descriptors that it gets under their numbers here, besides the standard ones.
    pub(crate) descriptors: &'a [BorrowedFd<'a>],
    /// Its standard output, which holds the lock on its uid; `/dev/null` without it.
    pub(crate) stdout: Option<File>,
    /// Where its network is.
    pub(crate) network: &'a Place,
    /// An open `cgroup.procs` of the group that it belongs to from its first instruction on.
    pub(crate) cgroup: Option<&'a File>,
    /// Give it a pid namespace of its own, in which it can neither see nor signal anyone. Only root can.
    pub(crate) alone: bool,
}

/// A running process. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    stderr: File,
}

impl Process {
    /// Starts a process. It has no environment, its own process group (a terminal's ^C is not for it), `/dev/null` as standard
    /// input and a pipe that never blocks as standard error.
    ///
    /// # Errors
    /// [`ProcessError`] when the executable cannot be run or the system is out of descriptors or processes.
    pub(crate) fn spawn(launch: Launch<'_>) -> Result<Self, ProcessError> {
        let setup = |e: rustix::io::Errno| ProcessError::Setup(e.into());
        let (stderr, their_stderr) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(setup)?;
        let mut command = Command::new(launch.executable);
        command.args(&launch.arguments).env_clear().process_group(0);
        command.stdin(Stdio::null()).stderr(their_stderr);
        command.stdout(launch.stdout.map_or_else(Stdio::null, Stdio::from));
        let kept: Vec<RawFd> = launch.descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let cgroup = launch.cgroup.map(AsRawFd::as_raw_fd);
        let network = match launch.network {
            Place::Owners => None,
            Place::New => Some(None),
            Place::Namespace(file) => Some(Some(file.as_raw_fd())),
        };
        // SAFETY: the closure runs in the forked child and makes system calls only, on descriptors that the child has copies of:
        // the parent closes its own only after `spawn` has returned.
        unsafe {
            command.pre_exec(move || {
                close_all_on_exec()?;
                for &descriptor in &kept {
                    fcntl_setfd(BorrowedFd::borrow_raw(descriptor), FdFlags::empty())?;
                }
                if let Some(cgroup) = cgroup {
                    rustix::io::write(BorrowedFd::borrow_raw(cgroup), b"0")?;
                }
                match network {
                    None => Ok(()),
                    Some(None) => Ok(unshare_unsafe(UnshareFlags::NEWNET)?),
                    Some(Some(namespace)) => {
                        let kind = Some(LinkNameSpaceType::Network);
                        Ok(move_into_link_name_space(BorrowedFd::borrow_raw(namespace), kind)?)
                    }
                }
            });
        }
        let mut spawn = || {
            command.spawn().map_err(|e| match e.raw_os_error() {
                Some(libc::ENOSYS | libc::EINVAL) => ProcessError::Kernel(e),
                _ => ProcessError::Spawn(e),
            })
        };
        let child = if launch.alone { in_new_pid_namespace(spawn)? } else { spawn()? };
        Ok(Self { child, stderr: stderr.into() })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A descriptor that is readable when the process has ended.
    ///
    /// # Errors
    /// When the system is out of descriptors.
    pub(crate) fn pidfd(&self) -> io::Result<OwnedFd> {
        // The child has not been waited for, so its pid is still its own.
        Ok(pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?)
    }

    /// How it ended, if it does within `patience`, and what it last wrote to its standard error.
    pub(crate) async fn post_mortem(&mut self, patience: Duration) -> (Option<ExitStatus>, String) {
        // Late or not: what is known by then is told.
        if let Some(gone) = self.pidfd().ok().and_then(|pidfd| watch(pidfd, Interest::READABLE).ok()) {
            let _ = timeout(patience, gone.readable()).await;
        }
        let status = self.child.try_wait().ok().flatten();
        let mut written = Vec::new();
        // The pipe does not block: what is there is all there is, and a read error after it changes nothing.
        let _ = (&self.stderr).take(MESSAGE_MAX).read_to_end(&mut written);
        (status, escape(written.trim_ascii()).replace("\\n", "; "))
    }

    /// Ends it.
    #[cfg(test)]
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Its standard error.
    #[cfg(test)]
    pub(crate) fn stderr(&self) -> &File {
        &self.stderr
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It fails when the process has ended already, which is just as well. Nobody waits for a machine to be torn
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
fn in_new_pid_namespace(spawn: impl FnOnce() -> Result<Child, ProcessError>) -> Result<Child, ProcessError> {
    let setup = |e: rustix::io::Errno| ProcessError::Setup(e.into());
    let own = File::open("/proc/thread-self/ns/pid").map_err(ProcessError::Setup)?;
    // SAFETY: unshares nothing but the namespace of future children of this thread, and no descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }.map_err(setup)?;
    let spawned = spawn();
    // Later children of this thread have nothing to do with the process.
    let back = move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::ProcessID)).map_err(setup);
    let mut child = spawned?;
    if let Err(error) = back {
        let _ = child.kill();
        return Err(error);
    }
    Ok(child)
}
