//! The mounts of a configuration: what libcontainer would do wrong is refused, and shares and memory get the paths that they have in
//! the guest.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Component, Path, PathBuf};

use bulkhead_protocol::limits::{MEMORY_PREFIX, SHARE_PREFIX, is_valid_id};
use libcontainer::rootfs::utils::is_bind;
use oci_spec::runtime::Mount;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2, readlinkat};

use super::memory::Memory;
use super::shares;
use super::spec::clean;

/// Most links that are followed: as many as the kernel does (`MAXSYMLINKS`).
const LINKS_MAX: u32 = 40;

/// Why a mount is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "{0} is bind mounted from {1}: only what the host shares can be, as {SHARE_PREFIX}NAME, or memory, as {MEMORY_PREFIX}NAME:BYTES"
    )]
    Source(PathBuf, PathBuf),
    #[error("{0} is id-mapped, which is not supported")]
    IdMapped(PathBuf),
    #[error("{0}: a bind mount with the option {1:?} is not supported")]
    Option(PathBuf, String),
    #[error("{0}: a bind mount of type {1:?} is not supported")]
    Kind(PathBuf, String),
    #[error("nothing can be bind mounted over {0}")]
    Destination(PathBuf),
    #[error("nothing can be bind mounted over {1}, where the link {0} of the root leads")]
    Led(PathBuf, PathBuf),
    #[error("{0} has too many links to bind mount anything there")]
    Links(PathBuf),
}

/// What libcontainer does to a bind mount, or need not do: without a bind mount whose peer is outside of the machine, private
/// and slave are what every mount in it is already. It skips `shared`, which would promise that what a container mounts there is
/// seen by the host, and options that it does not know.
const BIND_OPTIONS: [&str; 43] = [
    "bind",
    "rbind",
    "defaults",
    "async",
    "nomand",
    "private",
    "rprivate",
    "slave",
    "rslave",
    "ro",
    "rw",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "rro",
    "rrw",
    "rsuid",
    "rnosuid",
    "rdev",
    "rnodev",
    "rexec",
    "rnoexec",
    "ratime",
    "rnoatime",
    "rdiratime",
    "rnodiratime",
    "rrelatime",
    "rnorelatime",
    "rstrictatime",
    "rnostrictatime",
    "rsymfollow",
    "rnosymfollow",
];

/// What a bind mount is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A share, by its name.
    Share(String),
    /// Memory that containers have in common.
    Memory(Memory),
}

impl Source {
    /// Reads the source of a mount.
    fn parse(source: &Path) -> Option<Self> {
        let source = source.to_str()?;
        if let Some(name) = source.strip_prefix(SHARE_PREFIX) {
            return is_valid_id(name).then(|| Self::Share(name.to_owned()));
        }
        let (name, bytes) = source.strip_prefix(MEMORY_PREFIX)?.split_once(':')?;
        let bytes = bytes.parse().ok()?;
        is_valid_id(name).then(|| Self::Memory(Memory { name: name.to_owned(), bytes }))
    }

    /// Where it is in the guest.
    fn path(&self) -> PathBuf {
        match self {
            Self::Share(name) => shares::path(name),
            Self::Memory(memory) => memory.path(),
        }
    }
}

/// Checks a mount, and gives a bind mount the path that its source has in the guest.
///
/// # Errors
/// [`Error`] names the mount.
pub(super) fn prepare(mount: &mut Mount) -> Result<Option<Source>, Error> {
    let destination = mount.destination().clone();
    let mapped = |mappings: &Option<Vec<_>>| mappings.as_ref().is_some_and(|mappings| !mappings.is_empty());
    let options = || mount.options().iter().flatten().map(String::as_str);
    // libcontainer skips these options.
    if mapped(mount.uid_mappings())
        || mapped(mount.gid_mappings())
        || options().any(|option| option == "idmap" || option == "ridmap")
    {
        return Err(Error::IdMapped(destination));
    }
    if !is_bind(mount) {
        return Ok(None);
    }
    if let Some(option) = options().find(|option| !BIND_OPTIONS.contains(option)) {
        return Err(Error::Option(destination, option.to_owned()));
    }
    // libcontainer looks at some types before it looks at the options.
    if let Some(kind) = mount.typ().as_deref().filter(|kind| !["", "none", "bind"].contains(kind)) {
        return Err(Error::Kind(destination, kind.to_owned()));
    }
    let destination = clean(&destination);
    if !may_cover(&destination) {
        return Err(Error::Destination(destination));
    }
    let source = mount.source().clone().unwrap_or_default();
    let Some(parsed) = Source::parse(&source) else { return Err(Error::Source(destination, source)) };
    mount.set_source(Some(parsed.path())).set_typ(Some("bind".into())).set_destination(destination);
    Ok(Some(parsed))
}

