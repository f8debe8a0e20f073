//! A container's root: EROFS layers and what is written above them, or a directory that the host shares, mounted where only
//! the agent goes.
//!
//! Everything is made with the file-descriptor mount calls: overlayfs takes a layer a call (`lowerdir+`), where mount(2)
//! has one page for all of them, and no path in an image is ever followed.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::rootfs::Upper;
use bulkhead_protocol::agent::{BlockSource, Rootfs};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, fstatfs, mkdirat, openat, openat2, syncfs,
    unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};

use super::shares::{self, Shares};
use crate::guest;

/// What could not be mounted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Device(#[from] guest::Error),
    #[error("a root needs a layer, an ext4 device or a share")]
    Nothing,
    #[error("a share is the whole root: it has neither layers nor an upper")]
    Both,
    #[error(transparent)]
    Share(#[from] shares::Error),
    #[error("create {0}")]
    Create(PathBuf, #[source] io::Error),
    #[error("open {0}")]
    Open(PathBuf, #[source] io::Error),
    #[error("mount {what} ({step})")]
    Mount { what: String, step: &'static str, source: io::Error },
    #[error("unmount {0}")]
    Unmount(PathBuf, #[source] io::Error),
    #[error("{0} of the image is not a directory")]
    NotDirectory(&'static str),
    #[error("create the working directory {0}")]
    WorkingDirectory(PathBuf, #[source] io::Error),
}

/// Mounts `rootfs` at `directory/rootfs` and returns the root, opened. `directory` exists and is the container's alone.
///
/// # Errors
/// [`Error`] with the step that failed; [`remove`] undoes the rest.
pub(crate) fn mount(rootfs: &Rootfs, directory: &Path) -> Result<OwnedFd, Error> {
    let target = directory.join("rootfs");
    create_directory(&target)?;
    match (rootfs.lower.as_slice(), &rootfs.upper) {
        ([], None) if !rootfs.share.is_empty() => {
            attach(&Shares::mounted()?.directory(&rootfs.share)?, &target)?;
        }
        _ if !rootfs.share.is_empty() => return Err(Error::Both),
        ([], Some(Upper::Ext4(device))) => attach(&ext4(device)?, &target)?,
        ([], _) => return Err(Error::Nothing),
        ([layer], None) => attach(&erofs(layer)?, &target)?,
        (layers, upper) => overlay(layers, upper.as_ref(), directory, &target)?,
    }
    open_directory(&target)
}

/// Refuses a root whose mount points are links: libcontainer makes devices and links below `/dev` by path.
///
/// # Errors
/// [`Error::NotDirectory`] with the first of them.
pub(crate) fn check(root: &OwnedFd) -> Result<(), Error> {
    for name in ["dev", "proc", "sys"] {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat2(root, name, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS) {
            Ok(_) | Err(Errno::NOENT) => {}
            Err(_) => return Err(Error::NotDirectory(name)),
        }
    }
    Ok(())
}

/// Makes sure that the working directory exists, as Docker does, with root as its owner. `top` is the container's root, with
/// [`ResolveFlags::IN_ROOT`] for links, or what is mounted above it, with [`ResolveFlags::BENEATH`]; `path` has no `..`. One that is missing from
/// what is read-only, or that is behind a link out of a mount, is left to fail when it is entered.
///
/// # Errors
/// [`Error::WorkingDirectory`] when a part of it is no directory.
pub(crate) fn create_working_directory(top: &OwnedFd, path: &Path, links: ResolveFlags) -> Result<(), Error> {
    let fail = |error: Errno| Error::WorkingDirectory(path.to_owned(), error.into());
    let resolve = links | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut walked = PathBuf::new();
    let mut parent = rustix::io::dup(top).map_err(fail)?;
    for part in path.components() {
        let std::path::Component::Normal(name) = part else { continue };
        walked.push(name);
        // The whole path again each time: a link in it is resolved from the top.
        parent = match openat2(top, &walked, flags, Mode::empty(), resolve) {
            Ok(found) => found,
            Err(Errno::NOENT) => match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                Ok(()) => openat2(top, &walked, flags, Mode::empty(), resolve).map_err(fail)?,
                Err(Errno::ROFS) => return Ok(()),
                Err(error) => return Err(fail(error)),
            },
            Err(Errno::XDEV) => return Ok(()),
            Err(error) => return Err(fail(error)),
        };
    }
    Ok(())
}

/// Unmounts the root and removes the container's directory. What was never made is fine.
///
/// # Errors
/// [`Error::Unmount`] when it is in use, which nothing of the container's should be.
pub(crate) fn remove(directory: &Path) -> Result<(), Error> {
    for name in ["rootfs", "upper"] {
        write_back(&directory.join(name));
    }
    unmount_if_mounted(&directory.join("rootfs"))?;
    unmount_parts(directory)?;
    let parent = directory.parent().unwrap_or(Path::new("/"));
    let Some(name) = directory.file_name() else { return Ok(()) };
    let removed = openat(CWD, parent, DIRECTORY, Mode::empty()).and_then(|parent| remove_tree(&parent, name));
    removed.map_err(|error| Error::Unmount(directory.to_owned(), error.into()))
}

const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Removes a directory and what is in it, but never enters a mount: what is mounted there is an image's or the host's.
///
/// # Errors
/// EXDEV when something is mounted below, or what else the kernel said. What was never there is fine.
fn remove_tree(parent: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let directory = match openat2(parent, name, DIRECTORY, Mode::empty(), resolve) {
        Ok(directory) => directory,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        match entry.file_type() {
            _ if name == "." || name == ".." => {}
            FileType::Directory => remove_tree(&directory, name)?,
            _ => unlinkat(&directory, name, AtFlags::empty())?,
        }
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// overlayfs keeps what it is made of alive, so the parts are reachable by a path only while it is put together.
fn overlay(
    layers: &[BlockSource],
    upper: Option<&Upper>,
    directory: &Path,
    target: &Path,
) -> Result<(), Error> {
    let what = || format!("overlay of {} layers", layers.len());
    let context = open("overlay", &what())?;
    let failed = |step| move |error: Errno| Error::Mount { what: what(), step, source: error.into() };
    fsconfig_set_string(&context, "source", "overlay").map_err(failed("source"))?;
    let layers_at = directory.join("layers");
    create_directory(&layers_at)?;
    for (number, layer) in layers.iter().enumerate() {
        let layer_at = layers_at.join(number.to_string());
        create_directory(&layer_at)?;
        attach(&erofs(layer)?, &layer_at)?;
        fsconfig_set_string(&context, "lowerdir+", &layer_at).map_err(failed("lowerdir+"))?;
    }
    if let Some(upper) = upper {
        let upper_at = directory.join("upper");
        create_directory(&upper_at)?;
        let mounted = match upper {
            Upper::TmpfsBytes(bytes) => tmpfs(*bytes, "0755", MountAttrFlags::empty())?,
            Upper::Ext4(device) => ext4(device)?,
            // A field that a newer host knows.
            _ => return Err(Error::Nothing),
        };
        attach(&mounted, &upper_at)?;
        for (key, name) in [("upperdir", "upper"), ("workdir", "work")] {
            create_directory(&upper_at.join(name))?;
            fsconfig_set_string(&context, key, upper_at.join(name)).map_err(failed("upperdir or workdir"))?;
        }
    }
    let read_only = if upper.is_none() { MountAttrFlags::MOUNT_ATTR_RDONLY } else { MountAttrFlags::empty() };
    let mounted = create(&context, &what(), read_only)?;
    attach(&mounted, target)?;
    unmount_parts(directory)
}

/// Has a disk that is mounted there get what was written to it. Unmounting does that, too, but only when it can be seen no more: whoever
/// tried again, because it took too long, would find nothing to wait for.
fn write_back(mounted: &Path) {
    let Ok(root) = openat(CWD, mounted, DIRECTORY, Mode::empty()) else { return };
    if fstatfs(&root).is_ok_and(|stat| stat.f_type == libc::EXT4_SUPER_MAGIC) {
        // An error is in the kernel's log, and does not keep the container.
        let _ = syncfs(&root);
    }
}

/// Unmounts what an overlay was made of.
fn unmount_parts(directory: &Path) -> Result<(), Error> {
    unmount_if_mounted(&directory.join("upper"))?;
    let layers = fs::read_dir(directory.join("layers")).into_iter().flatten().flatten();
    layers.map(|entry| entry.path()).try_for_each(|layer| unmount_if_mounted(&layer))
}

/// Whatever is mounted, one above the other.
fn unmount_if_mounted(target: &Path) -> Result<(), Error> {
    loop {
        match unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(Error::Unmount(target.to_owned(), error.into())),
        }
    }
}

fn erofs(source: &BlockSource) -> Result<OwnedFd, Error> {
    device_mount("erofs", source, &[], MountAttrFlags::MOUNT_ATTR_RDONLY)
}

fn ext4(source: &BlockSource) -> Result<OwnedFd, Error> {
    // A thread of the kernel's would write zeros where a sparse file has them, until the file is a sixtieth of the disk.
    device_mount("ext4", source, &["noinit_itable"], MountAttrFlags::empty())
}

fn device_mount(
    kind: &str,
    source: &BlockSource,
    flags: &[&'static str],
    attributes: MountAttrFlags,
) -> Result<OwnedFd, Error> {
    let device = guest::block_device(source.slot, source.partition)?;
    let what = format!("{} as {kind}", device.display());
    let context = open(kind, &what)?;
    let failed = |step| {
        let what = what.clone();
        move |error: Errno| Error::Mount { what, step, source: error.into() }
    };
    fsconfig_set_string(&context, "source", &device).map_err(failed("source"))?;
    for flag in flags {
        fsconfig_set_flag(&context, *flag).map_err(failed(flag))?;
    }
    create(&context, &what, attributes)
}

/// A tmpfs of at most so many bytes, whose root has this mode.
///
/// # Errors
/// [`Error::Mount`]
pub(super) fn tmpfs(bytes: u64, mode: &str, attributes: MountAttrFlags) -> Result<OwnedFd, Error> {
    let what = format!("tmpfs of {bytes} bytes");
    let context = open("tmpfs", &what)?;
    let size = bytes.to_string();
    for (key, value) in [("source", "tmpfs"), ("size", size.as_str()), ("mode", mode)] {
        fsconfig_set_string(&context, key, value).map_err(|error| Error::Mount {
            what: what.clone(),
            step: "size",
            source: error.into(),
        })?;
    }
    create(&context, &what, attributes)
}

fn open(kind: &str, what: &str) -> Result<OwnedFd, Error> {
    fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|error| Error::Mount {
        what: what.into(),
        step: "fsopen",
        source: error.into(),
    })
}

fn create(context: &OwnedFd, what: &str, attributes: MountAttrFlags) -> Result<OwnedFd, Error> {
    let failed = |step| move |error: Errno| Error::Mount { what: what.into(), step, source: error.into() };
    if attributes.contains(MountAttrFlags::MOUNT_ATTR_RDONLY) {
        fsconfig_set_flag(context, "ro").map_err(failed("ro"))?;
    }
    fsconfig_create(context).map_err(failed("create"))?;
    fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("fsmount"))
}

/// Mounts it in a place.
///
/// # Errors
/// [`Error::Mount`]
pub(super) fn attach(mounted: &OwnedFd, target: &Path) -> Result<(), Error> {
    move_mount(mounted, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(|error| {
        Error::Mount { what: target.display().to_string(), step: "move_mount", source: error.into() }
    })
}

/// Makes a directory unless it is there.
///
/// # Errors
/// [`Error::Create`]
pub(super) fn create_directory(path: &Path) -> Result<(), Error> {
    match fs::create_dir(path) {
        // A scratch disk that was used before has its directories.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(|error| Error::Create(path.to_owned(), error)),
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).map_err(|error| Error::Open(path.to_owned(), error.into()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let directory = tempfile::tempdir().unwrap();
        let opened = open_directory(directory.path()).unwrap();
        (directory, opened)
    }

    #[test]
    fn a_root_with_a_link_for_a_mount_point_is_refused() {
        let (directory, opened) = root();
        fs::create_dir(directory.path().join("proc")).unwrap();
        check(&opened).unwrap();
        symlink("/tmp", directory.path().join("dev")).unwrap();
        assert!(matches!(check(&opened), Err(Error::NotDirectory("dev"))));
    }

    #[test]
    fn a_working_directory_is_made_within_the_root() {
        let (directory, opened) = root();
        let outside = tempfile::tempdir().unwrap();
        symlink(outside.path(), directory.path().join("out")).unwrap();
        create_working_directory(&opened, Path::new("/a//b/c"), ResolveFlags::IN_ROOT).unwrap();
        assert!(directory.path().join("a/b/c").is_dir());
        // The link leads to a path that does not exist below the root: nothing is made anywhere.
        assert!(create_working_directory(&opened, Path::new("/out/x"), ResolveFlags::IN_ROOT).is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_working_directory_behind_a_link_out_of_a_mount_is_left_alone() {
        let (directory, opened) = root();
        symlink("/tmp", directory.path().join("out")).unwrap();
        fs::create_dir(directory.path().join("inner")).unwrap();
        symlink("inner", directory.path().join("in")).unwrap();
        create_working_directory(&opened, Path::new("out/x"), ResolveFlags::BENEATH).unwrap();
        create_working_directory(&opened, Path::new("in/x"), ResolveFlags::BENEATH).unwrap();
        assert!(directory.path().join("inner/x").is_dir());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_containers_directory_is_removed_whole_and_links_in_it_are_not_followed() {
        let parent = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("file"), "kept").unwrap();
        let directory = parent.path().join("a");
        fs::create_dir_all(directory.join("layers/0/deep")).unwrap();
        fs::write(directory.join("config.json"), "{}").unwrap();
        symlink(outside.path(), directory.join("layers/link")).unwrap();
        remove(&directory).unwrap();
        remove(&directory).unwrap();
        assert!(!directory.exists());
        assert_eq!(fs::read(outside.path().join("file")).unwrap(), b"kept");
    }

    #[test]
    fn what_is_mounted_is_not_removed() {
        let root = openat(CWD, "/", DIRECTORY, Mode::empty()).unwrap();
        assert_eq!(remove_tree(&root, OsStr::new("proc")), Err(Errno::XDEV));
    }

    #[test]
    fn a_root_of_nothing_or_of_two_kinds_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        assert!(matches!(mount(&Rootfs::default(), directory.path()), Err(Error::Nothing)));
        let upper = Some(Upper::TmpfsBytes(1));
        let both = Rootfs { share: "s".into(), upper, ..Rootfs::default() };
        assert!(matches!(mount(&both, directory.path()), Err(Error::Both)));
    }
}
