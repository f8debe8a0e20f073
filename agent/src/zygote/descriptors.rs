//! Messages with descriptors over Unix sockets (`SCM_RIGHTS`).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Most descriptors in a message: a socket, an outcome, three streams, five namespaces.
pub(crate) const DESCRIPTORS_MAX: usize = 10;

/// Sends `bytes` with `descriptors`, at most [`DESCRIPTORS_MAX`], and returns how many bytes were taken.
pub(crate) fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if descriptors.len() > DESCRIPTORS_MAX {
        return Err(Errno::NOBUFS);
    }
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::NOBUFS);
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
}

/// Receives into `buffer` and returns how many bytes that were, and the descriptors that came with them. No bytes is the
/// end.
pub(crate) fn receive(socket: impl AsFd, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = part {
            descriptors.extend(received);
        }
    }
    Ok((message.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_descriptor_arrives_with_the_bytes_it_was_sent_with() {
        let (left, right) = UnixStream::pair().unwrap();
        let (mut inner, outer) = UnixStream::pair().unwrap();
        assert_eq!(send(&left, b"abc", &[outer.as_fd()]), Ok(3));
        drop(outer);

        let mut buffer = [0; 8];
        let (read, mut received) = receive(&right, &mut buffer).unwrap();
        assert_eq!((&buffer[..read], received.len()), (&b"abc"[..], 1));
        UnixStream::from(received.pop().unwrap()).write_all(b"through").unwrap();
        let mut text = String::new();
        inner.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn too_many_descriptors_are_refused() {
        let (left, _right) = UnixStream::pair().unwrap();
        let many = [left.as_fd(); DESCRIPTORS_MAX + 1];
        assert_eq!(send(&left, b"x", &many), Err(Errno::NOBUFS));
    }
}
