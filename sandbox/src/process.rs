//! A process that this one starts, locks up and owns: the VMM, the file server.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};
use tokio::io::Interest;
use tokio::time::timeout;

use crate::birth::Birth;
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
    pub(crate) stdout: Option<&'a File>,
    /// Where its network is.
    pub(crate) network: &'a Place,
    /// The directory of the cgroup that it is in from its first instruction on.
    pub(crate) cgroup: Option<&'a File>,
    /// Give it a pid namespace of its own, in which it can neither see nor signal anyone. Only root can.
    pub(crate) alone: bool,
}

/// A running process. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    /// How it ended, once somebody has asked; then its pid may be another's.
    status: Option<ExitStatus>,
    stderr: File,
}

impl Process {
    /// Starts a process. It has no environment, its own process group (a terminal's ^C is not for it), `/dev/null` as standard
    /// input and a pipe that never blocks as standard error.
    ///
    /// # Errors
    /// [`ProcessError`] when the executable cannot be run or the system is out of descriptors or processes.
    pub(crate) fn spawn(launch: &Launch<'_>) -> Result<Self, ProcessError> {
        let setup = |e: rustix::io::Errno| ProcessError::Setup(e.into());
        let (stderr, their_stderr) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(setup)?;
        let null = File::options().read(true).write(true).open("/dev/null").map_err(ProcessError::Setup)?;
        let words =
            [launch.executable.as_os_str()].into_iter().chain(launch.arguments.iter().map(AsRef::as_ref));
        let words: Result<Vec<CString>, _> = words.map(|word| CString::new(word.as_bytes())).collect();
        let alone = if launch.alone { libc::CLONE_NEWPID } else { 0 };
        let (network, namespaces) = match launch.network {
            Place::Owners => (None, alone),
            Place::New => (None, alone | libc::CLONE_NEWNET),
            Place::Namespace(file) => (Some(file.as_fd()), alone),
        };
        let birth = Birth {
            words: words.map_err(|e| ProcessError::Setup(e.into()))?,
            streams: [null.as_fd(), launch.stdout.map_or(null.as_fd(), File::as_fd), their_stderr.as_fd()],
            kept: launch.descriptors,
            network,
            namespaces,
            cgroup: launch.cgroup.map(File::as_fd),
        };
        let pid = birth.give().map_err(|e| match e.raw_os_error() {
            Some(libc::ENOSYS | libc::EINVAL) => ProcessError::Kernel(e),
            _ => ProcessError::Spawn(e),
        })?;
        Ok(Self { pid, status: None, stderr: stderr.into() })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// A descriptor that is readable when the process has ended.
    ///
    /// # Errors
    /// When the system is out of descriptors.
    pub(crate) fn pidfd(&self) -> io::Result<OwnedFd> {
        if self.status.is_some() {
            return Err(Errno::ESRCH.into());
        }
        Ok(pidfd_open(self.pid, PidfdFlags::empty())?)
    }

    /// How it ended, if it does within `patience`, and what it last wrote to its standard error.
    pub(crate) async fn post_mortem(&mut self, patience: Duration) -> (Option<ExitStatus>, String) {
        // Late or not: what is known by then is told.
        if let Some(gone) = self.pidfd().ok().and_then(|pidfd| watch(pidfd, Interest::READABLE).ok()) {
            let _ = timeout(patience, gone.readable()).await;
        }
        self.reap();
        let mut written = Vec::new();
        // The pipe does not block: what is there is all there is, and a read error after it changes nothing.
        let _ = (&self.stderr).take(MESSAGE_MAX).read_to_end(&mut written);
        (self.status, escape(written.trim_ascii()).replace("\\n", "; "))
    }

    /// Ends it, whatever state it is in.
    pub(crate) fn kill(&self) {
        if self.status.is_none() {
            // It fails when the process has ended already, which is just as well.
            let _ = kill_process(self.pid, Signal::KILL);
        }
    }

    /// Takes note of its end if it has ended.
    fn reap(&mut self) {
        if self.status.is_none()
            && let Ok(Some((_, status))) = waitpid(Some(self.pid), WaitOptions::NOHANG)
        {
            self.status = Some(ExitStatus::from_raw(status.as_raw()));
        }
    }

    /// Its standard error.
    #[cfg(test)]
    pub(crate) fn stderr(&self) -> &File {
        &self.stderr
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Nobody waits for a machine to be torn down: whoever reaps the owner reaps the VMM.
        self.kill();
        self.reap();
    }
}
