//! From what containerd hands over to what a guest can use: the mounts of a root, and a configuration that speaks of the host.
//!
//! Each function does one thing to the configuration. What a virtual machine cannot do is refused here by name, before anything is
//! started; what is left is the agent's to check.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::SharedNamespace;
use oci_spec::runtime::{LinuxDeviceType, LinuxNamespaceType, Spec};
use rustix::fs::{CWD, Mode, OFlags, openat};

use crate::image_file::{self, Format, ImageFileError};
use crate::share::{self, Depth, ShareError};
use crate::sizing::cpu_count;
use crate::storage::WRITTEN_FILE;

/// What statfs(2) says of EROFS.
const EROFS_MAGIC: i64 = 0xe0f5_e1e2;
/// The image of a layer, beside the directory where containerd's erofs snapshotter has mounted it.
const LAYER_FILE: &str = "layer.erofs";

/// A mount of a container's root, as containerd describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RootfsMount {
    /// Its type.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// Where below the root; empty for the root itself.
    pub target: String,
    /// How.
    pub options: Vec<String>,
}

/// Where it is kept what a container writes above layers.
#[derive(Debug)]
pub enum Above {
    /// In the guest's memory.
    Memory,
    /// On a disk made by [`make_scratch`](crate::storage::make_scratch) or [`snapshot_disk`](crate::storage::snapshot_disk).
    Disk(File),
    /// On a disk that is to be in the directory of the container's snapshot.
    Snapshot(PathBuf),
}

/// What a container's root is on this host.
#[derive(Debug)]
pub enum Root {
    /// EROFS images, with something writable above them.
    Layers {
        /// The images, the topmost first.
        images: Vec<PathBuf>,
        /// Where it is kept what the container writes above them.
        above: Above,
    },
    /// A disk with an ext4, open for reading and writing.
    Ext4(File),
    /// A directory to share.
    Share(OwnedFd),
}

/// Why a container cannot be had in a virtual machine.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// No directory, no mount.
    #[error("the container has no root")]
    NoRoot,
    /// A root in several mounts, or below the root.
    #[error(
        "a root of {0} mounts is not supported: use the snapshotter overlayfs, native, blockfile, devmapper or erofs"
    )]
    Mounts(usize),
    /// A root of a type that no guest can mount.
    #[error(
        "a root of type {0:?} is not supported: use the snapshotter overlayfs, native, blockfile, devmapper or erofs"
    )]
    Type(String),
    /// A file that should be an image.
    #[error("the image of the root cannot be used")]
    Image(#[from] ImageFileError),
    /// A disk with something else than ext4.
    #[error("{0} holds no ext4: set the snapshotter's file system to ext4")]
    NotExt4(PathBuf),
    /// A disk that nobody may write to.
    #[error("{0} is read-only: run the container from a snapshot of its own (prepare), not from a view")]
    View(PathBuf),
    /// A disk that cannot be opened.
    #[error("cannot use the disk {0}: a disk that is mounted on the host cannot be a guest's as well")]
    Disk(PathBuf, #[source] io::Error),
    /// A snapshot with something new in its directory and on the disk of its container.
    #[error(
        "files were put into {0} on the host, and the container has written to {1}: \
         they cannot be had together; take away the ones or the other"
    )]
    WrittenTwice(PathBuf, PathBuf),
    /// See [`ShareError`].
    #[error(transparent)]
    Share(#[from] ShareError),
    /// A bind mount of something that no guest has.
    #[error(
        "{host} cannot be mounted at {destination}: devices of the host are not shared with a virtual machine"
    )]
    Device {
        /// On the host.
        host: PathBuf,
        /// In the container.
        destination: PathBuf,
    },
    /// A bind mount of what the host's kernel says of itself.
    #[error(
        "{host} cannot be mounted at {destination}: the {kind} of the host is not shared with a virtual machine, which has its own"
    )]
    Kernel {
        /// On the host.
        host: PathBuf,
        /// In the container.
        destination: PathBuf,
        /// Its file system.
        kind: &'static str,
    },
    /// A bind mount without a source.
    #[error("the mount at {0} has no source")]
    NoSource(PathBuf),
    /// A namespace of the host.
    #[error(
        "the container is to join the {0} namespace at {1}, but a virtual machine shares none with the host"
    )]
    Namespace(LinuxNamespaceType, PathBuf),
    /// A disk of the host.
    #[error("the device {0} is a disk of the host, which is not passed to a virtual machine")]
    BlockDevice(PathBuf),
    /// A program of the host.
    #[error("{0} hooks are not supported: they are programs of the host; remove them")]
    Hooks(String),
    /// A set of CPUs that is none.
    #[error("{0:?} is not a list of CPUs")]
    Cpus(String),
}

