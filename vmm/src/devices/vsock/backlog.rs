//! What the guest has sent and the host's socket has not taken yet.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;

use super::credit::BUF_ALLOC;

const CAPACITY: usize = BUF_ALLOC as usize;

/// Bytes in order. Flow control lets no more than [`BUF_ALLOC`] come; while there are none it costs nothing.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    bytes: Vec<u8>,
    sent: usize,
}

impl Backlog {
    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.sent
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies guest memory behind what waits already. Both together are at most [`BUF_ALLOC`] bytes.
    pub(super) fn push<'m>(&mut self, parts: impl Iterator<Item = VolatileSlice<'m>>) {
        for part in parts {
            if self.bytes.len() + part.len() > CAPACITY {
                self.bytes.drain(..self.sent);
                self.sent = 0;
            }
            // All at once: growing step by step would copy, and could end at twice the size.
            self.bytes.reserve_exact(CAPACITY - self.bytes.len());
            let start = self.bytes.len();
            self.bytes.resize(start + part.len(), 0);
            part.copy_to(&mut self.bytes[start..]);
        }
    }

    /// Sends what the socket takes.
    ///
    /// # Errors
    /// When the socket will never take more.
    pub(super) fn send(&mut self, socket: &impl AsRawFd) -> io::Result<()> {
        while !self.is_empty() {
            let left = &self.bytes[self.sent..];
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            // SAFETY: the pointer and the length are those of a slice.
            let sent = unsafe { libc::send(socket.as_raw_fd(), left.as_ptr().cast(), left.len(), flags) };
            match usize::try_from(sent).map_err(|_| io::Error::last_os_error()) {
                Ok(sent) => self.sent += sent,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        *self = Self::default();
        Ok(())
    }

    /// Forgets what waits. Returns how many bytes that were.
    pub(super) fn clear(&mut self) -> usize {
        std::mem::take(self).len()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn bytes_keep_their_order_and_the_memory_its_bound() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut backlog = Backlog::default();
        let mut sequence = (0..=250u8).cycle();
        let mut expected = (0..=250u8).cycle();
        let mut consumed = 0;
        while consumed < 4_000_000 {
            let room = CAPACITY - backlog.len();
            let mut bytes: Vec<u8> = sequence.by_ref().take(room.min(50_000)).collect();
            backlog.push(std::iter::once(VolatileSlice::from(&mut bytes[..])));
            assert!(backlog.bytes.capacity() <= CAPACITY);
            backlog.send(&ours).unwrap();
            let mut read = vec![0; 30_000];
            let count = theirs.read(&mut read).unwrap();
            assert!(read[..count].iter().copied().eq(expected.by_ref().take(count)));
            consumed += count;
        }
    }

    #[test]
    fn an_empty_backlog_holds_no_memory() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let mut backlog = Backlog::default();
        backlog.push(std::iter::once(VolatileSlice::from(&mut [1, 2, 3][..])));
        assert_eq!(backlog.len(), 3);
        backlog.send(&ours).unwrap();
        assert!(backlog.is_empty());
        assert_eq!(backlog.bytes.capacity(), 0);
    }
}
