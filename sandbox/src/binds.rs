//! Bind mounts: what containers have of the host besides their roots.
//!
//! A guest has a directory of the host once, however many of its containers have it: a lock that one takes holds the others back, what one
//! maps the others see, and a socket that one binds the others reach.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bulkhead_fs::control::ShareKind;
use bulkhead_fs::host::kernel_file_system;
use bulkhead_protocol::limits::{MEMORY_PREFIX, SHARE_PREFIX};
use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{AtFlags, CWD, StatxFlags, fstatfs, statx};
use tokio::sync::OnceCell;

use crate::file_server::{FileServer, FileServerError};
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
    /// It is memory of so many bytes, and becomes the guest's own.
    memory: Option<u64>,
}

/// The id of a mount that is never used again (linux/stat.h, Linux 6.8).
const STATX_MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// What of the host is bind mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Source {
    /// Its mount's id: what is mounted below it, and whether it can be written to, is the mount's. Before Linux 6.8 it may be used again
    /// when the mount is gone.
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
/// on `/dev/shm`, is to be one of the guest's: memory of the host cannot be a guest's.
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
        let has = |wanted: &[&str]| {
            mount.options().iter().flatten().any(|option| wanted.contains(&option.as_str()))
        };
        let read_only = has(&["ro", "rro"]);
        let depth = if has(&["rbind"]) { Depth::All } else { Depth::One };
        let opened = File::from(share::bind(&source, depth, read_only)?);
        // Of what was opened, whatever has its name by now; only the mount was left behind there.
        let failed = |e| ShareError::Open(source.clone(), e);
        let metadata = opened.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        if kind.is_block_device() || kind.is_char_device() {
            return Err(HandoverError::Device { host: source, destination });
        }
        let status = fstatfs(&opened).map_err(|e| failed(e.into()))?;
        if let Some(kind) = kernel_file_system(status.f_type) {
            return Err(HandoverError::Kernel { host: source, destination, kind });
        }
        if kind.is_dir() && is_of_devices(&metadata) {
            return Err(HandoverError::Kernel { host: source, destination, kind: "device directory" });
        }
        let of_mount = statx(CWD, &source, AtFlags::empty(), StatxFlags::MNT_ID | STATX_MNT_ID_UNIQUE);
        let id = of_mount.map_err(|e| failed(e.into()))?.stx_mnt_id;
        let is_memory = status.f_type == TMPFS_MAGIC
            && source.file_name().is_some_and(|name| name == "shm")
            && destination.components().eq(Path::new(SHARED_MEMORY).components());
        binds.push(Bind {
            at,
            source: Source { mount: id, device: metadata.dev(), inode: metadata.ino(), depth },
            mount: opened.into(),
            read_only,
            memory: is_memory.then(|| status.f_blocks.saturating_mul(status.f_bsize.unsigned_abs())),
        });
    }
    Ok(binds)
}

