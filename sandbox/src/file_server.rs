//! The process `bulkhead-fs`, which serves host directories to one guest, and the socket by which shares come and go.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_fs::control::{Fd, FromOwner, Reply, Request, ShareKind};
use bulkhead_vmm::control::socket::{ControlSocket, SocketError};
use nix::errno::Errno;
use rustix::io::ioctl_fionbio;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::geteuid;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::console::excerpt;
use crate::process::{Launch, Place, Process, ProcessError};
use crate::watch::watch_owner;

/// How long a file server may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a directory is not served.
#[derive(Debug, thiserror::Error)]
pub enum FileServerError {
    /// No socket.
    #[error("cannot make the file server's sockets")]
    Socket(#[source] std::io::Error),
    /// No process.
    #[error("the file server {0}")]
    Process(PathBuf, #[source] ProcessError),
    /// It cannot be reached.
    #[error("the file server does not answer")]
    Control(#[from] SocketError),
    /// It takes too long.
    #[error("the file server does not answer within {PATIENCE:?}")]
    Timeout,
    /// It refuses.
    #[error("the file server cannot serve the share: {0}")]
    Refused(String),
    /// It answers something else.
    #[error("the file server answered another request than the last one")]
    Protocol,
}

/// A running file server. Dropped, it is killed.
#[derive(Debug)]
pub struct FileServer {
    process: Process,
    control: Mutex<Control>,
}

#[derive(Debug)]
struct Control {
    socket: AsyncFd<ControlSocket>,
    next_id: u32,
    /// The id of the next answer. Those to requests that were given up are still to come.
    next_answer: u32,
}

impl FileServer {
    /// Starts a file server; the second part is the socket for the VMM's fs device. `root` is an empty directory. Call this from a
    /// thread that lives as long as the process.
    ///
    /// # Errors
    /// [`FileServerError`] when the executable cannot be run or the system is out of descriptors or processes.
    pub fn spawn(
        executable: &Path,
        root: &Path,
        cgroup: Option<&std::fs::File>,
    ) -> Result<(Self, OwnedFd), FileServerError> {
        let socket = |e: rustix::io::Errno| FileServerError::Socket(e.into());
        let (requests, their_requests) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(socket)?;
        let (control, their_control) = ControlSocket::pair()?;
        let their_control = OwnedFd::from(their_control);
        ioctl_fionbio(&control, true).map_err(socket)?;
        let launch = Launch {
            executable,
            arguments: vec![
                "--requests-fd".into(),
                their_requests.as_raw_fd().to_string(),
                "--control-fd".into(),
                their_control.as_raw_fd().to_string(),
                "--root".into(),
                root.display().to_string(),
            ],
            descriptors: &[their_requests.as_fd(), their_control.as_fd()],
            stdout: None,
            network: &Place::Owners,
            cgroup,
            alone: geteuid().is_root(),
        };
        let process =
            Process::spawn(&launch).map_err(|e| FileServerError::Process(executable.to_owned(), e))?;
        let socket = watch_owner(control, Interest::READABLE).map_err(FileServerError::Socket)?;
        Ok((Self { process, control: Mutex::new(Control { socket, next_id: 0, next_answer: 0 }) }, requests))
    }

    /// Shows a mount to the guest under a name, which must be an id.
    ///
    /// # Errors
    /// [`FileServerError`] when the server refuses or has ended.
    pub async fn add(
        &self,
        name: &str,
        mount: &OwnedFd,
        kind: ShareKind,
        read_only: bool,
    ) -> Result<(), FileServerError> {
        let request = Request::AddShare { name: name.into(), share: Fd(0), kind, read_only };
        self.request(request, &[mount.as_fd()]).await
    }

    /// Refuses all changes of a share from now on.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub async fn protect(&self, name: &str) -> Result<(), FileServerError> {
        self.request(Request::Protect { name: name.into() }, &[]).await
    }

    /// Takes a share away from the guest.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub async fn remove(&self, name: &str) -> Result<(), FileServerError> {
        self.request(Request::RemoveShare { name: name.into() }, &[]).await
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Ends it.
    pub fn end(&self) {
        self.process.kill();
    }

    /// How it ended, as far as that is known, for a log.
    pub async fn last_words(&mut self) -> String {
        match self.process.post_mortem(Duration::ZERO).await {
            (status, message) if message.is_empty() => format!("{status:?}"),
            (_, message) => message,
        }
    }

    /// Requests are few, and each has its answer before the next, unless it was given up.
    async fn request(&self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<(), FileServerError> {
        let mut control = self.control.lock().await;
        let id = control.next_id;
        control.socket.get_ref().send(&FromOwner { id, request }, fds)?;
        control.next_id = id.wrapping_add(1);
        let answer = timeout(PATIENCE, control.answer(id)).await.map_err(|_| FileServerError::Timeout)??;
        answer.result.map_err(|why| FileServerError::Refused(excerpt(&why)))
    }
}

impl Control {
    /// The answer to a request, behind those that nobody has waited for.
    async fn answer(&mut self, id: u32) -> Result<Reply, FileServerError> {
        loop {
            let mut ready = self.socket.readable().await.map_err(|_| SocketError::Closed)?;
            match self.socket.get_ref().receive::<Reply>() {
                Err(SocketError::Io(Errno::EAGAIN)) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
                Ok((answer, _)) if answer.id != self.next_answer => return Err(FileServerError::Protocol),
                Ok((answer, _)) => {
                    self.next_answer = answer.id.wrapping_add(1);
                    if answer.id == id {
                        return Ok(answer);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn answers_to_requests_that_were_given_up_are_passed_over_and_others_are_not() {
        let (ours, server) = ControlSocket::pair().unwrap();
        ioctl_fionbio(&ours, true).unwrap();
        let socket = watch_owner(ours, Interest::READABLE).unwrap();
        let mut control = Control { socket, next_id: 3, next_answer: 0 };
        for (id, result) in [(0, Ok(())), (1, Err("too late".to_owned())), (2, Err("no".to_owned()))] {
            server.send(&Reply { id, result }, &[]).unwrap();
        }
        assert_eq!(control.answer(2).await.unwrap().result, Err("no".to_owned()));
        for id in [2, 4] {
            server.send(&Reply { id, result: Ok(()) }, &[]).unwrap();
            assert!(matches!(control.answer(3).await, Err(FileServerError::Protocol)));
        }
        drop(server);
        assert!(matches!(control.answer(3).await, Err(FileServerError::Control(SocketError::Closed))));
    }
}
