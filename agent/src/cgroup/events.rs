//! Files of cgroup v2 that wake whoever polls them when they change: `cgroup.events` and `memory.events`.
//!
//! The kernel compares with the last read of the same open file (`kernfs_generic_poll`), so the file that is polled is the
//! one that has to be read: otherwise every poll returns at once.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tokio::io::Interest;

use super::{Error, parse_table};
use crate::descriptor::watch_changes;

/// Longest content that is read, in bytes; both files are a few short lines.
const CONTENT_MAX: usize = 4096;

/// An open file of lines of a name and a number.
pub(crate) struct Events {
    file: File,
    path: PathBuf,
}

impl Events {
    pub(super) fn open(directory: &Path, name: &str) -> Result<Self, Error> {
        let path = directory.join(name);
        match File::open(&path) {
            Ok(file) => Ok(Self { file, path }),
            Err(error) => Err(Error::Read(path, error)),
        }
    }

    /// Blocks until the file says what `holds` wants, and returns true; false when it does not by `until`.
    pub(super) fn wait(
        &self,
        until: Instant,
        holds: impl Fn(&HashMap<String, u64>) -> bool,
    ) -> Result<bool, Error> {
        while !holds(&read(&self.file, &self.path)?) {
            let left = Timespec::try_from(until.saturating_duration_since(Instant::now())).ok();
            match poll(&mut [PollFd::new(&self.file, PollFlags::PRI)], left.as_ref()) {
                Ok(0) => return Ok(false),
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(Error::Read(self.path.clone(), error.into())),
            }
        }
        Ok(true)
    }

    /// Completes with what `find` makes of the file, now or after a change.
    ///
    /// # Errors
    /// [`Error::Read`]; with `ENODEV` when the group has been removed.
    pub(crate) async fn find<T>(
        self,
        mut find: impl FnMut(&HashMap<String, u64>) -> Option<T>,
    ) -> Result<T, Error> {
        let failed = |error| Error::Read(self.path.clone(), error);
        let watched = watch_changes(self.file.into()).map_err(failed)?;
        loop {
            let file = watched.get_ref().as_fd().try_clone_to_owned().map_err(failed)?;
            if let Some(found) = find(&read(&file.into(), &self.path)?) {
                return Ok(found);
            }
            // Cleared before the next read: a change after that read is news.
            watched.ready(Interest::PRIORITY).await.map_err(failed)?.clear_ready();
        }
    }
}

fn read(file: &File, path: &Path) -> Result<HashMap<String, u64>, Error> {
    let mut content = [0; CONTENT_MAX];
    let length = file.read_at(&mut content, 0).map_err(|error| Error::Read(path.to_owned(), error))?;
    Ok(parse_table(&String::from_utf8_lossy(&content[..length])))
}
