//! One worker: it meets PID 1, does what it is asked, answers, waits until that was heard, and ends.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::process::{DumpableBehavior, PidfdFlags, getpid, pidfd_open, set_dumpable_behavior};

use super::descriptors::send;
use super::protocol::{Failure, FailureKind, Job, REPLY_MAX, Reply, Request};
use crate::container;

/// The life of a worker.
pub(super) fn work((socket, job): (Option<OwnedFd>, Job)) -> ! {
    let Some(socket) = socket else { end(1) };
    // libcontainer waits for its own children.
    // SAFETY: this process has one thread, and no handler is installed.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    let mut socket = UnixStream::from(socket);
    match converse(&mut socket, job) {
        Ok(()) => end(0),
        Err(error) => {
            tracing::error!("talk to PID 1: {error}");
            end(1)
        }
    }
}

/// Ends without what `exit` would run: this process is a copy of another, whose exit handlers they are.
fn end(status: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(status) }
}

fn converse(socket: &mut UnixStream, job: Job) -> io::Result<()> {
    let pidfd = pidfd_open(getpid(), PidfdFlags::empty())?;
    send(&*socket, &[0], &[pidfd.as_fd()])?;
    drop(pidfd);

    let mut length = [0; 4];
    socket.read_exact(&mut length)?;
    let mut body = vec![0; u32::from_ne_bytes(length) as usize];
    socket.read_exact(&mut body)?;
    // A process that may be traced could be used by what it is about to join.
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let (reply, terminal) = match postcard::from_bytes(&body) {
        Ok(request) => perform(request, job),
        Err(error) => (Reply::Failed(Failure::new(FailureKind::Internal, error.to_string())), None),
    };
    answer(socket, &reply, terminal.as_ref())?;
    // PID 1 closes its end when it knows the process by its id.
    socket.read(&mut [0]).map(drop)
}

fn perform(request: Request, job: Job) -> (Reply, Option<OwnedFd>) {
    let result = match request {
        Request::Create { call, start } => container::create(&call, &start, job),
        Request::Exec { call, start, init } => container::exec(&call, &start, init, job),
        Request::Remove { container_id } => {
            return match container::remove(&container_id) {
                Ok(()) => (Reply::Removed, None),
                Err(failure) => (Reply::Failed(failure), None),
            };
        }
    };
    match result {
        Ok(prepared) => (Reply::Prepared { pid: prepared.pid }, prepared.terminal),
        Err(failure) => (Reply::Failed(failure), None),
    }
}

fn answer(socket: &mut UnixStream, reply: &Reply, terminal: Option<&OwnedFd>) -> io::Result<()> {
    let body = postcard::to_stdvec(reply).map_err(io::Error::other)?;
    let length = u32::try_from(body.len()).ok().filter(|&length| length as usize <= REPLY_MAX);
    let length = length.ok_or_else(|| io::Error::other("the answer is too long"))?;
    let header = length.to_ne_bytes();
    let descriptors: Vec<_> = terminal.into_iter().map(AsFd::as_fd).collect();
    let sent = send(&*socket, &header, &descriptors)?;
    debug_assert_eq!(sent, header.len());
    socket.write_all(&body)
}