/// What is to become of a root. `directory` is `root.path` of the configuration, for a root without mounts.
///
/// # Errors
/// [`HandoverError`].
pub fn root(mounts: &[RootfsMount], directory: Option<&Path>) -> Result<Root, HandoverError> {
    let mount = match mounts {
        [] => {
            let directory = directory.ok_or(HandoverError::NoRoot)?;
            return Ok(Root::Share(share::bind(directory, Depth::All, false)?));
        }
        [mount] if mount.target.is_empty() => mount,
        more => return Err(HandoverError::Mounts(more.len())),
    };
    let has = |option: &str| mount.options.iter().any(|given| given == option);
    let source = Path::new(&mount.source);
    match mount.kind.as_str() {
        "overlay" => match erofs_layers(&mount.options)? {
            Some(layers) => Ok(layers),
            None => Ok(Root::Share(share::overlay(&mount.options)?)),
        },
        kind if kind == "bind" || has("bind") || has("rbind") => {
            let depth = if has("bind") { Depth::One } else { Depth::All };
            Ok(Root::Share(share::bind(source, depth, has("ro"))?))
        }
        "erofs" => match image_file::open(source)? {
            (_, Format::Erofs) => Ok(Root::Layers { images: vec![source.to_owned()], above: Above::Memory }),
            (_, Format::Ext4) => Err(HandoverError::Type("ext4 in a mount of type erofs".into())),
        },
        // A view: the disk is what later snapshots are copied from, and a guest that had it would have it to write to.
        "ext4" if has("ro") => Err(HandoverError::View(source.to_owned())),
        "ext4" => Ok(Root::Ext4(open_disk(source)?)),
        other => Err(HandoverError::Type(other.chars().take(64).collect())),
    }
}

/// The layers behind an overlay whose lower directories are all mounts of containerd's erofs snapshotter. What was written above
/// them on the host must not be missed, so an upper directory with content makes it an ordinary overlay, unless the container has
/// written, too: that is on a disk, and there is no file system of both.
fn erofs_layers(options: &[String]) -> Result<Option<Root>, HandoverError> {
    let value = |key: &str| options.iter().find_map(|option| option.strip_prefix(key)?.strip_prefix('='));
    // A snapshot has both in a directory of its own, which goes with it.
    let parent = |key: &str| Path::new(value(key)?).parent();
    let snapshot = parent("upperdir").filter(|own| parent("workdir") == Some(own));
    let Some(lower) = value("lowerdir") else { return Ok(None) };
    let images: Option<_> = lower.split(':').map(|lower| erofs_layer(Path::new(lower))).collect();
    let Some(images) = images else { return Ok(None) };
    if let Some(upper) = value("upperdir").map(Path::new)
        && !share::is_empty(upper).unwrap_or(false)
    {
        return match snapshot.map(|own| own.join(WRITTEN_FILE)) {
            Some(disk) if disk.exists() => Err(HandoverError::WrittenTwice(upper.to_owned(), disk)),
            _ => Ok(None),
        };
    }
    let above = snapshot.map_or(Above::Memory, |own| Above::Snapshot(own.to_owned()));
    Ok(Some(Root::Layers { images, above }))
}

fn erofs_layer(mounted: &Path) -> Option<PathBuf> {
    if share::file_system_magic(mounted).ok()? != EROFS_MAGIC {
        return None;
    }
    let image = mounted.parent()?.join(LAYER_FILE);
    matches!(image_file::open(&image), Ok((_, Format::Erofs))).then_some(image)
}

/// Opens a disk or the file of one. `O_EXCL` has the kernel refuse a disk that is in use.
fn open_disk(path: &Path) -> Result<File, HandoverError> {
    let (_, Format::Ext4) = image_file::open(path)? else {
        return Err(HandoverError::NotExt4(path.to_owned()));
    };
    let failed = |e: io::Error| HandoverError::Disk(path.to_owned(), e);
    let block = fs::metadata(path).map_err(failed)?.file_type().is_block_device();
    let exclusive = if block { OFlags::EXCL } else { OFlags::empty() };
    let flags = OFlags::RDWR | OFlags::CLOEXEC | exclusive;
    Ok(openat(CWD, path, flags, Mode::empty()).map_err(|e| failed(e.into()))?.into())
}

