//! Fifos and pipes, read and written without waiting for anybody else.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bulkhead_sandbox::watch::watch;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::{read, write};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::IoError;

/// A fifo that output goes to.
#[derive(Debug)]
pub(super) struct Output {
    pipe: Pipe,
    /// Kept, so that a reader may go away and come back without the process meeting a broken pipe.
    _reader: OwnedFd,
}

impl Output {
    /// Opens a fifo; nothing when what is there is none.
    pub(super) fn open(path: &Path) -> Result<Option<Self>, IoError> {
        let opening = || -> io::Result<Option<Self>> {
            if !std::fs::metadata(path)?.file_type().is_fifo() {
                return Ok(None);
            }
            // The end for reading first: without one, the other cannot be opened without waiting.
            let reader = open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
            let writer = open(path, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
            Ok(Some(Self { pipe: Pipe::new(writer)?, _reader: reader }))
        };
        opening().map_err(|error| IoError::Open(path.to_owned(), error))
    }

    /// Writes everything, however long it takes until somebody reads.
    pub(super) async fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        self.pipe.write_all(bytes).await
    }
}

/// The end of a pipe that is written to.
#[derive(Debug)]
pub(super) struct Pipe(AsyncFd<OwnedFd>);

impl Pipe {
    /// Takes an end that does not block.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        watch(fd, Interest::WRITABLE).map(Self)
    }

    /// Writes everything.
    pub(super) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut ready = self.0.writable().await?;
            // Otherwise it was not ready after all.
            if let Ok(written) =
                ready.try_io(|fd| Ok(rustix::io::retry_on_intr(|| write(fd.get_ref(), bytes))?))
            {
                bytes = &bytes[written?..];
            }
        }
        Ok(())
    }
}

/// A fifo that input comes from. It ends with its last writer, of which the shim is one while it holds the input.
#[derive(Debug)]
pub(super) struct Input {
    fifo: AsyncFd<OwnedFd>,
    hold: Mutex<Hold>,
}

/// Whether the shim has an end of a fifo for writing of its own.
#[derive(Debug)]
enum Hold {
    NotYet,
    Held { _writer: OwnedFd },
    Over,
}

impl Input {
    /// Opens a fifo.
    pub(super) fn open(path: &Path) -> Result<Self, IoError> {
        let opening = || -> io::Result<Self> {
            let fifo = open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
            let file = File::from(fifo);
            if !file.metadata()?.file_type().is_fifo() {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a fifo"));
            }
            Ok(Self { fifo: watch(file.into(), Interest::READABLE)?, hold: Mutex::new(Hold::NotYet) })
        };
        opening().map_err(|error| IoError::Open(path.to_owned(), error))
    }

