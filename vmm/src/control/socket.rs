//! Packets with descriptors over a SEQPACKET socket.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::message::{FDS_MAX, PACKET_MAX, VERSION};

/// Why a packet was not sent or not received.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The socket itself failed.
    #[error("control socket: {0}")]
    Io(#[from] Errno),
    /// The other side has closed the socket.
    #[error("control socket: closed by the other side")]
    Closed,
    /// A packet or its descriptors were longer than allowed.
    #[error("control socket: packet of more than {PACKET_MAX} bytes or {FDS_MAX} descriptors")]
    TooLong,
    /// The other side is of another build.
    #[error("control socket: version {0}, but this is version {VERSION}; use binaries of one build")]
    Version(u16),
    /// The packet is not what was expected.
    #[error("control socket: malformed packet: {0}")]
    Malformed(#[from] postcard::Error),
}

/// One end of a control connection.
#[derive(Debug)]
pub struct ControlSocket(OwnedFd);

impl ControlSocket {
    /// Two connected ends, both close-on-exec.
    ///
    /// # Errors
    /// When the process or the system is out of descriptors.
    pub fn pair() -> Result<(Self, Self), SocketError> {
        let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Self(a), Self(b)))
    }

    /// Sends one message. A send to a full socket waits, unless the socket is non-blocking.
    ///
    /// # Errors
    /// [`SocketError::TooLong`] for more than the bounds of [`message`](super::message), otherwise the socket's error.
    pub fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), SocketError> {
        self.send_flags(message, fds, MsgFlags::MSG_NOSIGNAL)
    }

    /// Sends one message, or fails with `EAGAIN` if the other side does not read.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub fn try_send<T: Serialize>(&self, message: &T) -> Result<(), SocketError> {
        self.send_flags(message, &[], MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)
    }

    fn send_flags<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
        flags: MsgFlags,
    ) -> Result<(), SocketError> {
        let packet = postcard::to_extend(message, VERSION.to_le_bytes().to_vec())?;
        if packet.len() > PACKET_MAX || fds.len() > FDS_MAX {
            return Err(SocketError::TooLong);
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        loop {
            match sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&packet)], control, flags, None) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(SocketError::Closed),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Receives one message and its descriptors, which are close-on-exec.
    ///
    /// # Errors
    /// [`SocketError::Closed`] at end of file; what a packet that breaks the rules carried is closed.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), SocketError> {
        let mut buffer = vec![0; PACKET_MAX];
        let mut space = nix::cmsg_space!([RawFd; FDS_MAX]);
        let (length, truncated, fds) = loop {
            let mut parts = [IoSliceMut::new(&mut buffer)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let received = match recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut space), flags) {
                Ok(received) => received,
                Err(Errno::EINTR) => continue,
                Err(Errno::ECONNRESET) => return Err(SocketError::Closed),
                Err(errno) => return Err(errno.into()),
            };
            let mut fds = Vec::new();
            for control in received.cmsgs()? {
                if let ControlMessageOwned::ScmRights(raw) = control {
                    // SAFETY: the kernel has just made these descriptors for this process; nobody else knows them.
                    fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            let truncated = received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
            break (received.bytes, truncated, fds);
        };
        if truncated {
            return Err(SocketError::TooLong);
        }
        if length == 0 {
            return Err(SocketError::Closed);
        }
        let Some((version, body)) = buffer[..length].split_first_chunk() else {
            return Err(postcard::Error::DeserializeUnexpectedEnd.into());
        };
        match u16::from_le_bytes(*version) {
            VERSION => Ok((postcard::from_bytes(body)?, fds)),
            other => Err(SocketError::Version(other)),
        }
    }
}

impl From<OwnedFd> for ControlSocket {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<ControlSocket> for OwnedFd {
    fn from(socket: ControlSocket) -> Self {
        socket.0
    }
}

impl AsRawFd for ControlSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl std::os::fd::AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    use proptest::prelude::*;

    use super::*;
    use crate::control::message::{Fd, FromOwner, Request};

    #[test]
    fn a_request_arrives_with_its_descriptor() {
        let (owner, vmm) = ControlSocket::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"state").unwrap();
        file.rewind().unwrap();
        let sent = FromOwner { id: 7, request: Request::Save { file: Fd(0) } };
        owner.send(&sent, &[file.as_fd()]).unwrap();
        let (received, mut fds) = vmm.receive::<FromOwner>().unwrap();
        assert_eq!(received, sent);
        let mut text = String::new();
        File::from(fds.pop().unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "state");
    }

    #[test]
    fn the_end_of_the_other_side_is_told() {
        let (owner, vmm) = ControlSocket::pair().unwrap();
        drop(owner);
        assert!(matches!(vmm.receive::<FromOwner>(), Err(SocketError::Closed)));
    }

    #[test]
    fn another_version_is_refused() {
        let (owner, vmm) = ControlSocket::pair().unwrap();
        nix::sys::socket::send(owner.as_raw_fd(), &[9, 9, 0], MsgFlags::empty()).unwrap();
        assert!(matches!(vmm.receive::<FromOwner>(), Err(SocketError::Version(0x909))));
    }

    #[test]
    fn a_packet_too_short_for_a_version_is_no_end() {
        let (owner, vmm) = ControlSocket::pair().unwrap();
        nix::sys::socket::send(owner.as_raw_fd(), &[1], MsgFlags::empty()).unwrap();
        assert!(matches!(vmm.receive::<FromOwner>(), Err(SocketError::Malformed(_))));
    }

    proptest! {
        #[test]
        fn random_packets_are_refused_or_understood(bytes in proptest::collection::vec(any::<u8>(), 1..200)) {
            let (owner, vmm) = ControlSocket::pair().unwrap();
            let packet = [&VERSION.to_le_bytes()[..], &bytes].concat();
            nix::sys::socket::send(owner.as_raw_fd(), &packet, MsgFlags::empty()).unwrap();
            let _ = vmm.receive::<FromOwner>();
        }
    }
}