/// Takes away the namespaces that the machine itself stands for, or that another container of it has: the network is the machine's, and
/// in a pod, whose first container is `first`, a namespace with a path is that container's.
///
/// # Errors
/// [`HandoverError::Namespace`] for one of the host's.
pub fn take_namespaces(spec: &mut Spec, first: Option<&str>) -> Result<Vec<SharedNamespace>, HandoverError> {
    let Some(linux) = spec.linux_mut() else { return Ok(Vec::new()) };
    let mut shared = Vec::new();
    let mut kept = Vec::new();
    for namespace in linux.namespaces().iter().flatten() {
        let kind = namespace.typ();
        match (kind, namespace.path(), first) {
            (LinuxNamespaceType::Network, ..) => {}
            (_, None, _) => kept.push(namespace.clone()),
            (
                LinuxNamespaceType::Ipc | LinuxNamespaceType::Pid | LinuxNamespaceType::Uts,
                Some(_),
                Some(first),
            ) => {
                shared.push(SharedNamespace {
                    type_: kind.to_string(),
                    container_id: first.to_owned(),
                    ..Default::default()
                });
            }
            (_, Some(path), _) => return Err(HandoverError::Namespace(kind, path.clone())),
        }
    }
    linux.set_namespaces(Some(kept));
    Ok(shared)
}

/// Makes limits that speak of the host speak of the machine, which has `cpus`: a container that is bound to three CPUs of the host is bound to
/// three of the machine's. Memory nodes and disks are the host's business, where the machine's cgroup has them. True when there are limits
/// of disks.
///
/// # Errors
/// [`HandoverError::Cpus`].
pub fn translate_limits(spec: &mut Spec, cpus: u8) -> Result<bool, HandoverError> {
    let resources = spec.linux_mut().as_mut().and_then(|linux| linux.resources_mut().as_mut());
    let Some(resources) = resources else { return Ok(false) };
    let mut has_disks = false;
    if let Some(block) = resources.block_io_mut() {
        has_disks = !crate::cgroup::disks(block).is_empty();
        block.set_weight_device(None).set_throttle_read_bps_device(None).set_throttle_write_bps_device(None);
        block.set_throttle_read_iops_device(None).set_throttle_write_iops_device(None);
    }
    let Some(cpu) = resources.cpu_mut() else { return Ok(has_disks) };
    if let Some(list) = cpu.cpus().clone().filter(|list| !list.is_empty()) {
        let count = cpu_count(&list).ok_or_else(|| HandoverError::Cpus(list.chars().take(64).collect()))?;
        cpu.set_cpus(Some(format!("0-{}", count.clamp(1, cpus.max(1).into()) - 1)));
    }
    cpu.set_mems(None);
    Ok(has_disks)
}

/// Makes sure that no disk of the host is asked for: in the guest its numbers would be those of another disk.
///
/// # Errors
/// [`HandoverError::BlockDevice`].
pub fn refuse_disks(spec: &Spec) -> Result<(), HandoverError> {
    let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    let disk = devices.into_iter().flatten().find(|device| device.typ() == LinuxDeviceType::B);
    disk.map_or(Ok(()), |device| Err(HandoverError::BlockDevice(device.path().clone())))
}

/// Makes sure that no program of the host is to be run.
///
/// # Errors
/// [`HandoverError::Hooks`].
pub fn refuse_hooks(spec: &Spec) -> Result<(), HandoverError> {
    // As the specification names them.
    let hooks = serde_json::to_value(spec.hooks()).unwrap_or_default();
    let is_asked_for = |hooks: &serde_json::Value| hooks.as_array().is_some_and(|hooks| !hooks.is_empty());
    let asked = hooks.as_object().into_iter().flatten().find(|(_, hooks)| is_asked_for(hooks));
    asked.map_or(Ok(()), |(kind, _)| Err(HandoverError::Hooks(kind.clone())))
}

#[cfg(test)]
mod tests {
    use rustix::process::geteuid;
    use serde_json::{Value, json};

    use super::*;

    fn spec(value: &Value) -> Spec {
        serde_json::from_value(value.clone()).unwrap()
    }

