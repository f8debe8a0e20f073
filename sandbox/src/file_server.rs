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
        Ok((Self { process, control: Mutex::new(Control { socket, next_id: 0 }) }, requests))
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

    /// How it ended, as far as that is known, for a log.
    pub async fn last_words(&mut self) -> String {
        match self.process.post_mortem(Duration::ZERO).await {
            (status, message) if message.is_empty() => format!("{status:?}"),
            (_, message) => message,
        }
    }

    /// Requests are few, and each has its answer before the next.
    async fn request(&self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<(), FileServerError> {
        let mut control = self.control.lock().await;
        let id = control.next_id;
        control.next_id = id.wrapping_add(1);
        control.socket.get_ref().send(&FromOwner { id, request }, fds)?;
        let answer = timeout(PATIENCE, control.answer()).await.map_err(|_| FileServerError::Timeout)??;
        if answer.id != id {
            return Err(FileServerError::Protocol);
        }
        answer.result.map_err(|why| FileServerError::Refused(excerpt(&why)))
    }
}

impl Control {
    async fn answer(&self) -> Result<Reply, SocketError> {
        loop {
            let mut ready = self.socket.readable().await.map_err(|_| SocketError::Closed)?;
            match self.socket.get_ref().receive::<Reply>() {
                Err(SocketError::Io(Errno::EAGAIN)) => ready.clear_ready(),
                answer => return answer.map(|(reply, _)| reply),
            }
        }
    }
}
