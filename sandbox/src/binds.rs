//! Bind mounts: what containers have of the host besides their roots.
//!
//! A guest has a directory of the host once, however many of its containers have it: a lock that one takes holds the others back, what one
//! maps the others see, and a socket that one binds the others reach.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use bulkhead_fs::host::kernel_file_system;
use bulkhead_protocol::limits::{MEMORY_PREFIX, SHARE_PREFIX};
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{AtFlags, CWD, StatxFlags, statfs, statx};
use tokio::sync::OnceCell;

use crate::handover::HandoverError;
use crate::share::{self, Depth, ShareError};

/// What statfs(2) says of a tmpfs.
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// Where POSIX has shared memory.
const SHARED_MEMORY: &str = "/dev/shm";

/// A file or a directory that a container has from the host.
#[derive(Debug)]
pub struct Bind {
    /// Which of the configuration's mounts it is.
    at: usize,
    /// What of the host it is.
    source: Source,
    /// A private copy of its mount.
    pub(crate) mount: OwnedFd,
    /// The container may not change it.
    read_only: bool,
}

/// What of the host is bind mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Source {
    /// Its mount's id: what is mounted below it, and whether it can be written to, is the mount's.
    mount: u64,
    device: u64,
    inode: u64,
    depth: Depth,
}

/// True when a configuration has bind mounts.
pub(crate) fn has_any(spec: &Spec) -> bool {
    spec.mounts().iter().flatten().any(is_bind)
}

/// Opens what a configuration bind mounts. Relative paths begin at the bundle. The shared memory of a pod, which is a tmpfs called `shm`
/// on `/dev/shm`, becomes one of the guest's at once: memory of the host cannot be a guest's.
///
/// # Errors
/// [`HandoverError`] when a source does not exist, is a device or is the kernel's of the host.
pub(crate) fn take(spec: &mut Spec, bundle: &Path) -> Result<Vec<Bind>, HandoverError> {
    let mut binds = Vec::new();
    for (at, mount) in spec.mounts_mut().iter_mut().flatten().enumerate() {
        if !is_bind(mount) {
            continue;
        }
        let destination = mount.destination().clone();
        let source = mount.source().clone().ok_or_else(|| HandoverError::NoSource(destination.clone()))?;
        let source = bundle.join(source);
        let failed = |e| ShareError::Open(source.clone(), e);
        let metadata = fs::metadata(&source).map_err(failed)?;
        let kind = metadata.file_type();
        if kind.is_block_device() || kind.is_char_device() {
            return Err(HandoverError::Device { host: source, destination });
        }
        let status = statfs(&source).map_err(|e| failed(e.into()))?;
        if let Some(kind) = kernel_file_system(status.f_type) {
            return Err(HandoverError::Kernel { host: source, destination, kind });
        }
        if kind.is_dir() && is_of_devices(&metadata) {
            return Err(HandoverError::Kernel { host: source, destination, kind: "device directory" });
        }
        let has = |wanted: &[&str]| {
            mount.options().iter().flatten().any(|option| wanted.contains(&option.as_str()))
        };
        let read_only = has(&["ro", "rro"]);
        let depth = if has(&["rbind"]) { Depth::All } else { Depth::One };
        let status_of_mount = statx(CWD, &source, AtFlags::empty(), StatxFlags::MNT_ID);
        let id = status_of_mount.map_err(|e| failed(e.into()))?.stx_mnt_id;
        let identity = Source { mount: id, device: metadata.dev(), inode: metadata.ino(), depth };
        let is_memory = status.f_type == TMPFS_MAGIC && source.file_name().is_some_and(|name| name == "shm");
        if is_memory && destination.components().eq(Path::new(SHARED_MEMORY).components()) {
            let bytes = status.f_blocks.saturating_mul(status.f_bsize.unsigned_abs());
            let name = format!("{MEMORY_PREFIX}{id}-{}-{}:{bytes}", identity.device, identity.inode);
            mount.set_source(Some(name.into()));
            continue;
        }
        binds.push(Bind { at, source: identity, mount: share::bind(&source, depth, read_only)?, read_only });
    }
    Ok(binds)
}

