//! The process `bulkhead-vmm`: how it is started, told apart from others and brought to its end.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use bulkhead_vmm::control::socket::{ControlSocket, SocketError};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, geteuid, pidfd_open};
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
    /// Starts the VMM. It has no environment, its own process group (a terminal's ^C is not for it) and three descriptors: the
    /// control socket as standard input, the uid's lock as standard output, a pipe that never blocks as standard error.
    ///
    /// # Errors
    /// [`VmmError`] when the executable cannot be run or the system is out of descriptors or processes.
    pub fn spawn(executable: &Path, jail: &Jail<'_>) -> Result<(Self, ControlSocket), VmmError> {
        let (ours, theirs) = ControlSocket::pair()?;
        let setup = |e: rustix::io::Errno| VmmError::Setup(e.into());
        let (stderr, their_stderr) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(setup)?;
        let mut command = Command::new(executable);
        command.args(["--control-fd", "0", "--root"]).arg(jail.root).env_clear().process_group(0);
        command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(their_stderr);
        if let Some(lease) = jail.uid.filter(|_| geteuid().is_root()) {
            let uid = lease.uid().to_string();
            command
                .args(["--uid", &uid, "--gid", &uid])
                .stdout(lease.file().try_clone().map_err(VmmError::Setup)?);
        }
        let child = command.spawn().map_err(|e| VmmError::Spawn(executable.to_owned(), e))?;
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use bulkhead_vmm::control::message::FromVmm;

    use super::*;

    fn spawn(script: &str) -> (tempfile::TempDir, Result<(VmmProcess, ControlSocket), VmmError>) {
        let dir = tempfile::tempdir().unwrap();
        let executable = dir.path().join("vmm");
        fs::write(&executable, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&executable, fs::Permissions::from_mode(0o755)).unwrap();
        let spawned = VmmProcess::spawn(&executable, &Jail { uid: None, root: dir.path() });
        (dir, spawned)
    }

    #[tokio::test]
    async fn a_vmm_that_fails_at_once_leaves_its_message_and_closes_the_socket() {
        let (_dir, spawned) = spawn("echo 'cannot\tjail myself' >&2; exit 3");
        let (mut process, socket) = spawned.unwrap();
        assert!(matches!(socket.receive::<FromVmm>(), Err(SocketError::Closed)));
        let (status, message) = process.post_mortem(Duration::from_secs(60)).await;
        assert_eq!((status.unwrap().code(), message.as_str()), (Some(3), "cannot\\tjail myself"));
    }

    #[tokio::test]
    async fn it_gets_no_environment_and_its_own_process_group() {
        let (_dir, spawned) = spawn("[ -z \"$CARGO_MANIFEST_DIR\" ] && [ $(ps -o pgid= $$) = $$ ] && exit 7");
        let (mut process, _socket) = spawned.unwrap();
        let (status, message) = process.post_mortem(Duration::from_secs(60)).await;
        assert_eq!(status.unwrap().code(), Some(7), "{message}");
    }

    #[test]
    fn a_missing_executable_is_named() {
        let jail = Jail { uid: None, root: Path::new("/") };
        let error = VmmProcess::spawn(Path::new("/nonexistent/bulkhead-vmm"), &jail).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/bulkhead-vmm"), "{error}");
    }
}