    /// Reads what is there, at least one byte; 0 is the end, when the last writer has gone.
    ///
    /// The kernel does not report the lack of a writer before there has been one (`pipe_poll` in its fs/pipe.c), so this waits for
    /// the first one however long it takes.
    pub(super) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.fifo.readable().await?;
            // What tokio has once heard of an end it reports for ever: a writer that came later would have this spin.
            let has_ended = ready.ready().is_read_closed();
            match ready.try_io(|fd| Ok(rustix::io::retry_on_intr(|| read(fd.get_ref(), &mut *buffer))?)) {
                Ok(count) => return count,
                Err(_) if has_ended => return Ok(0),
                Err(_) => {}
            }
        }
    }

    /// From here on writers may go and come back without an end of the input, until it is closed. An end that was there before stays
    /// one, and so does one that comes because there is no descriptor left.
    pub(super) fn hold(&self) {
        let mut hold = self.locked();
        if matches!(*hold, Hold::NotYet) && !self.has_ended() {
            match self.writer() {
                Ok(writer) => *hold = Hold::Held { _writer: writer },
                Err(error) => tracing::warn!(%error, "a container's input will end with its writer"),
            }
        }
    }

    /// From here on the input ends with its last writer; at once when there is none, even if there never was.
    pub(super) fn close(&self) {
        let mut hold = self.locked();
        if matches!(*hold, Hold::NotYet)
            && let Err(error) = self.writer()
        {
            tracing::warn!(%error, "a container's input will not end before it has a writer");
        }
        *hold = Hold::Over;
    }

    /// Whether a writer has come, and the last one gone.
    fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.fifo.get_ref(), PollFlags::empty())];
        poll(&mut fds, Some(&Timespec::default())).is_ok() && fds[0].revents().contains(PollFlags::HUP)
    }

    /// An end for writing; of the very fifo, whatever has become of its name.
    fn writer(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.fifo.as_raw_fd());
        Ok(open(path, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
    }

    fn locked(&self) -> MutexGuard<'_, Hold> {
        self.hold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::OpenOptionsExt;

    use rustix::fs::{CWD, FileType, mknodat};
    use tokio::time::{Duration, timeout};

    use super::*;

    fn fifo(directory: &Path) -> std::path::PathBuf {
        let path = directory.join("fifo");
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        path
    }

    #[tokio::test]
    async fn output_waits_for_a_reader_that_may_go_and_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path());
        let output = Output::open(&path).unwrap().unwrap();
        let everything = vec![7; 300_000];
        let expected = everything.len();
        let writing = tokio::spawn(async move { output.write_all(&everything).await });
        let read = move |most: u64| {
            let path = path.clone();
            tokio::task::spawn_blocking(move || {
                let mut bytes = Vec::new();
                File::open(path).unwrap().take(most).read_to_end(&mut bytes).unwrap();
                bytes.len()
            })
        };
        let first = read(100_000).await.unwrap();
        assert_eq!((first, writing.is_finished()), (100_000, false));
        assert_eq!(first + read(u64::MAX).await.unwrap(), expected);
        writing.await.unwrap().unwrap();
    }

    fn writer(path: &Path) -> File {
        File::options().write(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
    }

    /// Checks that there is neither input nor its end.
    async fn expect_nothing(input: &Input) {
        let early = timeout(Duration::from_millis(50), input.read(&mut [0; 10])).await;
        assert!(early.is_err(), "{early:?}");
    }

    async fn expect_end(input: &Input) {
        let end = timeout(Duration::from_secs(10), input.read(&mut [0; 10])).await;
        assert_eq!(end.expect("no end").unwrap(), 0);
    }

    #[tokio::test]
    async fn input_waits_for_its_first_writer_and_ends_with_its_last() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path());
        let input = Input::open(&path).unwrap();
        expect_nothing(&input).await;
        let mut writer = writer(&path);
        writer.write_all(b"words").unwrap();
        assert_eq!(input.read(&mut [0; 10]).await.unwrap(), 5);
        expect_nothing(&input).await;
        drop(writer);
        expect_end(&input).await;
        // It is too late.
        input.hold();
        expect_end(&input).await;
    }

    #[tokio::test]
    async fn input_that_is_held_goes_on_without_writers_until_it_is_closed() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path());
        for is_held_first in [true, false] {
            let input = Input::open(&path).unwrap();
            let mut first = if is_held_first {
                input.hold();
                writer(&path)
            } else {
                let first = writer(&path);
                input.hold();
                first
            };
            first.write_all(b"first").unwrap();
            drop(first);
            assert_eq!(input.read(&mut [0; 10]).await.unwrap(), 5);
            expect_nothing(&input).await;
            let mut later = writer(&path);
            later.write_all(b"later").unwrap();
            input.close();
            assert_eq!(input.read(&mut [0; 10]).await.unwrap(), 5);
            // Another client may have more.
            expect_nothing(&input).await;
            drop(later);
            expect_end(&input).await;
        }
    }

    #[tokio::test]
    async fn input_that_is_closed_before_it_has_a_writer_ends_and_is_not_held_later() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path());
        let input = Input::open(&path).unwrap();
        input.close();
        input.hold();
        expect_end(&input).await;
    }

    #[tokio::test]
    async fn an_end_that_was_heard_of_stays_one_although_another_writer_comes() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path());
        let input = Input::open(&path).unwrap();
        drop(writer(&path));
        assert!(input.fifo.readable().await.unwrap().ready().is_read_closed());
        let _another = writer(&path);
        input.hold();
        expect_end(&input).await;
    }

    #[tokio::test]
    async fn what_is_no_fifo_is_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "").unwrap();
        assert!(Output::open(&path).unwrap().is_none());
        assert!(matches!(Input::open(&path), Err(IoError::Open(..))));
        assert!(matches!(Output::open(&directory.path().join("none")), Err(IoError::Open(..))));
    }
}