impl Bind {
    /// Has a configuration name a share for it.
    pub(crate) fn name(&self, spec: &mut Spec, share: &str) {
        if let Some(mount) = spec.mounts_mut().as_mut().and_then(|mounts| mounts.get_mut(self.at)) {
            mount.set_source(Some(format!("{SHARE_PREFIX}{share}").into()));
        }
    }
}

/// True for `/dev` and for the directories in it that have no mount of their own, as `/dev/shm` has: their file system has no magic
/// number of its own. A socket in it, such as `/dev/log`, is one like any other.
fn is_of_devices(metadata: &fs::Metadata) -> bool {
    let device = |path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
    device("/dev").is_some_and(|dev| dev == metadata.dev() && Some(dev) != device("/"))
}

fn is_bind(mount: &Mount) -> bool {
    let bind = |option: &String| option == "bind" || option == "rbind";
    mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(bind)
}

/// How the guest has a bind mount.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    /// The share's name.
    pub(crate) name: String,
    /// The file server refuses changes.
    pub(crate) read_only: bool,
    /// Set when the file server has it: whoever needs it first sees to that.
    pub(crate) served: Arc<OnceCell<()>>,
}

/// The shares of a machine that are bind mounted, each as long as a container has it.
#[derive(Debug, Default)]
pub(crate) struct SharedBinds {
    known: Vec<Known>,
    /// So many names have been given: none is given twice.
    names: u64,
}

#[derive(Debug)]
struct Known {
    source: Source,
    shared: Shared,
    users: usize,
}

impl SharedBinds {
    /// The share by which a container has a bind mount. One that can be written to does for a container that may only read, too: the guest
    /// holds it to that, and could write by the other mount anyway. One that cannot does not become one that can.
    pub(crate) fn take(&mut self, container: &str, bind: &Bind) -> Shared {
        let does =
            |known: &&mut Known| known.source == bind.source && known.shared.read_only <= bind.read_only;
        if let Some(known) = self.known.iter_mut().find(does) {
            known.users += 1;
            return known.shared.clone();
        }
        let name = format!("{container}.{}", self.names);
        self.names += 1;
        let shared = Shared { name, read_only: bind.read_only, served: Arc::default() };
        self.known.push(Known { source: bind.source, shared: shared.clone(), users: 1 });
        shared
    }

