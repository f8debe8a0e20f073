//! A file server that behaves: it has one file, which it calls 0.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair,
};

const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;

/// The server, once it has been connected.
#[derive(Default)]
pub(super) struct FileServer(Option<Connected>);

struct Connected {
    socket: OwnedFd,
    file: File,
}

impl FileServer {
    /// The device's end of the connection.
    pub(super) fn connect(&mut self) -> OwnedFd {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (theirs, socket) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"the content of the only file", 0).unwrap();
        self.0 = Some(Connected { socket, file });
        theirs
    }

    /// Its file.
    pub(super) fn file(&self) -> &File {
        &self.0.as_ref().unwrap().file
    }

    /// Replies to what there is.
    pub(super) fn reply(&self) {
        let Some(Connected { socket, file }) = &self.0 else { return };
        let mut packet = vec![0; 128 << 10];
        while let Ok(length) = recv(socket.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT) {
            if length == 0 {
                return;
            }
            let opcode = u32::from_le_bytes(packet[4..8].try_into().unwrap());
            let body = match opcode {
                FORGET | BATCH_FORGET | DESTROY => continue,
                GETATTR => 104,
                OPEN => 16,
                CREATE => 144,
                _ => 0,
            };
            let mut reply = vec![0; 16 + body];
            reply[..4].copy_from_slice(&u32::try_from(16 + body).unwrap().to_le_bytes());
            reply[8..16].copy_from_slice(&packet[8..16]);
            let fds = [file.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&fds)];
            let control = if matches!(opcode, OPEN | CREATE) { &rights[..] } else { &[] };
            // A device that has stopped may have closed its end.
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let _ = sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&reply)], control, flags, None);
        }
    }
}

/// A request with a header for so long a body.
pub(super) fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(40 + body.len()).unwrap();
    [&len.to_le_bytes()[..], &opcode.to_le_bytes(), &[1; 32], body].concat()
}

/// Opens the file.
pub(super) fn open_request() -> Vec<u8> {
    request(OPEN, &[0; 8])
}

/// Reads so many bytes of the file from an offset on.
pub(super) fn read_request(offset: u64, size: u32) -> Vec<u8> {
    request(READ, &data_in(0, offset, size))
}

/// What READ and WRITE say behind their header.
pub(super) fn data_in(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    [&handle.to_le_bytes()[..], &offset.to_le_bytes(), &size.to_le_bytes(), &[0; 20]].concat()
}
