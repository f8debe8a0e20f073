//! Memory that containers have in common as files: a tmpfs for each name, made for the first container that mounts it and there until the
//! guest ends. What is in it counts as the memory of the container that put it there.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::mount::MountAttrFlags;

use super::rootfs::{self, Error};
use super::shares::is_mount;

/// Where it is.
const DIRECTORY: &str = "/run/bulkhead/memory";

/// Memory with a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Memory {
    /// Its name, an id.
    pub(super) name: String,
    /// Most bytes that it may take.
    pub(super) bytes: u64,
}

impl Memory {
    /// Where it is mounted.
    pub(super) fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// Mounts it if that has not been done.
    ///
    /// # Errors
    /// [`Error`] with the step that failed.
    pub(super) fn mount(&self) -> Result<(), Error> {
        let path = self.path();
        rootfs::create_directory(Path::new(DIRECTORY))?;
        rootfs::create_directory(&path)?;
        // Another worker may be about to do the same.
        let _locked = File::open(DIRECTORY)
            .and_then(|all| all.lock().map(|()| all))
            .map_err(|error| Error::Open(DIRECTORY.into(), error))?;
        if is_mount(&path).map_err(|error| Error::Open(path.clone(), error.into()))? {
            return Ok(());
        }
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        rootfs::attach(&rootfs::tmpfs(self.bytes, "1777", attributes)?, &path)
    }
}