    /// A container has a share no longer. True when no other has it: the file server may forget it, too.
    pub(crate) fn give_back(&mut self, name: &str) -> bool {
        let Some(at) = self.known.iter().position(|known| known.shared.name == name) else { return true };
        let known = &mut self.known[at];
        known.users -= 1;
        let unused = known.users == 0;
        if unused {
            self.known.remove(at);
        }
        unused
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use rustix::process::geteuid;
    use serde_json::{Value, json};

    use super::*;

    fn spec(mounts: &Value) -> Spec {
        serde_json::from_value(json!({"ociVersion": "1.2.0", "mounts": mounts})).unwrap()
    }

    fn sources(spec: &Spec) -> Vec<PathBuf> {
        spec.mounts().iter().flatten().map(|mount| mount.source().clone().unwrap()).collect()
    }

    #[test]
    fn bind_mounts_become_shares() {
        if !geteuid().is_root() {
            return;
        }
        let bundle = tempfile::tempdir().unwrap();
        fs::write(bundle.path().join("file"), "").unwrap();
        let mut given = spec(&json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/a", "type": "bind", "source": bundle.path(), "options": ["rbind", "ro"]},
            {"destination": "/b", "source": "file", "options": ["bind"]},
        ]));
        let binds = take(&mut given, bundle.path()).unwrap();
        assert_eq!(binds.iter().map(|bind| bind.read_only).collect::<Vec<_>>(), [true, false]);
        let mut shared = SharedBinds::default();
        for bind in &binds {
            let share = shared.take("c1", bind);
            assert_eq!(share.read_only, bind.read_only);
            bind.name(&mut given, &share.name);
        }
        assert_eq!(sources(&given), ["proc", "share:c1.0", "share:c1.1"].map(PathBuf::from));
    }

    #[test]
    fn what_containers_have_in_common_is_one_share_as_long_as_one_has_it() {
        if !geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("other")).unwrap();
        let mut shared = SharedBinds::default();
        let mut name = |container: &str, path: &str, options: &[&str]| {
            let source = directory.path().join(path);
            let mount = json!({"destination": "/d", "source": source, "options": options});
            let binds = take(&mut spec(&json!([mount])), Path::new("/")).unwrap();
            shared.take(container, &binds[0]).name
        };
        // What can be written to is not the same as what was shared before and cannot.
        assert_eq!(name("a", "", &["rbind", "ro"]), "a.0");
        assert_eq!(name("a", "", &["rbind", "ro"]), "a.0", "twice in one container");
        assert_eq!(name("b", "", &["rbind", "rw"]), "b.1");
        assert_eq!(name("c", ".", &["rbind"]), "b.1");
        assert_eq!(name("c", "", &["bind"]), "c.2", "without what is mounted below");
        assert_eq!(name("c", "other", &["rbind"]), "c.3");
        shared.give_back("a.0");
        assert!(shared.give_back("a.0"));
        for (share, unused) in [("b.1", false), ("b.1", true), ("c.2", true), ("c.3", true), ("a.root", true)]
        {
            assert_eq!(shared.give_back(share), unused, "{share}");
        }
        assert!(shared.known.is_empty());
        let binds =
            take(&mut spec(&json!([{"destination": "/d", "type": "bind", "source": "/"}])), Path::new("/"));
        assert_eq!(shared.take("a", &binds.unwrap()[0]).name, "a.4", "no name comes again");
    }

    #[test]
    fn a_writable_share_does_for_readers() {
        if !geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let mounts = json!([
            {"destination": "/w", "source": directory.path(), "options": ["rbind"]},
            {"destination": "/r", "source": directory.path(), "options": ["rbind", "ro"]},
        ]);
        let binds = take(&mut spec(&mounts), Path::new("/")).unwrap();
        let mut shared = SharedBinds::default();
        let names = [&binds[0], &binds[1]].map(|bind| shared.take("a", bind).name);
        assert_eq!(names, ["a.0", "a.0"]);
    }

    #[test]
    fn the_shared_memory_of_a_pod_is_the_guests() {
        if !geteuid().is_root() || statfs(SHARED_MEMORY).is_ok_and(|status| status.f_type != TMPFS_MAGIC) {
            return;
        }
        let memory =
            json!({"destination": "/dev/./shm/", "type": "bind", "source": "/dev/shm", "options": ["rbind"]});
        let elsewhere = json!({"destination": "/shm", "type": "bind", "source": "/dev/shm"});
        let mut given = spec(&json!([memory, elsewhere]));
        let binds = take(&mut given, Path::new("/")).unwrap();
        assert_eq!(binds.len(), 1);
        let sources = sources(&given);
        let name = sources[0].to_str().unwrap();
        let (name, bytes) = name.strip_prefix(MEMORY_PREFIX).unwrap().split_once(':').unwrap();
        assert!(
            bulkhead_protocol::limits::is_valid_id(name) && bytes.parse::<u64>().unwrap() > 0,
            "{name} {bytes}"
        );
        let mut again = spec(&json!([memory]));
        take(&mut again, Path::new("/")).unwrap();
        assert_eq!(super::tests::sources(&again)[0], sources[0], "another container has the same");
    }

    #[test]
    fn devices_and_missing_files_are_not_bound() {
        let with = |source: &str| {
            take(&mut spec(&json!([{"destination": "/a", "type": "bind", "source": source}])), Path::new("/"))
        };
        assert!(matches!(with("/dev/null"), Err(HandoverError::Device { .. })));
        for (source, kind) in [("/proc", "proc"), ("/proc/sys/kernel", "proc")] {
            let refused = with(source);
            assert!(
                matches!(&refused, Err(HandoverError::Kernel { kind: k, .. }) if *k == kind),
                "{refused:?}"
            );
        }
        assert!(with("/nonexistent").unwrap_err().to_string().contains("/nonexistent"));
        assert!(!is_of_devices(&fs::metadata("/proc").unwrap()));
    }
}
