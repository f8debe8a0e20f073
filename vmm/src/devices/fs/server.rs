//! The socket to the file server, which is never waited for and not trusted either.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, sendmsg};

use super::wire::OUT_HEADER;

/// Longest reply: the longest directory listing or extended attribute, and its header.
const REPLY_MAX: usize = (128 << 10) + OUT_HEADER;
/// Descriptors that are taken of one packet. One has a meaning; the kernel closes what is beyond.
const FDS_MAX: u32 = 2;
/// Bytes of a descriptor in a packet.
const FD_LEN: u32 = 4;

/// What came of a packet to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// It is on its way.
    Done,
    /// The socket is full.
    Full,
    /// It can never be sent, or the host is short of memory.
    Refused,
    /// There is no server any more.
    Gone,
}

/// A packet of the server's.
pub(super) struct Packet<'a> {
    pub(super) bytes: &'a mut [u8],
    /// The first file that came with it. There is none when the packet itself is too long.
    pub(super) file: Option<File>,
    /// It was longer than any reply may be.
    pub(super) too_long: bool,
}

/// The server, while it is there.
pub(super) struct Server {
    socket: Option<OwnedFd>,
    reply: Vec<u8>,
}

impl Server {
    /// The server at the other end of a connected SEQPACKET socket.
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket: Some(socket), reply: Vec::new() }
    }

    /// The socket, until the server is gone.
    pub(super) fn fd(&self) -> Option<RawFd> {
        self.socket.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Sends one packet.
    pub(super) fn send(&mut self, packet: &[u8]) -> Sent {
        let Some(fd) = self.fd() else { return Sent::Gone };
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        loop {
            return match sendmsg::<()>(fd, &[IoSlice::new(packet)], &[], flags, None) {
                Ok(_) => Sent::Done,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => Sent::Full,
                Err(Errno::EMSGSIZE | Errno::ENOBUFS | Errno::ENOMEM) => Sent::Refused,
                Err(_) => {
                    self.end();
                    Sent::Gone
                }
            };
        }
    }

    /// The next packet, if there is one.
    pub(super) fn receive(&mut self) -> Option<Packet<'_>> {
        let fd = self.fd()?;
        if self.reply.is_empty() {
            // Zeroed memory that the kernel gives when it is touched: most of it never is.
            self.reply = vec![0; REPLY_MAX];
        }
        match receive(fd, &mut self.reply) {
            // A packet of no bytes is what the end of the connection looks like.
            Ok(received) if received.length > 0 => Some(Packet {
                bytes: &mut self.reply[..received.length],
                file: received.file,
                too_long: received.too_long,
            }),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Ok(_) | Err(_) => {
                self.end();
                None
            }
        }
    }

    /// Closes the socket, which takes it out of the epoll that watches it: a connection that has ended is readable for ever.
    pub(super) fn end(&mut self) {
        self.socket = None;
        self.reply = Vec::new();
    }
}

struct Received {
    length: usize,
    file: Option<File>,
    too_long: bool,
}

/// A control message with room for [`FDS_MAX`] descriptors, aligned as its header has to be.
#[repr(C)]
union Control {
    _header: libc::cmsghdr,
    // SAFETY: computes a size.
    bytes: [u8; unsafe { libc::CMSG_SPACE(FDS_MAX * FD_LEN) } as usize],
}

/// `recvmsg`, which leaves no descriptor behind however the packet looks. (nix says nothing of the descriptors that did arrive when some
/// did not.)
fn receive(fd: RawFd, buffer: &mut [u8]) -> io::Result<Received> {
    // SAFETY: all zeros are a valid value of both.
    let (mut control, mut message): (Control, libc::msghdr) = unsafe { std::mem::zeroed() };
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    let length = loop {
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<Control>();
        // SAFETY: the message names a buffer and a control buffer that live until the call returns, with their lengths.
        let got = unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC) };
        match usize::try_from(got) {
            Ok(length) => break length,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    };
    let mut file = None;
    // SAFETY: the kernel has filled in the message's control buffer and its length.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: the header is inside the control buffer, so says CMSG_FIRSTHDR or CMSG_NXTHDR.
        let (level, kind, bytes) = unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len) };
        if (level, kind) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            // SAFETY: computes a size.
            let count = (bytes - unsafe { libc::CMSG_LEN(0) } as usize) / size_of::<RawFd>();
            for index in 0..count {
                // SAFETY: the kernel has put `count` descriptors behind the header, made for this process; nobody else knows them.
                let fd = unsafe {
                    let place = libc::CMSG_DATA(header).add(index * size_of::<RawFd>());
                    OwnedFd::from_raw_fd(RawFd::from_ne_bytes(place.cast::<[u8; 4]>().read()))
                };
                // What is not the first is closed here.
                file.get_or_insert_with(|| File::from(fd));
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR; `header` is one that it gave.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok(Received { length, file, too_long: message.msg_flags & libc::MSG_TRUNC != 0 })
}
