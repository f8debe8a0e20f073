//! The launcher's own standard streams, read and written without ever making the whole program wait.
//!
//! They are shared with other programs, so they stay blocking: a descriptor is used only after `poll` has said that it will not
//! block. What epoll does not take (regular files, `/dev/null`) never blocks.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use bulkhead_sandbox::watch::watch;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read, write};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A pipe that is writable takes this much without blocking: `PIPE_BUF`.
const WRITE_MAX: usize = 4096;

/// One of the launcher's standard streams.
#[derive(Debug)]
pub(crate) enum HostStream {
    Watched(AsyncFd<OwnedFd>),
    NeverBlocks(OwnedFd),
}

impl HostStream {
    /// Standard input.
    pub(crate) fn stdin() -> io::Result<Self> {
        Self::new(rustix::stdio::stdin(), Interest::READABLE)
    }

    /// Standard output.
    pub(crate) fn stdout() -> io::Result<Self> {
        Self::new(rustix::stdio::stdout(), Interest::WRITABLE)
    }

    /// Standard error.
    pub(crate) fn stderr() -> io::Result<Self> {
        Self::new(rustix::stdio::stderr(), Interest::WRITABLE)
    }

    fn new(fd: BorrowedFd<'_>, interest: Interest) -> io::Result<Self> {
        match watch(fd.try_clone_to_owned()?, interest) {
            Ok(watched) => Ok(Self::Watched(watched)),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::PERM) => {
                Ok(Self::NeverBlocks(fd.try_clone_to_owned()?))
            }
            Err(error) => Err(error),
        }
    }

    /// Reads what is there, at least one byte; 0 is the end.
    pub(crate) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let watched = match self {
            Self::NeverBlocks(fd) => return Ok(rustix::io::retry_on_intr(|| read(fd, &mut *buffer))?),
            Self::Watched(watched) => watched,
        };
        loop {
            let mut ready = watched.readable().await?;
            if let Ok(done) = ready.try_io(|fd| {
                ready_for(fd.get_ref(), PollFlags::IN)?;
                Ok(read(fd.get_ref(), &mut *buffer)?)
            }) {
                return done;
            }
        }
    }

    /// Writes everything.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let count = match self {
                Self::NeverBlocks(fd) => rustix::io::retry_on_intr(|| write(fd, bytes))?,
                Self::Watched(watched) => {
                    let mut ready = watched.writable().await?;
                    let written = ready.try_io(|fd| {
                        ready_for(fd.get_ref(), PollFlags::OUT)?;
                        Ok(write(fd.get_ref(), &bytes[..bytes.len().min(WRITE_MAX)])?)
                    });
                    match written {
                        Ok(written) => written?,
                        Err(_) => continue,
                    }
                }
            };
            bytes = &bytes[count..];
        }
        Ok(())
    }
}

/// Fails with `EWOULDBLOCK` when the descriptor would block.
fn ready_for(fd: &OwnedFd, flags: PollFlags) -> io::Result<()> {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut [PollFd::new(fd, flags)], Some(&now)) {
        Ok(0) | Err(Errno::INTR) => Err(io::ErrorKind::WouldBlock.into()),
        Ok(_) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::pipe::pipe;

    use super::*;

    #[tokio::test]
    async fn a_full_pipe_stops_the_writer_but_not_the_program() {
        let (reading, writing) = pipe().unwrap();
        let writer = HostStream::new(writing.as_fd(), Interest::WRITABLE).unwrap();
        drop(writing);
        let reader = HostStream::new(reading.as_fd(), Interest::READABLE).unwrap();
        let sent: Vec<u8> = (0..300_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let expected = sent.clone();
        let writing = tokio::spawn(async move { writer.write_all(&sent).await });
        // One thread runs both: if the writer blocked, nobody would ever read.
        let mut received = Vec::new();
        let mut buffer = [0; 10_000];
        loop {
            let count = reader.read(&mut buffer).await.unwrap();
            if count == 0 {
                break;
            }
            received.extend_from_slice(&buffer[..count]);
        }
        writing.await.unwrap().unwrap();
        assert_eq!(received, expected);
    }

    #[tokio::test]
    async fn a_reader_that_has_gone_is_a_broken_pipe() {
        let (reading, writing) = pipe().unwrap();
        let writer = HostStream::new(writing.as_fd(), Interest::WRITABLE).unwrap();
        drop(reading);
        assert_eq!(writer.write_all(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn regular_files_are_read_to_their_end() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "text").unwrap();
        let opened = std::fs::File::open(file.path()).unwrap();
        let stream = HostStream::new(opened.as_fd(), Interest::READABLE).unwrap();
        let mut buffer = [0; 10];
        assert_eq!(stream.read(&mut buffer).await.unwrap(), 4);
        assert_eq!(stream.read(&mut buffer).await.unwrap(), 0);
    }
}