    fn mount(kind: &str, source: &Path, options: &[&str]) -> RootfsMount {
        RootfsMount {
            kind: kind.into(),
            source: source.display().to_string(),
            target: String::new(),
            options: options.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn a_root_is_what_containerd_hands_over_or_the_bundles_directory() {
        if !geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        assert!(matches!(root(&[], Some(path)).unwrap(), Root::Share(_)));
        assert!(matches!(root(&[mount("bind", path, &["rbind", "rw"])], None).unwrap(), Root::Share(_)));
        assert!(matches!(root(&[], None), Err(HandoverError::NoRoot)));
    }

    #[test]
    fn disks_are_ext4_and_layers_erofs_by_their_content() {
        let directory = tempfile::tempdir().unwrap();
        let (ext4, erofs) = (directory.path().join("a"), directory.path().join("b"));
        let mut image = vec![0; 4096];
        image[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xef]);
        fs::write(&ext4, &image).unwrap();
        image[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        image[1036] = 12;
        fs::write(&erofs, &image).unwrap();
        assert!(matches!(root(&[mount("ext4", &ext4, &["loop", "rw"])], None).unwrap(), Root::Ext4(_)));
        let view = root(&[mount("ext4", &ext4, &["loop", "ro"])], None);
        assert!(matches!(view, Err(HandoverError::View(_))));
        let Root::Layers { images, above: Above::Memory } =
            root(&[mount("erofs", &erofs, &["ro", "loop"])], None).unwrap()
        else {
            panic!("no layers");
        };
        assert_eq!(images, std::slice::from_ref(&erofs));
        assert!(matches!(root(&[mount("ext4", &erofs, &[])], None), Err(HandoverError::NotExt4(_))));
        assert!(root(&[mount("erofs", &ext4, &[])], None).is_err());
        assert!(root(&[mount("ext4", Path::new("/nonexistent"), &[])], None).is_err());
    }

    #[test]
    fn roots_that_no_guest_can_mount_are_refused_by_their_type() {
        let error = root(&[mount("btrfs", Path::new("/x"), &[])], None).unwrap_err().to_string();
        assert!(error.contains("btrfs") && error.contains("overlayfs"), "{error}");
        let two = [mount("bind", Path::new("/"), &[]), mount("bind", Path::new("/"), &[])];
        assert!(matches!(root(&two, None), Err(HandoverError::Mounts(2))));
    }

    #[test]
    fn only_a_pod_shares_namespaces() {
        let given = json!({"ociVersion": "1.2.0", "linux": {"namespaces": [
            {"type": "network", "path": "/run/netns/a"}, {"type": "mount"}, {"type": "ipc", "path": "/proc/7/ns/ipc"}]}});
        let mut pod = spec(&given);
        let shared = take_namespaces(&mut pod, Some("first")).unwrap();
        let shared: Vec<_> =
            shared.iter().map(|one| (one.type_.as_str(), one.container_id.as_str())).collect();
        assert_eq!(shared, [("ipc", "first")]);
        let kept = pod.linux().as_ref().unwrap().namespaces().clone().unwrap();
        assert_eq!(
            kept.iter().map(oci_spec::runtime::LinuxNamespace::typ).collect::<Vec<_>>(),
            [LinuxNamespaceType::Mount]
        );
        let error = take_namespaces(&mut spec(&given), None).unwrap_err().to_string();
        assert!(error.contains("/proc/7/ns/ipc"), "{error}");
    }

    #[test]
    fn cpus_are_counted_from_the_machines_first() {
        let renumbered = |list: &str, cpus: u8| {
            let resources = json!({"cpu": {"cpus": list, "mems": "1"}});
            let mut given = spec(&json!({"ociVersion": "1.2.0", "linux": {"resources": resources}}));
            translate_limits(&mut given, cpus)?;
            let resources = given.linux().as_ref().unwrap().resources().clone().unwrap();
            let cpu = resources.cpu().clone().unwrap();
            assert_eq!(cpu.mems(), &None);
            Ok::<_, HandoverError>(cpu.cpus().clone().unwrap_or_default())
        };
        assert_eq!(renumbered("4-6", 3).unwrap(), "0-2");
        assert_eq!(renumbered("7", 2).unwrap(), "0-0");
        assert_eq!(renumbered("0-63", 2).unwrap(), "0-1");
        assert_eq!(renumbered("", 2).unwrap(), "");
        assert!(renumbered("x", 2).is_err());
    }

    #[test]
    fn hooks_are_refused_by_their_kind_unless_there_are_none_in_the_list() {
        let with = |kind: &str, hooks: Value| {
            refuse_hooks(&spec(&json!({"ociVersion": "1.2.0", "hooks": {kind: hooks}})))
        };
        for kind in
            ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]
        {
            let error = with(kind, json!([{"path": "/x"}])).unwrap_err().to_string();
            assert!(error.contains(kind), "{error}");
            assert!(with(kind, json!([])).is_ok());
        }
    }

    #[test]
    fn disks_of_the_host_are_no_devices_of_a_container() {
        let with = |kind: &str| {
            let device = json!([{"path": "/dev/x", "type": kind, "major": 8, "minor": 0}]);
            refuse_disks(&spec(&json!({"ociVersion": "1.2.0", "linux": {"devices": device}})))
        };
        assert!(with("c").is_ok());
        assert!(with("b").unwrap_err().to_string().contains("/dev/x"));
    }
}
