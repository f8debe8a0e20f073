//! Host directories and files as mounts that nobody has mounted anywhere: the file server gets a descriptor of each, and the
//! mount is gone when the last descriptor is.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::libc;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, open_tree,
};

/// Longest value of an option that the kernel takes, in bytes.
const VALUE_MAX: usize = 255;

/// How long an overlay waits for another mount of its upper directory to go, and how often it looks.
const IN_USE_TIMEOUT: Duration = Duration::from_secs(2);
const IN_USE_PAUSE: Duration = Duration::from_millis(20);

/// Why a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// It is not there, or cannot be cloned.
    #[error("cannot share {0}")]
    Open(PathBuf, #[source] io::Error),
    /// Its attributes cannot be set.
    #[error("cannot make the share of {0} private")]
    Attributes(PathBuf, #[source] io::Error),
    /// The overlay cannot be mounted.
    #[error("cannot mount an overlay ({step})")]
    Overlay {
        /// What the kernel refused.
        step: String,
        /// Why.
        source: io::Error,
    },
    /// A value is too long for the kernel.
    #[error(
        "the overlay's {0} has more than {VALUE_MAX} bytes: keep containerd's directory nearer to the root"
    )]
    Long(String),
}

/// Whether what is mounted below a directory is shared with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Only the file system that the directory is on (`bind`).
    One,
    /// Everything below (`rbind`).
    All,
}

/// A private copy of the mount of `path`, which may be a file.
///
/// # Errors
/// [`ShareError`] when it does not exist or the kernel refuses.
pub fn bind(path: &Path, depth: Depth, read_only: bool) -> Result<OwnedFd, ShareError> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if depth == Depth::All {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let mount = open_tree(CWD, path, flags).map_err(|e| ShareError::Open(path.to_owned(), e.into()))?;
    restrict(&mount, depth, read_only).map_err(|e| ShareError::Attributes(path.to_owned(), e))?;
    Ok(mount)
}

/// An overlay, from the options of a mount of type `overlay`, in which a file keeps its inode number.
///
/// The guest tells files apart by that. As overlays are by default, the names of a file of a lower layer become files of their own when they
/// are written to (`index`), and directories of layers on different file systems may get another number at any time (`xino`). Where the
/// kernel cannot do better, it is as the options say: while another mount has the same upper directory, for one. Blocks.
///
/// # Errors
/// [`ShareError`] names the option that the kernel refused.
pub fn overlay(options: &[String]) -> Result<OwnedFd, ShareError> {
    let has =
        |key: &str| options.iter().any(|option| option.split_once('=').is_some_and(|(own, _)| own == key));
    if has("upperdir") {
        let kept =
            options.iter().filter(|option| !option.starts_with("index=") && !option.starts_with("xino="));
        let stable: Vec<_> = kept.cloned().chain(["index=on", "xino=on"].map(String::from)).collect();
        let until = Instant::now() + IN_USE_TIMEOUT;
        loop {
            match overlay_as_told(&stable) {
                // The kernel may not be done with the container that had it before.
                Err(ShareError::Overlay { source, .. })
                    if source.raw_os_error() == Some(libc::EBUSY) && Instant::now() < until =>
                {
                    sleep(IN_USE_PAUSE);
                }
                Err(error) => {
                    tracing::warn!(%error, "hard links of an image may come apart when they are written to");
                    break;
                }
                mount => return mount,
            }
        }
    }
    overlay_as_told(options)
}

fn overlay_as_told(options: &[String]) -> Result<OwnedFd, ShareError> {
    let failed = |step: &str| {
        let step = step.to_owned();
        move |errno: Errno| ShareError::Overlay { step, source: errno.into() }
    };
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen"))?;
    let set = |key: &str, value: &str| {
        if value.len() > VALUE_MAX {
            return Err(ShareError::Long(key.to_owned()));
        }
        fsconfig_set_string(&context, key, value).map_err(failed(&format!("{key}={value}")))
    };
    set("source", "overlay")?;
    let mut read_only = false;
    for option in options {
        match (option.as_str(), option.split_once('=')) {
            (_, Some(("lowerdir", layers))) => match layers.split(':').collect::<Vec<_>>()[..] {
                [layer] => set("lowerdir", layer)?,
                // One by one (Linux 6.8): together they may be longer than one value.
                ref layers => layers.iter().try_for_each(|layer| set("lowerdir+", layer))?,
            },
            (_, Some((key, value))) => set(key, value)?,
            ("ro", None) => read_only = true,
            ("rw", None) => {}
            (flag, None) => fsconfig_set_flag(&context, flag).map_err(failed(flag))?,
        }
    }
    fsconfig_create(&context).map_err(failed("create"))?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty());
    let mount = mount.map_err(failed("fsmount"))?;
    let restricted = restrict(&mount, Depth::One, read_only);
    restricted.map_err(|source| ShareError::Overlay { step: "mount_setattr".into(), source })?;
    Ok(mount)
}