/// Refuses bind mounts whose destination is a link in `root` to where nothing can be mounted. Links in what the mounts before
/// them bring do not count: they are the container's own, as are the files that it could cover by them.
///
/// # Errors
/// [`Error::Led`] with where the first of them leads, or [`Error::Links`].
pub(super) fn check(mounts: &[Mount], root: &OwnedFd) -> Result<(), Error> {
    mounts.iter().filter(|mount| is_bind(mount)).try_for_each(|mount| {
        let destination = mount.destination();
        match follow(root, destination) {
            Some(led) if may_cover(&led) => Ok(()),
            Some(led) => Err(Error::Led(destination.clone(), led)),
            None => Err(Error::Links(destination.clone())),
        }
    })
}

/// The mount that a path is in by its name, and the rest of the path below it: the last of several, which covers the others.
pub(super) fn covering<'a>(mounts: &'a [Mount], path: &Path) -> Option<(&'a Mount, PathBuf)> {
    mounts.iter().rev().find_map(|mount| {
        let rest = path.strip_prefix(clean(mount.destination())).ok()?;
        Some((mount, rest.to_owned()))
    })
}

/// What is bind mounted, unless that is for reading only.
pub(super) fn writable_source(mount: &Mount) -> Option<&Path> {
    let read_only = mount.options().iter().flatten().any(|option| option == "ro" || option == "rro");
    mount.source().as_deref().filter(|_| is_bind(mount) && !read_only)
}

/// Whether a share may be at a path without links: not in the place of the root, of `/dev`, into which libcontainer makes
/// devices, or of what the kernel says in `/proc`, but for the files that LXCFS replaces, as runc has it.
fn may_cover(path: &Path) -> bool {
    const REPLACED: [&str; 8] =
        ["cpuinfo", "diskstats", "loadavg", "meminfo", "slabinfo", "stat", "swaps", "uptime"];
    match path.strip_prefix("/proc") {
        Ok(file) => REPLACED.iter().any(|replaced| file == Path::new(replaced)),
        Err(_) => path != Path::new("/") && path != Path::new("/dev"),
    }
}

/// Where a path leads within `root`, when every link is followed; what does not exist is taken for a directory. None when there
/// are too many links.
fn follow(root: &OwnedFd, path: &Path) -> Option<PathBuf> {
    let mut led = PathBuf::from("/");
    let mut rest: Vec<OsString> = names(path);
    let mut links = 0;
    while let Some(name) = rest.pop() {
        if name == ".." {
            led.pop();
            continue;
        }
        led.push(name);
        let Some(target) = link_at(root, &led) else { continue };
        links += 1;
        if links > LINKS_MAX {
            return None;
        }
        led.pop();
        if target.is_absolute() {
            led = PathBuf::from("/");
        }
        rest.extend(names(&target));
    }
    Some(led)
}

/// The names of a path, the last first.
fn names(path: &Path) -> Vec<OsString> {
    let parts = path.components().rev();
    parts
        .filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir))
        .map(|part| part.as_os_str().into())
        .collect()
}

