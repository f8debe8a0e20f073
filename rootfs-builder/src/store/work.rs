//! The directory of one import under way. It is locked as long as the import lives, so that another process can tell what
//! a crash has left.

use std::fs::File;
use std::path::Path;

use rustix::fs::FlockOperation;
use tempfile::TempDir;

use super::{Error, failed};

pub(super) struct Work {
    // Declared first: the directory goes before its lock does.
    directory: TempDir,
    _lock: File,
}

impl Work {
    /// Makes one. The caller holds the store's lock, or `remove_stale` could come between making and locking.
    pub(super) fn new(parent: &Path) -> Result<Self, Error> {
        let directory = TempDir::new_in(parent).map_err(failed("creating a directory in", parent))?;
        let path = directory.path().to_path_buf();
        let lock = File::open(&path).map_err(failed("opening", &path))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|error| failed("locking", &path)(error.into()))?;
        Ok(Self { directory, _lock: lock })
    }

    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// Removes the directories that no living import has locked. The caller holds the store's lock.
pub(super) fn remove_stale(parent: &Path) -> Result<(), Error> {
    for entry in std::fs::read_dir(parent).map_err(failed("reading", parent))? {
        let path = entry.map_err(failed("reading", parent))?.path();
        // Plain files are made under the store's lock only.
        if path.is_file() {
            std::fs::remove_file(&path).map_err(failed("removing", &path))?;
            continue;
        }
        let Ok(directory) = File::open(&path) else { continue };
        if rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive).is_ok() {
            std::fs::remove_dir_all(&path).map_err(failed("removing", &path))?;
        }
    }
    Ok(())
}