/// Has a configuration name another source for one of its mounts.
fn set_source(spec: &mut Spec, at: usize, source: String) {
    if let Some(mount) = spec.mounts_mut().as_mut().and_then(|mounts| mounts.get_mut(at)) {
        mount.set_source(Some(source.into()));
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

/// A share by its name.
#[derive(Clone, Debug)]
pub(crate) struct Shared {
    /// Its name.
    pub(crate) name: String,
    /// The file server refuses changes.
    pub(crate) read_only: bool,
    /// Whoever needs it first has the file server show it.
    served: Arc<OnceCell<()>>,
    /// The file server was asked before, and has it or has not.
    asked: Arc<AtomicBool>,
}

impl Shared {
    /// A share that the file server does not have yet.
    pub(crate) fn new(name: String, read_only: bool) -> Self {
        Self { name, read_only, served: Arc::default(), asked: Arc::default() }
    }

    /// Has a file server show it, which others of its users may be doing.
    ///
    /// # Errors
    /// Those of [`FileServer::add`].
    pub(crate) async fn serve(
        &self,
        server: &FileServer,
        mount: &OwnedFd,
        kind: ShareKind,
    ) -> Result<(), FileServerError> {
        let add = || async {
            if self.asked.swap(true, Ordering::Relaxed) {
                // Who asked has not waited for the answer.
                let _ = server.remove(&self.name).await;
            }
            server.add(&self.name, mount, kind, self.read_only).await
        };
        self.served.get_or_try_init(add).await.copied()
    }
}

/// What containers of a machine have from the host by bind mounts: shares, each as long as a container has it, and memory of the guest's.
#[derive(Debug, Default)]
pub(crate) struct SharedBinds {
    known: Vec<Known>,
    /// Memory, by its place on the host, which is held: there is nothing else with its numbers as long as the machine lives.
    memories: Vec<(Source, String, OwnedFd)>,
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
    /// Has a container's configuration name what is the guest's of a bind mount. Gives the share and what it is of, if it is one.
    pub(crate) fn take(&mut self, container: &str, spec: &mut Spec, bind: Bind) -> Option<(OwnedFd, Shared)> {
        let at = bind.at;
        if let Some(bytes) = bind.memory {
            let name = self.memory(container, bind);
            set_source(spec, at, format!("{MEMORY_PREFIX}{name}:{bytes}"));
            return None;
        }
        let share = self.share(container, &bind);
        set_source(spec, at, format!("{SHARE_PREFIX}{}", share.name));
        Some((bind.mount, share))
    }

    fn memory(&mut self, container: &str, bind: Bind) -> String {
        if let Some((_, name, _)) = self.memories.iter().find(|(source, ..)| *source == bind.source) {
            return name.clone();
        }
        let name = self.next_name(container);
        self.memories.push((bind.source, name.clone(), bind.mount));
        name
    }

    /// The share by which a container has a bind mount. One that can be written to does for a container that may only read, too: the guest
    /// holds it to that, and could write by the other mount anyway. One that cannot does not become one that can.
    fn share(&mut self, container: &str, bind: &Bind) -> Shared {
        let does =
            |known: &&mut Known| known.source == bind.source && known.shared.read_only <= bind.read_only;
        if let Some(known) = self.known.iter_mut().find(does) {
            known.users += 1;
            return known.shared.clone();
        }
        let shared = Shared::new(self.next_name(container), bind.read_only);
        self.known.push(Known { source: bind.source, shared: shared.clone(), users: 1 });
        shared
    }

    fn next_name(&mut self, container: &str) -> String {
        let name = format!("{container}.{}", self.names);
        self.names += 1;
        name
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
        for bind in binds {
            let read_only = bind.read_only;
            assert_eq!(shared.take("c1", &mut given, bind).unwrap().1.read_only, read_only);
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
            shared.share(container, &binds[0]).name
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
        assert_eq!(shared.share("a", &binds.unwrap()[0]).name, "a.4", "no name comes again");
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
        let names = [&binds[0], &binds[1]].map(|bind| shared.share("a", bind).name);
        assert_eq!(names, ["a.0", "a.0"]);
    }

    /// A tmpfs called `shm`, until it is dropped.
    struct Memory(tempfile::TempDir);

    impl Memory {
        fn new() -> Self {
            let memory = Self(tempfile::tempdir().unwrap());
            fs::create_dir(memory.path()).unwrap();
            memory.mount();
            memory
        }

        fn path(&self) -> PathBuf {
            self.0.path().join("shm")
        }

        fn mount(&self) {
            let size = Some(c"size=1m");
            rustix::mount::mount("none", self.path(), "tmpfs", rustix::mount::MountFlags::empty(), size)
                .unwrap();
        }

        fn unmount(&self) {
            rustix::mount::unmount(self.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
        }
    }

    impl Drop for Memory {
        fn drop(&mut self) {
            self.unmount();
        }
    }

    #[test]
    fn the_shared_memory_of_a_pod_is_the_guests() {
        if !geteuid().is_root() {
            return;
        }
        let memory = Memory::new();
        let mut shared = SharedBinds::default();
        let mut source = |container: &str, destination: &str| {
            let mount = json!({"destination": destination, "source": memory.path(), "options": ["rbind"]});
            let mut given = spec(&json!([mount]));
            let bind = take(&mut given, Path::new("/")).unwrap().remove(0);
            let share = shared.take(container, &mut given, bind);
            (sources(&given)[0].display().to_string(), share.is_some())
        };
        assert_eq!(source("a", "/dev/./shm/"), ("memory:a.0:1048576".into(), false));
        assert_eq!(
            source("b", "/dev/shm"),
            ("memory:a.0:1048576".into(), false),
            "another container has the same"
        );
        assert_eq!(source("b", "/shm"), ("share:b.1".into(), true));
        // Another one in the same place, even when the kernel uses the numbers of the first again.
        memory.unmount();
        memory.mount();
        assert_eq!(source("c", "/dev/shm"), ("memory:c.2:1048576".into(), false));
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