/// The target of a link in `root`.
fn link_at(root: &OwnedFd, path: &Path) -> Option<PathBuf> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let entry = openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT).ok()?;
    let target = readlinkat(entry, "", Vec::new()).ok()?;
    Some(PathBuf::from(OsString::from_vec(target.into_bytes())))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn prepared(mount: &Value) -> Result<(Option<Source>, Mount), Error> {
        let mut mount = serde_json::from_value(mount.clone()).unwrap();
        prepare(&mut mount).map(|source| (source, mount))
    }

    #[test]
    fn a_path_is_in_the_last_mount_that_covers_it() {
        let mounts: Vec<Mount> = serde_json::from_value(json!([
            {"destination": "/v/inner", "source": "/a", "options": ["rbind"]},
            {"destination": "/v/", "source": "/b", "options": ["bind", "ro"]},
            {"destination": "/v/other", "type": "tmpfs"}
        ]))
        .unwrap();
        let covered = |path: &str| covering(&mounts, Path::new(path));
        let (mount, rest) = covered("/v/inner/x").unwrap();
        assert_eq!(
            (mount.source().as_deref(), rest.as_path()),
            (Some(Path::new("/b")), Path::new("inner/x"))
        );
        assert_eq!(writable_source(mount), None);
        let (mount, rest) = covered("/v/other").unwrap();
        assert_eq!((mount.typ().as_deref(), rest.as_path()), (Some("tmpfs"), Path::new("")));
        assert_eq!(writable_source(mount), None);
        assert_eq!(writable_source(&mounts[0]), Some(Path::new("/a")));
        assert!(covered("/volume").is_none());
    }

    #[test]
    fn shares_get_their_paths() {
        for mount in [
            json!({"destination": "/v", "source": "share:v.1", "type": "bind"}),
            json!({"destination": "/v", "source": "share:v.1", "options": ["rbind", "rprivate", "ro"]}),
            json!({"destination": "/v", "source": "share:v.1", "type": "none", "options": ["bind", "rro", "nosuid"]}),
        ] {
            let (share, mount) = prepared(&mount).unwrap();
            assert_eq!(share, Some(Source::Share("v.1".into())));
            assert_eq!(mount.source().as_deref(), Some(Path::new("/run/bulkhead/shares/v.1")));
            assert_eq!(mount.typ().as_deref(), Some("bind"));
        }
    }

    #[test]
    fn memory_gets_its_path() {
        let mount = json!({"destination": "/dev/shm", "source": "memory:a.1:4096", "type": "bind"});
        let (source, mount) = prepared(&mount).unwrap();
        assert_eq!(source, Some(Source::Memory(Memory { name: "a.1".into(), bytes: 4096 })));
        assert_eq!(mount.source().as_deref(), Some(Path::new("/run/bulkhead/memory/a.1")));
    }

    #[test]
    fn other_mounts_are_left_alone() {
        let mount =
            json!({"destination": "/dev", "source": "share:x", "type": "tmpfs", "options": ["mode=755"]});
        let (share, mount) = prepared(&mount).unwrap();
        assert_eq!(share, None);
        assert_eq!(mount.source().as_deref(), Some(Path::new("share:x")));
    }

    #[test]
    fn what_is_no_share_or_would_not_be_done_is_refused() {
        for source in [
            "/etc",
            "share:",
            "share:..",
            "share:a/b",
            "share:/",
            "Share:a",
            "share",
            "",
            "memory:a",
            "memory::1",
            "memory:../a:1",
            "memory:a:-1",
            "memory:a:1:1",
            "memory:a:99999999999999999999",
        ] {
            let error =
                prepared(&json!({"destination": "/v", "source": source, "type": "bind"})).unwrap_err();
            assert!(matches!(error, Error::Source(..)), "{source}: {error}");
        }
        for option in ["shared", "rshared", "unbindable", "remount", "size=1", "sync"] {
            let mount = json!({"destination": "/v", "source": "share:a", "options": ["bind", option]});
            assert!(matches!(prepared(&mount), Err(Error::Option(_, named)) if named == option));
        }
        for kind in ["cgroup", "proc", "tmpfs"] {
            let mount = json!({"destination": "/v", "source": "share:a", "type": kind, "options": ["rbind"]});
            assert!(matches!(prepared(&mount), Err(Error::Kind(_, named)) if named == kind));
        }
        for destination in
            ["/", "/dev", "/dev/", "dev", "/x/../dev/.", "/proc", "/proc/sys", "/sys/../proc/sys"]
        {
            let mount = json!({"destination": destination, "source": "share:a", "type": "bind"});
            assert!(matches!(prepared(&mount), Err(Error::Destination(_))), "{destination}");
        }
        let mount = json!({"destination": "/v", "source": "share:a", "type": "bind", "options": ["idmap"]});
        assert!(matches!(prepared(&mount), Err(Error::IdMapped(_))));
    }

    #[test]
    fn links_of_the_root_do_not_lead_where_nothing_can_be_mounted() {
        let directory = tempfile::tempdir().unwrap();
        for (name, target) in [
            ("to-proc", "/proc"),
            ("up", "../../.."),
            ("chain", "sub/../to-proc/self"),
            ("loop", "loop"),
            ("good", "/var//./www"),
            ("out", "../../../etc/../proc/cpuinfo"),
        ] {
            symlink(target, directory.path().join(name)).unwrap();
        }
        let root = OwnedFd::from(File::open(directory.path()).unwrap());
        let led = |path: &str| follow(&root, Path::new(path));
        assert_eq!(led("/good/x"), Some("/var/www/x".into()));
        assert_eq!(led("/chain/fd"), Some("/proc/self/fd".into()));
        assert_eq!(led("/loop"), None);
        let checked = |destination: &str| {
            let mount = json!({"destination": destination, "source": "share:a", "type": "bind"});
            check(&[serde_json::from_value(mount).unwrap()], &root).is_ok()
        };
        for good in ["/good", "/good/x", "/none/proc", "/up/var", "/out", "/proc/cpuinfo", "/dev/shm"] {
            assert!(checked(good), "{good}");
        }
        for bad in
            ["/to-proc", "/to-proc/sys", "/up", "/up/dev", "/up/proc/sys", "/chain/attr", "/loop", "/loop/x"]
        {
            assert!(!checked(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_followed_ends_within_the_root(target in "[a/.]{0,12}", path in "[al/.]{0,12}") {
            let directory = tempfile::tempdir().unwrap();
            let _ = symlink(target, directory.path().join("l"));
            let root = OwnedFd::from(File::open(directory.path()).unwrap());
            if let Some(led) = follow(&root, Path::new(&path)) {
                prop_assert!(led.is_absolute());
                prop_assert!(!led.components().any(|part| part == Component::ParentDir));
            }
        }

        #[test]
        fn a_source_never_leads_elsewhere(source in "(share:|memory:)?[a./:1\\x00-]{0,12}") {
            let mount = json!({"destination": "/v", "source": source, "type": "bind"});
            if let Ok((Some(source), mount)) = prepared(&mount) {
                let path = mount.source().clone().unwrap();
                prop_assert_eq!(&path, &source.path());
                prop_assert_eq!(path.components().count(), 5);
                prop_assert!(path.components().all(|part| !matches!(part, Component::ParentDir | Component::CurDir)));
            }
        }
    }
}
