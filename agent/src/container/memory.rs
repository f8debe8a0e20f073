//! Memory that containers have in common as files: a tmpfs for each name, made for the first container that mounts it and there until the
//! guest ends. What is in it counts as the memory of the container that put it there.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, mkdirat, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen, move_mount,
};

use super::shares::is_mount;

/// Where it is.
const DIRECTORY: &str = "/run/bulkhead/memory";

/// Why there is none.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step} the memory {name}")]
pub(crate) struct Error {
    step: &'static str,
    name: String,
    source: io::Error,
}

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
        let failed = |step| move |errno: Errno| Error { step, name: self.name.clone(), source: errno.into() };
        let path = self.path();
        for directory in [Path::new(DIRECTORY), &path] {
            match mkdirat(CWD, directory, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(failed("make a directory for")(errno)),
            }
        }
        // Another worker may be about to do the same.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let all = openat(CWD, DIRECTORY, flags, Mode::empty()).map_err(failed("open the place of"))?;
        flock(&all, FlockOperation::LockExclusive).map_err(failed("wait for"))?;
        if is_mount(&path).map_err(failed("look for"))? {
            return Ok(());
        }
        let context =
            fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("open a file system for"))?;
        for (key, value) in [("mode", "1777".to_owned()), ("size", self.bytes.to_string())] {
            fsconfig_set_string(&context, key, value).map_err(failed("set up"))?;
        }
        fsconfig_create(&context).map_err(failed("create"))?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let mounted =
            fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("mount"))?;
        move_mount(&mounted, "", CWD, &path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(failed("attach"))
    }
}
