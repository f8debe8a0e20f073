//! What the host shares: one virtio-fs device, mounted when the first container needs it and there until the guest ends.
//!
//! Workers, the zygote and PID 1 are in one mount namespace, so what one worker mounts all the others have. The host's
//! server has one entry for each share, by its name, a directory or a single file.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use bulkhead_protocol::limits::SHARES_TAG;
use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags, flock,
    fstat, openat, openat2, statx,
};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

/// Where the shares are.
pub(crate) const DIRECTORY: &str = "/run/bulkhead/shares";

/// The longest read that the VMM serves, in KiB.
const READ_AHEAD_KIB: &str = "1024";

/// Why there is no share.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "the guest has no file system device {SHARES_TAG:?}: the host has plugged none, or it is not bound yet"
    )]
    NoDevice,
    #[error("the host shares nothing under the name {0}")]
    NoShare(String),
    #[error("share {0} is no {1}")]
    Kind(String, &'static str),
    #[error("{0} the shares")]
    Mount(&'static str, #[source] io::Error),
    #[error("open share {0}")]
    Open(String, #[source] io::Error),
}

/// The directory of all shares.
pub(super) struct Shares(OwnedFd);

/// Where a share is.
pub(super) fn path(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

impl Shares {
    /// Mounts the device if that has not been done. Something else that is mounted there is used as it is.
    ///
    /// # Errors
    /// [`Error::NoDevice`], or [`Error::Mount`] with the step that failed.
    pub(super) fn mounted() -> Result<Self, Error> {
        let failed = |step| move |error: Errno| Error::Mount(step, error.into());
        match fs::create_dir(DIRECTORY) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::Mount("make a directory for", error));
            }
            _ => {}
        }
        let open = |flags| openat(CWD, DIRECTORY, flags | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        if !is_mounted().map_err(failed("look for"))? {
            // Another worker may be about to do the same. What is locked is the directory beneath the mount, or, when that
            // worker was faster, nothing that matters.
            let beneath = open(OFlags::RDONLY).map_err(failed("open the place of"))?;
            flock(&beneath, FlockOperation::LockExclusive).map_err(failed("wait for the mount of"))?;
            if !is_mounted().map_err(failed("look for"))? {
                mount()?;
            }
        }
        open(OFlags::PATH).map(Self).map_err(failed("open"))
    }

    /// A mount of its own of a share that is a directory.
    ///
    /// # Errors
    /// [`Error`] names the share.
    pub(super) fn directory(&self, name: &str) -> Result<OwnedFd, Error> {
        // Opened as a directory, so that the kernel mounts the share's file system in its place first. To clone the place would bring a mount
        // that is covered by another as soon as somebody looks.
        let share = self.open(name, OFlags::DIRECTORY)?;
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        open_tree(&share, "", flags).map_err(|error| Error::Open(name.to_owned(), error.into()))
    }

    /// Makes sure that there is a share, and that its path can be followed: it is no link. A directory's file system is mounted in its place, so
    /// that all containers have the same: what a container looks up first in a mount namespace of its own, it has to itself.
    ///
    /// # Errors
    /// [`Error`] names the share.
    pub(super) fn check(&self, name: &str) -> Result<(), Error> {
        let share = match self.open(name, OFlags::DIRECTORY) {
            Err(Error::Kind(..)) => self.open(name, OFlags::empty())?,
            directory => directory?,
        };
        let status = fstat(&share).map_err(|error| Error::Open(name.to_owned(), error.into()))?;
        match FileType::from_raw_mode(status.st_mode) {
            FileType::Symlink => Err(Error::Kind(name.to_owned(), "file or directory")),
            _ => Ok(()),
        }
    }

    /// Opens the place of a share, or what [`OFlags::DIRECTORY`] makes of it.
    fn open(&self, name: &str, kind: OFlags) -> Result<OwnedFd, Error> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC | kind;
        openat2(&self.0, name, flags, Mode::empty(), ResolveFlags::BENEATH).map_err(|error| match error {
            Errno::NOENT => Error::NoShare(name.to_owned()),
            Errno::NOTDIR | Errno::LOOP => Error::Kind(name.to_owned(), "directory"),
            error => Error::Open(name.to_owned(), error.into()),
        })
    }
}

/// Whether anything is mounted in the shares' place.
///
/// # Errors
/// What the kernel said.
pub(crate) fn is_mounted() -> Result<bool, Errno> {
    is_mount(Path::new(DIRECTORY))
}

/// Has the kernel unmount what the host has taken back since: it looks for each share again, and lets go of what is not found.
pub(super) fn let_go() {
    // Most containers are the first of their guest.
    if !is_mounted().unwrap_or(false) {
        return;
    }
    let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") else { return };
    for place in mounts.lines().filter_map(|mount| mount.split(' ').nth(4)) {
        if Path::new(place).parent() == Some(Path::new(DIRECTORY)) {
            let _ = is_mount(Path::new(place));
        }
    }
}

/// Whether anything is mounted in a place.
///
/// # Errors
/// What the kernel said.
pub(super) fn is_mount(path: &Path) -> Result<bool, Errno> {
    // Nothing that the server would have to be asked for.
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC;
    let status = statx(CWD, path, flags, StatxFlags::empty())?;
    Ok(status.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Without options that would hold for all shares: a root must have what a root has, programs of other users among it.
fn mount() -> Result<(), Error> {
    let failed = |step| move |error: Errno| Error::Mount(step, error.into());
    let context = match fsopen("virtiofs", FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(context) => context,
        Err(Errno::NODEV) => return Err(Error::NoDevice),
        Err(error) => return Err(Error::Mount("open a file system for", error.into())),
    };
    fsconfig_set_string(&context, "source", SHARES_TAG).map_err(failed("name"))?;
    match fsconfig_create(&context) {
        Ok(()) => {}
        // virtio_fs_get_tree(): there is no device with that tag.
        Err(Errno::INVAL) => return Err(Error::NoDevice),
        Err(error) => return Err(Error::Mount("mount", error.into())),
    }
    let mounted =
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).map_err(failed("mount"))?;
    move_mount(&mounted, "", CWD, DIRECTORY, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(failed("attach"))?;
    if let Err(error) = read_ahead(&mounted) {
        tracing::warn!("shares are read in small pieces: {error}");
    }
    Ok(())
}

/// Has the kernel ask for as much at a time as one request can carry. Each costs two exits and two wake-ups.
fn read_ahead(mounted: &OwnedFd) -> io::Result<()> {
    let device = fstat(mounted)?.st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), READ_AHEAD_KIB)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn shares_are_entries_of_one_directory() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("tree")).unwrap();
        fs::write(directory.path().join("file"), "").unwrap();
        symlink("/etc", directory.path().join("link")).unwrap();
        let shares = Shares(File::open(directory.path()).unwrap().into());
        shares.check("tree").unwrap();
        shares.check("file").unwrap();
        assert!(matches!(shares.check("link"), Err(Error::Kind(..))));
        assert!(matches!(shares.check("none"), Err(Error::NoShare(_))));
        assert!(matches!(shares.directory("file"), Err(Error::Kind(..))));
        assert!(matches!(shares.directory("link"), Err(Error::Kind(..))));
        assert!(matches!(shares.directory("../x"), Err(Error::Open(..))), "no way up");
    }
}
