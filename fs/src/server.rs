//! The two sockets: the guest's requests, by way of the VMM, and the owner's wishes.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use bulkhead_vmm::control::socket::{ControlSocket, SocketError};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};

use crate::control::{FromOwner, Reply as OwnerReply, Request};
use crate::session::{Answer, Reply, Session};
use crate::shares::ShareError;
use crate::wire::OUT_HEADER;
use crate::worker::Worker;

/// Longest request: the longest extended attribute, its name and its file's.
pub const REQUEST_MAX: usize = 80 << 10;

/// Requests that are answered before the owner gets a hearing.
const TURN: usize = 32;

/// Why the server ends early.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The requests' socket.
    #[error("the socket of requests failed")]
    Requests(#[source] Errno),
    /// Waiting.
    #[error("cannot wait for requests")]
    Wait(#[source] Errno),
    /// The owner's socket, or what the owner has said.
    #[error(transparent)]
    Control(#[from] SocketError),
}

/// Whether there is more to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    More,
    End,
}

/// The server.
#[derive(Debug)]
pub struct Server {
    session: Session,
    worker: Worker,
    requests: OwnedFd,
    control: ControlSocket,
    /// What the VMM had no room for. No request is read until it has.
    owed: Option<(u64, Reply)>,
    buffer: Vec<u8>,
}

impl Server {
    /// A server of a session, at one end of each socket.
    pub fn new(session: Session, worker: Worker, requests: OwnedFd, control: ControlSocket) -> Self {
        Self { session, worker, requests, control, owed: None, buffer: vec![0; REQUEST_MAX] }
    }

    /// Serves until one of the sockets is closed by the other side.
    ///
    /// # Errors
    /// [`ServerError`]
    pub fn run(mut self) -> Result<(), ServerError> {
        loop {
            let wanted = if self.owed.is_some() { PollFlags::OUT } else { PollFlags::IN };
            let mut polled = [
                PollFd::new(&self.requests, wanted),
                PollFd::from_borrowed_fd(self.control.as_fd(), PollFlags::IN),
                // Their replies would have to wait as well.
                PollFd::from_borrowed_fd(
                    self.worker.event(),
                    if self.owed.is_some() { PollFlags::empty() } else { PollFlags::IN },
                ),
            ];
            match poll(&mut polled, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(ServerError::Wait(errno)),
            }
            let [requests, control, done] = polled.map(|polled| !polled.revents().is_empty());
            if control && self.obey()? == Next::End {
                return Ok(());
            }
            if requests && self.serve()? == Next::End {
                return Ok(());
            }
            if done && self.report()? == Next::End {
                return Ok(());
            }
        }
    }

    /// A turn of requests.
    fn serve(&mut self) -> Result<Next, ServerError> {
        if let Some((unique, reply)) = self.owed.take()
            && self.send(unique, reply)? == Next::End
        {
            return Ok(Next::End);
        }
        for _ in 0..TURN {
            if self.owed.is_some() {
                break;
            }
            let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
            let length = match recv(&self.requests, &mut self.buffer[..], flags) {
                Ok((_, 0)) | Err(Errno::CONNRESET) => return Ok(Next::End),
                Ok((_, length)) => length,
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(ServerError::Requests(errno)),
            };
            // What was longer does not have the length that its header says.
            let packet = self.buffer.get(..length).unwrap_or(&self.buffer);
            let unique = packet.get(8..16).and_then(|bytes| bytes.try_into().ok());
            let unique = unique.map_or(0, u64::from_le_bytes);
            let answer = if length > REQUEST_MAX {
                Answer::Reply(Reply::error(unique, Errno::INVAL))
            } else {
                self.session.answer(packet)
            };
            let reply = match answer {
                Answer::Nothing => continue,
                Answer::Reply(reply) => reply,
                Answer::Later(job) => match self.worker.give(job) {
                    None => continue,
                    Some(job) => job.perform(),
                },
            };
            if self.send(unique, reply)? == Next::End {
                return Ok(Next::End);
            }
        }
        Ok(Next::More)
    }

    /// Sends the replies to what is done.
    fn report(&mut self) -> Result<Next, ServerError> {
        while self.owed.is_none()
            && let Some((unique, reply)) = self.worker.take()
        {
            if self.send(unique, reply)? == Next::End {
                return Ok(Next::End);
            }
        }
        Ok(Next::More)
    }

    /// Sends a reply and its file, or owes it.
    fn send(&mut self, unique: u64, reply: Reply) -> Result<Next, ServerError> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let file = reply.file.as_ref().map(|passed| [passed.file.as_fd()]);
            if let Some(file) = &file {
                control.push(SendAncillaryMessage::ScmRights(file));
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match (sendmsg(&self.requests, &[IoSlice::new(&reply.bytes)], &mut control, flags), &reply.file) {
                (Ok(_), _) => return Ok(Next::More),
                (Err(Errno::INTR), _) => {}
                (Err(Errno::AGAIN), _) => {
                    self.owed = Some((unique, reply));
                    return Ok(Next::More);
                }
                (Err(Errno::PIPE | Errno::CONNRESET), _) => return Ok(Next::End),
                // The VMM has too many files on their way, which it has not received yet.
                (Err(_), Some(passed)) => {
                    self.session.take_back(passed);
                    return self.send(unique, Reply::error(unique, Errno::MFILE));
                }
                // A long one for which the host has no memory, or no room in any socket.
                (Err(Errno::NOBUFS | Errno::NOMEM | Errno::MSGSIZE), None)
                    if reply.bytes.len() > OUT_HEADER =>
                {
                    return self.send(unique, Reply::error(unique, Errno::IO));
                }
                (Err(errno), None) => return Err(ServerError::Requests(errno)),
            }
        }
    }

    /// One wish of the owner's.
    fn obey(&mut self) -> Result<Next, ServerError> {
        let (FromOwner { id, request }, descriptors) = match self.control.receive() {
            Ok(received) => received,
            Err(SocketError::Closed) => return Ok(Next::End),
            Err(error) => return Err(error.into()),
        };
        let result = match request {
            Request::AddShare { name, share, kind, read_only } => {
                let root = descriptors.into_iter().nth(share.0.into()).ok_or(ShareError::NoDescriptor);
                root.and_then(|root| self.session.add_share(&name, root, kind, read_only))
            }
            Request::Protect { name } => self.session.protect_share(&name),
            Request::RemoveShare { name } => self.session.remove_share(&name),
        };
        let result = result.map_err(|error| bulkhead_vmm::server::chain(&error));
        match self.control.send(&OwnerReply { id, result }, &[]) {
            Ok(()) => Ok(Next::More),
            Err(SocketError::Closed) => Ok(Next::End),
            Err(error) => Err(error.into()),
        }
    }
}
