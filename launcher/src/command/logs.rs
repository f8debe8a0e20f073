//! `logs`: replays what a container has written, each stream to its own.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bulkhead_protocol::stream::Stream;
use bulkhead_sandbox::paths::Paths;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify;
use rustix::io::Errno;

use crate::cli::LogsArgs;
use crate::container::registry::Registry;
use crate::failure::Failure;
use crate::log::{CURRENT, PREVIOUS, parse};

/// Shows a container's log, and with `-f` what is added to it until the container ends.
pub(crate) fn logs(args: &LogsArgs) -> Result<u8, Failure> {
    let registry = Registry::open(&Paths::from_environment())?;
    let container = registry.find(&args.container)?;
    let directory = registry.data_directory(&container.record.id);
    let supervisor = if args.follow { registry.supervisor(&container)? } else { None };
    let shown = show(&directory, supervisor);
    match shown {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Failure::new(format!(
            "container {} has no log: one that runs in the foreground with --rm keeps none",
            container.record.name
        ))),
        // Whoever reads has seen enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(0),
        other => other.map(|()| 0).map_err(|e| Failure::from(e).context("cannot show the log")),
    }
}

fn show(directory: &Path, supervisor: Option<OwnedFd>) -> io::Result<()> {
    // Watched before the first read, so that nothing is missed.
    let changes = match supervisor {
        Some(supervisor) => Some((watch(directory)?, supervisor)),
        None => None,
    };
    let mut log = Log::open(directory)?;
    loop {
        log.replay()?;
        let Some((changes, supervisor)) = &changes else { return Ok(()) };
        if !wait(changes, supervisor)? {
            return log.replay();
        }
    }
}

fn watch(directory: &Path) -> io::Result<OwnedFd> {
    let watcher = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&watcher, directory, inotify::WatchFlags::MODIFY | inotify::WatchFlags::MOVED_FROM)?;
    Ok(watcher)
}

/// Waits until the log has changed; false when the container has ended.
fn wait(changes: &OwnedFd, supervisor: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(changes, PollFlags::IN), PollFd::new(supervisor, PollFlags::IN)];
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    let ended = !fds[1].revents().is_empty();
    let mut events = [0; 4096];
    loop {
        match rustix::io::read(changes, &mut events) {
            Ok(_) => {}
            Err(Errno::AGAIN) => return Ok(!ended),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// The log's files, read one after the other.
struct Log {
    current: PathBuf,
    file: BufReader<File>,
    line: Vec<u8>,
}

impl Log {
    /// The log from its beginning: from the file before the current one, if there is one.
    fn open(directory: &Path) -> io::Result<Self> {
        let file = match File::open(directory.join(PREVIOUS)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => File::open(directory.join(CURRENT))?,
            other => other?,
        };
        Ok(Self { current: directory.join(CURRENT), file: BufReader::new(file), line: Vec::new() })
    }

    /// Replays whole lines until there are no more for now.
    fn replay(&mut self) -> io::Result<()> {
        loop {
            while self.file.read_until(b'\n', &mut self.line)? > 0 {
                // A line that is just being written comes whole the next time.
                let Some(line) = self.line.strip_suffix(b"\n") else { break };
                match parse(line) {
                    Some((Stream::Stderr, output)) => write(io::stderr().lock(), &output)?,
                    Some((_, output)) => write(io::stdout().lock(), &output)?,
                    None => {}
                }
                self.line.clear();
            }
            // Read to its end, and no longer the current file: the next one.
            match fs::metadata(&self.current) {
                Ok(current) if current.ino() != self.file.get_ref().metadata()?.ino() => {
                    self.file = BufReader::new(File::open(&self.current)?);
                }
                Ok(_) => return Ok(()),
                // Removed with its container, or between two names: what comes will be seen by the next call.
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(e) => return Err(e),
            }
        }
    }
}

fn write(mut to: impl Write, output: &[u8]) -> io::Result<()> {
    to.write_all(output)?;
    to.flush()
}
