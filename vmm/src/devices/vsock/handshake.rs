//! What a host program says first: `CONNECT <port>\n`.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{MsgFlags, recv};

/// Longest line, in bytes, with its end.
const LINE_MAX: usize = 32;

/// How far a host program has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handshake {
    /// The line is not complete.
    Incomplete,
    /// The line names a port of the guest.
    Connect {
        /// The port.
        port: u32,
        /// There may be more to read behind the line.
        more: bool,
    },
    /// Nothing that can be answered, or nobody there any more.
    Failed,
}

/// Looks for the line, and takes it out of the socket once it is complete. What is behind it stays there: it belongs to the guest.
pub(super) fn read(socket: &UnixStream) -> Handshake {
    let mut line = [0; LINE_MAX];
    let seen = match recv(socket.as_raw_fd(), &mut line, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(seen) => &line[..seen],
        Err(error) if std::io::Error::from(error).kind() == ErrorKind::WouldBlock => {
            return Handshake::Incomplete;
        }
        Err(_) => return Handshake::Failed,
    };
    let Some(end) = seen.iter().position(|&byte| byte == b'\n') else {
        // An end of file shows as nothing to read; behind part of a line it is the caller's event that tells.
        return if seen.is_empty() || seen.len() == LINE_MAX {
            Handshake::Failed
        } else {
            Handshake::Incomplete
        };
    };
    let port = parse(&seen[..end]);
    let more = seen.len() > end + 1 || seen.len() == LINE_MAX;
    match (port, recv(socket.as_raw_fd(), &mut line[..=end], MsgFlags::MSG_DONTWAIT)) {
        (Some(port), Ok(count)) if count == end + 1 => Handshake::Connect { port, more },
        _ => Handshake::Failed,
    }
}

/// Only digits: `str::parse` would take a sign too.
fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn the_line_may_come_in_any_parts_and_what_follows_it_is_left() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(read(&ours), Handshake::Incomplete);
        for byte in b"CONNECT 1024" {
            theirs.write_all(&[*byte]).unwrap();
            assert_eq!(read(&ours), Handshake::Incomplete);
        }
        theirs.write_all(b"\nhello\n").unwrap();
        assert_eq!(read(&ours), Handshake::Connect { port: 1024, more: true });
        let mut rest = [0; 6];
        (&ours).read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"hello\n");
    }

    #[test]
    fn anything_else_fails() {
        for line in [
            "\n",
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT  1\n",
            "CONNECT 1 \n",
            "CONNECT 1\r\n",
            "CONNECT +1\n",
            "CONNECT -1\n",
            "CONNECT 0x10\n",
            "CONNECT 4294967296\n",
            "connect 1\n",
            "GET / HTTP/1.1\r\n",
            "CONNECT 000000000000000000000001\n",
            "CONNECT 11111111111111111111111111111111111",
        ] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(line.as_bytes()).unwrap();
            assert_eq!(read(&ours), Handshake::Failed, "{line:?}");
        }
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(read(&ours), Handshake::Failed);
    }

    #[test]
    fn every_port_is_understood() {
        for port in [0, 1, u32::MAX - 1, u32::MAX] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            writeln!(theirs, "CONNECT {port}").unwrap();
            assert_eq!(read(&ours), Handshake::Connect { port, more: false });
        }
    }
}