/// Cuts a mount off from others, and takes away what no share needs on the host: devices and set-uid programs.
fn restrict(mount: &OwnedFd, depth: Depth, read_only: bool) -> io::Result<()> {
    let read_only = if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | read_only,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    let recursive = if depth == Depth::All { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: an empty path and a mount_attr of the length that is given; the kernel writes neither.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// True when nothing is in a directory.
///
/// # Errors
/// When it cannot be read.
pub fn is_empty(directory: &Path) -> io::Result<bool> {
    Ok(std::fs::read_dir(directory)?.next().is_none())
}

/// The number by which statfs(2) tells a file system's type.
///
/// # Errors
/// When there is no such path.
pub fn file_system_magic(path: &Path) -> io::Result<i64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    Ok(rustix::fs::statfs(path.as_c_str())?.f_type)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    use rustix::fs::{Mode, OFlags, openat};
    use rustix::process::geteuid;

    use super::*;

    fn write(share: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
        openat(share.as_fd(), name, OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::RUSR)
    }

    #[test]
    fn a_share_reaches_its_directory_and_a_read_only_one_does_not_change_it() {
        if !geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let share = bind(directory.path(), Depth::All, false).unwrap();
        write(&share, "a").unwrap();
        assert!(directory.path().join("a").exists());
        let share = bind(directory.path(), Depth::One, true).unwrap();
        assert_eq!(write(&share, "b").unwrap_err(), Errno::ROFS);
        assert!(bind(&directory.path().join("missing"), Depth::One, true).is_err());
    }

    #[test]
    fn an_overlay_is_made_of_many_layers_and_leaves_no_mount() {
        if !geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        let mut lower = Vec::new();
        for n in 0..100 {
            let layer = path(&format!("layer{n}"));
            fs::create_dir(&layer).unwrap();
            fs::write(Path::new(&layer).join(format!("file{n}")), "").unwrap();
            lower.push(layer);
        }
        for name in ["upper", "work"] {
            fs::create_dir(path(name)).unwrap();
        }
        let options = [
            "index=off".to_owned(),
            format!("workdir={}", path("work")),
            format!("upperdir={}", path("upper")),
            format!("lowerdir={}", lower.join(":")),
        ];
        let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count();
        let before = mounts();
        let share = match overlay(&options) {
            // A temporary directory on an overlay cannot be an upper one.
            Err(ShareError::Overlay { step, source }) if step == "create" => {
                eprintln!("no overlay here: {source}");
                return;
            }
            other => other.unwrap(),
        };
        assert_eq!(mounts(), before);
        for n in [0, 99] {
            openat(&share, format!("file{n}"), OFlags::RDONLY, Mode::empty()).unwrap();
        }
        write(&share, "new").unwrap();
        assert!(Path::new(&path("upper")).join("new").exists());
    }

    #[test]
    fn names_of_one_file_in_a_layer_stay_names_of_one_file() {
        if !geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["layer", "upper", "work"] {
            fs::create_dir(path(name)).unwrap();
        }
        fs::write(path("layer/a"), "old").unwrap();
        fs::hard_link(path("layer/a"), path("layer/b")).unwrap();
        let option = |key: &str, name: &str| format!("{key}={}", path(name).display());
        let options = [
            "index=off".to_owned(),
            option("workdir", "work"),
            option("upperdir", "upper"),
            option("lowerdir", "layer"),
        ];
        let share = match overlay(&options) {
            Err(ShareError::Overlay { step, source }) if step == "create" => {
                eprintln!("no overlay here: {source}");
                return;
            }
            other => other.unwrap(),
        };
        let open = |flags| File::from(openat(&share, "a", flags | OFlags::CLOEXEC, Mode::empty()).unwrap());
        let inode = open(OFlags::RDONLY).metadata().unwrap().ino();
        open(OFlags::WRONLY).write_all(b"new").unwrap();
        assert_eq!(open(OFlags::RDONLY).metadata().unwrap().ino(), inode);
        let mut text = String::new();
        let other = openat(&share, "b", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        File::from(other).read_to_string(&mut text).unwrap();
        assert_eq!(text, "new");
        // Another mount of the same is not refused: a container may be started again before the kernel is done with the one before.
        overlay(&options).unwrap();
    }

    #[test]
    fn an_option_that_the_kernel_does_not_know_is_named() {
        if !geteuid().is_root() {
            return;
        }
        let error = overlay(&["nonsense=1".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("nonsense=1"), "{error}");
        assert!(matches!(overlay(&[format!("upperdir={}", "x".repeat(300))]), Err(ShareError::Long(_))));
    }
}
