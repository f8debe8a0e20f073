//! The zygote: a process forked before the agent had a thread or a runtime, which forks a worker for each request.
//!
//! libcontainer forks, changes directory and calls much that is not safe in a process with threads, so it runs only in
//! workers, each of which does one thing and ends. A worker is a child of the zygote, not of PID 1, whose reaper
//! therefore cannot take a status that libcontainer waits for. What a worker leaves running becomes a child of PID 1
//! when the worker ends: nothing between the two is a subreaper.
//!
//! ```text
//! PID 1 --(Job: descriptors)--> zygote --fork--> worker
//!   \<------------- a socket of their own --------/
//! ```

pub(crate) mod descriptors;
pub(crate) mod protocol;
mod worker;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Signal, pidfd_send_signal};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;

use crate::descriptor::{Descriptor, nonblocking, watch};
use descriptors::{receive, send};
use protocol::{Failure, FailureKind, Job, REPLY_MAX, Reply, Request};

/// Workers at work at a time; more requests wait.
const WORKERS_MAX: usize = 32;

/// What went wrong between PID 1 and a worker.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("fork the zygote")]
    Fork(#[source] io::Error),
    #[error("hand a job to the zygote")]
    Job(#[source] io::Error),
    #[error("exchange messages with a worker")]
    Exchange(#[source] io::Error),
    #[error("encode or decode a message of a worker")]
    Message(#[from] postcard::Error),
    #[error("the worker ended without an answer")]
    Died,
    #[error("the worker did not answer within {0} seconds")]
    Timeout(u64),
    #[error("the worker was stopped")]
    Stopped,
    #[error("{}", .0.text)]
    Failed(Failure),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Failed(failure) => failure,
            Error::Timeout(_) => Failure::new(FailureKind::Timeout, crate::chain(&error)),
            Error::Stopped => Failure::new(FailureKind::Precondition, crate::chain(&error)),
            other => Failure::new(FailureKind::Internal, crate::chain(&other)),
        }
    }
}

/// PID 1's end of the zygote.
pub(crate) struct Zygote {
    /// Its process id: PID 1 cannot go on without it.
    pub(crate) pid: i32,
    socket: Descriptor,
    workers: Semaphore,
}

/// The zygote before there is a runtime to talk to it with.
pub(crate) struct Unattached {
    pid: i32,
    socket: OwnedFd,
}

/// Forks the zygote. The calling process must have one thread, and no descriptor that a worker may not inherit.
///
/// # Errors
/// [`Error::Fork`].
pub(crate) fn fork() -> Result<Unattached, Error> {
    let fork_error = |error: rustix::io::Errno| Error::Fork(error.into());
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(fork_error)?;
    // SAFETY: this process has one thread, so the child may do whatever it likes.
    match unsafe { libc::fork() } {
        -1 => Err(Error::Fork(io::Error::last_os_error())),
        0 => {
            drop(ours);
            serve(theirs.as_fd())
        }
        pid => Ok(Unattached { pid, socket: ours }),
    }
}

impl Unattached {
    /// The zygote for use by the runtime that this is called in.
    ///
    /// # Errors
    /// [`Error::Job`] when the socket cannot be watched.
    pub(crate) fn attach(self) -> Result<Zygote, Error> {
        let socket = nonblocking(self.socket).map_err(Error::Job)?;
        Ok(Zygote { pid: self.pid, socket, workers: Semaphore::new(WORKERS_MAX) })
    }
}

impl Zygote {
    /// Has a worker do `request` with the descriptors of `job`, for at most `patience`. It is killed after that, or when
    /// `stopped` completes; what it has begun is for the caller to clean up.
    ///
    /// `claim` is called with the answer while the process that it names is still the worker's child: an exit status
    /// cannot reach PID 1 before the process is known there.
    ///
    /// # Errors
    /// [`Error::Failed`] is the worker's own answer, the rest is about the worker.
    pub(crate) async fn run<T>(
        &self,
        request: &Request,
        job: Job,
        patience: Duration,
        stopped: impl Future<Output = ()>,
        claim: impl FnOnce(Reply, Option<OwnedFd>) -> T,
    ) -> Result<T, Error> {
        // Never closed, so there is always a permit to wait for.
        let _permit = self.workers.acquire().await.map_err(|_| Error::Stopped)?;
        let (ours, theirs) = UnixStream::pair().map_err(Error::Exchange)?;
        let theirs = OwnedFd::from(theirs.into_std().map_err(Error::Exchange)?);
        rustix::io::ioctl_fionbio(&theirs, false).map_err(|error| Error::Exchange(error.into()))?;
        let (mask, descriptors) = job.into_descriptors(theirs);
        self.socket
            .async_io(Interest::WRITABLE, |socket| {
                let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
                Ok(send(socket, &[mask], &borrowed)?)
            })
            .await
            .map_err(Error::Job)?;
        drop(descriptors);

        let mut socket = ours;
        let pidfd = meet(&socket).await?;
        let result = tokio::select! {
            reply = ask(&mut socket, request) => reply,
            error = died(&pidfd) => Err(error),
            () = stopped => Err(Error::Stopped),
            () = tokio::time::sleep(patience) => Err(Error::Timeout(patience.as_secs())),
        };
        match result {
            Ok((Reply::Failed(failure), _)) => Err(Error::Failed(failure)),
            // The end of the socket, at the end of this function, is what lets the worker end.
            Ok((reply, descriptor)) => Ok(claim(reply, descriptor)),
            Err(error) => {
                // It may have ended by itself.
                let _ = pidfd_send_signal(&pidfd, Signal::KILL);
                Err(error)
            }
        }
    }
}

/// The first thing that a worker sends is its pidfd: its end must be seen even while a child of it has the socket.
async fn meet(socket: &UnixStream) -> Result<Descriptor, Error> {
    let (_, pidfd) = receive_async(socket, &mut [0]).await?;
    watch(pidfd.ok_or(Error::Died)?).map_err(Error::Exchange)
}

async fn ask(socket: &mut UnixStream, request: &Request) -> Result<(Reply, Option<OwnedFd>), Error> {
    let body = postcard::to_stdvec(request)?;
    let length = u32::try_from(body.len()).map_err(|_| Error::Died)?;
    socket.write_all(&length.to_ne_bytes()).await.map_err(Error::Exchange)?;
    socket.write_all(&body).await.map_err(Error::Exchange)?;
    let mut header = [0; 4];
    let (read, descriptor) = receive_async(socket, &mut header).await?;
    let length = u32::from_ne_bytes(header) as usize;
    if read != header.len() || length > REPLY_MAX {
        return Err(Error::Died);
    }
    let mut body = vec![0; length];
    socket.read_exact(&mut body).await.map_err(Error::Exchange)?;
    Ok((postcard::from_bytes(&body)?, descriptor))
}

/// Completes when the worker has ended.
async fn died(pidfd: &Descriptor) -> Error {
    match pidfd.readable().await {
        Ok(_) => Error::Died,
        Err(error) => Error::Exchange(error),
    }
}

async fn receive_async(socket: &UnixStream, buffer: &mut [u8]) -> Result<(usize, Option<OwnedFd>), Error> {
    loop {
        socket.readable().await.map_err(Error::Exchange)?;
        match socket.try_io(Interest::READABLE, || Ok(receive(socket, buffer)?)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Error::Exchange(error)),
            Ok((read, descriptors)) => return Ok((read, descriptors.into_iter().next())),
        }
    }
}

/// The zygote's life: a worker for each job, until PID 1 is gone.
fn serve(socket: BorrowedFd<'_>) -> ! {
    // Only the name that is shown.
    let _ = rustix::thread::set_name(c"zygote");
    // Workers are reaped by the kernel: their answers say all that matters.
    // SAFETY: this process has one thread, and no handler is installed.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    loop {
        let mut mask = [0];
        let (read, descriptors) = match receive(socket, &mut mask) {
            Ok(message) => message,
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => std::process::exit(1),
        };
        if read == 0 {
            std::process::exit(0);
        }
        // SAFETY: this process has one thread.
        match unsafe { libc::fork() } {
            0 => worker::work(Job::from_descriptors(mask[0], descriptors)),
            // PID 1 sees the end of the worker's socket.
            -1 => tracing::error!("fork a worker: {}", io::Error::last_os_error()),
            _ => {}
        }
    }
}
