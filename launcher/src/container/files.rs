//! The files and directories of containers: what they are called, which are locked, and how they are removed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::failure::Failure;

/// Name of the lock in a run directory, and of the one for the whole registry.
pub(super) const LOCK_FILE: &str = ".lock";
/// Name of the disk that a container writes to, in a data directory.
pub(super) const SCRATCH_FILE: &str = "scratch.ext4";
/// Name of a root that was packed from a directory, in a data directory.
pub(super) const PACKED_FILE: &str = "root.erofs";

/// Removes the disks of a container that has ended.
pub(super) fn remove_disks(data: &Path) -> Result<(), Failure> {
    for name in [SCRATCH_FILE, PACKED_FILE] {
        match fs::remove_file(data.join(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Failure::from(e).context(&format!("cannot remove {}", data.join(name).display())));
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

pub(super) fn remove_directory(path: &Path) -> Result<(), Failure> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Failure::from(e).context(&format!("cannot remove {}", path.display())))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

pub(super) fn subdirectories(path: &Path) -> Result<Vec<PathBuf>, Failure> {
    let failed = |e| Failure::from(e).context(&format!("cannot list {}", path.display()));
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// The lock of a directory, made if need be. Nobody holds it yet.
pub(super) fn lock_file(directory: &Path) -> Result<File, Failure> {
    let path = directory.join(LOCK_FILE);
    let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
    file.map_err(|e| Failure::from(e).context(&format!("cannot open the lock {}", path.display())))
}

pub(super) fn is_locked(directory: &Path) -> Result<bool, Failure> {
    let lock = match File::open(directory.join(LOCK_FILE)) {
        Ok(lock) => lock,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Failure::from(e).context("cannot tell whether a container runs")),
    };
    match flock(&lock, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(false),
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(errno) => Err(Failure::from(errno).context("cannot tell whether a container runs")),
    }
}
