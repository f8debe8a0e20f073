//! Fifos and pipes, read and written without waiting for anybody else.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use bulkhead_sandbox::watch::watch;
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

/// A fifo that input comes from.
#[derive(Debug)]
pub(super) struct Input(AsyncFd<OwnedFd>);

impl Input {
    /// Opens a fifo, or a file.
    pub(super) fn open(path: &Path) -> Result<Self, IoError> {
        let opening = || -> io::Result<Self> {
            let fifo = open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
            let file = File::from(fifo);
            if !file.metadata()?.file_type().is_fifo() {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a fifo"));
            }
            watch(file.into(), Interest::READABLE).map(Self)
        };
        opening().map_err(|error| IoError::Open(path.to_owned(), error))
    }

    /// Reads what is there, at least one byte; 0 is the end, when the last writer has gone.
    ///
    /// The kernel does not report the lack of a writer before there has been one (`pipe_poll` in its fs/pipe.c), so this waits for
    /// the first one however long it takes.
    pub(super) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(count) =
                ready.try_io(|fd| Ok(rustix::io::retry_on_intr(|| read(fd.get_ref(), &mut *buffer))?))
            {
                return count;
            }
        }
    }

    /// Reads what is there without waiting; 0 when there is nothing, now or for ever.
    pub(super) fn read_now(&self, buffer: &mut [u8]) -> usize {
        rustix::io::retry_on_intr(|| read(self.0.get_ref(), &mut *buffer)).unwrap_or(0)
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

    #[tokio::test]
    async fn input_waits_for_its_first_writer_and_ends_with_its_last() {
        let directory = tempfile::tempdir().unwrap();
        let path = fifo(directory.path());
        let input = Input::open(&path).unwrap();
        let mut buffer = [0; 10];
        let early = timeout(Duration::from_millis(50), input.read(&mut buffer)).await;
        assert!(early.is_err(), "an end although there was no writer: {early:?}");
        let mut writer = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        writer.write_all(b"words").unwrap();
        assert_eq!(input.read(&mut buffer).await.unwrap(), 5);
        assert_eq!(input.read_now(&mut buffer), 0);
        drop(writer);
        assert_eq!(input.read(&mut buffer).await.unwrap(), 0);
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
