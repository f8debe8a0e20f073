//! A container's root as disks of the guest: its layers behind one read-only disk, what it writes on a scratch disk or in the
//! guest's memory.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::{BlockSource, Rootfs, rootfs};
use bulkhead_vmm::control::message::BlockLayout;
use tokio::process::Command;

use crate::disk::Disk;
use crate::image_file::{self, Format, ImageFileError};
use crate::size::Size;
use crate::slots::{NoSlot, Slots};

/// Most layers of an image: the entries of a GPT. Docker's own limit is 127.
pub const LAYERS_MAX: usize = 128;
/// What was written above the layers of a snapshot of containerd's, in the directory of the snapshot.
pub(crate) const WRITTEN_FILE: &str = "bulkhead.ext4";
/// Least size of a scratch disk: below it ext4 has no room for itself.
pub const SCRATCH_MIN: Size = Size(16 << 20);

/// Where what a container writes goes.
#[derive(Debug)]
pub enum Upper {
    /// Nowhere: its root is read-only.
    None,
    /// The guest's memory, up to so much.
    Tmpfs(Size),
    /// A disk made by [`make_scratch`] or [`snapshot_disk`].
    Scratch(File),
}

/// A container's root.
#[derive(Debug)]
pub struct Storage {
    /// The disks, each with its slot.
    pub disks: Vec<(u8, Disk)>,
    /// How the agent puts them together.
    pub rootfs: Rootfs,
}

/// Why a container has no root.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// No layer at all, or too many.
    #[error("an image of {0} layers: 1 to {LAYERS_MAX} are possible; squash it into fewer")]
    Layers(usize),
    /// A layer cannot be used.
    #[error("a layer of the image cannot be used: import the image again")]
    Layer(#[source] ImageFileError),
    /// A layer is not EROFS.
    #[error("the layer {0} is not an EROFS image")]
    Format(PathBuf),
    /// What was written before cannot be read.
    #[error("what the container wrote when it ran before cannot be used: make the container again")]
    Written(#[source] ImageFileError),
    /// The scratch disk cannot be made.
    #[error("cannot make the scratch disk {0}")]
    Scratch(PathBuf, #[source] io::Error),
    /// mke2fs does not start.
    #[error("mke2fs cannot be run to format the scratch disk; install the package e2fsprogs")]
    NoMke2fs(#[source] io::Error),
    /// mke2fs failed.
    #[error("mke2fs cannot format the scratch disk {path}; check its file system's free space: {said}")]
    Mke2fs {
        /// The disk.
        path: PathBuf,
        /// What it wrote to its standard error.
        said: String,
    },
    /// The machine is full.
    #[error(transparent)]
    Slot(#[from] NoSlot),
    /// Too small.
    #[error("a scratch disk of {0}: it takes at least {SCRATCH_MIN}")]
    ScratchSize(Size),
}

/// Plans the root of a container from its layers, the topmost first. Slots that it takes and does not need, because it fails, are
/// given back.
///
/// # Errors
/// [`StorageError`] when a layer cannot be opened or their number is out of bounds.
pub fn plan(slots: &mut Slots, layers: &[PathBuf], upper: Upper) -> Result<Storage, StorageError> {
    if !(1..=LAYERS_MAX).contains(&layers.len()) {
        return Err(StorageError::Layers(layers.len()));
    }
    let mut files = Vec::with_capacity(layers.len());
    for layer in layers {
        match image_file::open(layer).map_err(StorageError::Layer)? {
            (file, Format::Erofs) => files.push(file),
            (_, Format::Ext4) => return Err(StorageError::Format(layer.clone())),
        }
    }
    // A disk without partitions is one for the guest to scan less.
    let (layout, partitions) = if files.len() == 1 {
        (BlockLayout::Whole, 0..1)
    } else {
        (BlockLayout::Partitions, 1..files.len() + 1)
    };
    let image = slots.take()?;
    let lower = partitions.map(|n| source(image, u32::try_from(n).expect("below LAYERS_MAX"))).collect();
    let mut disks = vec![(image, Disk { files, layout, read_only: true })];
    let upper = match upper {
        Upper::None => None,
        Upper::Tmpfs(size) => Some(rootfs::Upper::TmpfsBytes(size.0)),
        Upper::Scratch(file) => {
            let scratch = slots.take().inspect_err(|_| slots.give_back(image))?;
            disks.push((scratch, Disk { files: vec![file], layout: BlockLayout::Whole, read_only: false }));
            Some(rootfs::Upper::Ext4(source(scratch, 0)))
        }
    };
    Ok(Storage { disks, rootfs: Rootfs { lower, upper, ..Default::default() } })
}

/// Plans a root that is one disk with an ext4, which the container writes to.
///
/// # Errors
/// [`StorageError::Slot`].
pub fn plan_ext4(slots: &mut Slots, disk: File) -> Result<Storage, StorageError> {
    let disk = Disk { files: vec![disk], layout: BlockLayout::Whole, read_only: false };
    let slot = slots.take()?;
    let upper = Some(rootfs::Upper::Ext4(source(slot, 0)));
    Ok(Storage { disks: vec![(slot, disk)], rootfs: Rootfs { upper, ..Default::default() } })
}

fn source(slot: u8, partition: u32) -> BlockSource {
    BlockSource { slot: slot.into(), partition, ..Default::default() }
}

/// Makes a sparse file of `size` with an empty ext4. It holds nothing that outlives its container, so it has no journal.
///
/// # Errors
/// [`StorageError`] when the file cannot be made or `mke2fs` is missing or fails.
pub async fn make_scratch(path: &Path, size: Size) -> Result<File, StorageError> {
    make_disk(path, size, "^has_journal,^resize_inode").await
}

/// Opens the disk for what is written above the layers of a snapshot, whose directory this is; the first time it is made, of `size`,
/// as a sparse file. It has a journal, because a container that was killed with its machine may be started again.
///
/// # Errors
/// [`StorageError`] when it can neither be opened nor made.
pub async fn snapshot_disk(directory: &Path, size: Size) -> Result<File, StorageError> {
    let path = directory.join(WRITTEN_FILE);
    let failed = |e| StorageError::Scratch(path.clone(), e);
    match image_file::open(&path) {
        Ok((_, Format::Ext4)) => File::options().read(true).write(true).open(&path).map_err(failed),
        Ok((_, Format::Erofs)) => Err(StorageError::Written(ImageFileError::Unknown(path))),
        Err(ImageFileError::Read(_, e)) if e.kind() == io::ErrorKind::NotFound => {
            // Half a disk, of a creation that was cut short, never bears the name.
            let new = path.with_extension("new");
            match fs::remove_file(&new) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
                _ => {}
            }
            let disk = make_disk(&new, size, "has_journal,^resize_inode").await?;
            fs::rename(&new, &path).map_err(failed)?;
            Ok(disk)
        }
        Err(error) => Err(StorageError::Written(error)),
    }
}

async fn make_disk(path: &Path, size: Size, features: &str) -> Result<File, StorageError> {
    if size < SCRATCH_MIN {
        return Err(StorageError::ScratchSize(size));
    }
    let failed = |e| StorageError::Scratch(path.to_owned(), e);
    let file =
        File::options().read(true).write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
    file.set_len(size.0).map_err(failed)?;
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-F", "-t", "ext4", "-m", "0", "-O", features, "-E"]);
    command
        .arg("lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0")
        .arg(path)
        .kill_on_drop(true);
    command.env_clear().env("PATH", search_path(&std::env::var("PATH").unwrap_or_default()));
    let output = command.output().await.map_err(StorageError::NoMke2fs)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(output.stderr.trim_ascii()).replace('\n', "; ");
        return Err(StorageError::Mke2fs { path: path.to_owned(), said });
    }
    Ok(file)
}

/// Where `mke2fs`, which may run as root, is looked for: in the system's directories, of which a user's PATH often lacks those of the
/// administrator's tools, then in the user's. An element that is not absolute, such as an empty one, would be the current directory's.
fn search_path(users: &str) -> String {
    let system = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].into_iter();
    system.chain(users.split(':').filter(|element| element.starts_with('/'))).collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn layer(dir: &Path, name: &str) -> PathBuf {
        let mut image = vec![0; 4096];
        image[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        image[1036] = 12;
        image[1060] = 1;
        fs::write(dir.join(name), image).unwrap();
        dir.join(name)
    }

    #[test]
    fn several_layers_become_partitions_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let layers = [layer(dir.path(), "top"), layer(dir.path(), "bottom")];
        let storage = plan(&mut Slots::default(), &layers, Upper::Tmpfs(Size(1 << 20))).unwrap();
        let [(slot, disk)] = &storage.disks[..] else { panic!("one disk") };
        assert_eq!((disk.files.len(), disk.layout), (2, BlockLayout::Partitions));
        assert!(storage.rootfs.lower.iter().all(|source| source.slot == u32::from(*slot)));
        assert!(disk.read_only);
        let partitions: Vec<u32> = storage.rootfs.lower.iter().map(|source| source.partition).collect();
        assert_eq!(partitions, [1, 2]);
        assert_eq!(storage.rootfs.tmpfs_bytes(), 1 << 20);
    }

    #[test]
    fn one_layer_is_the_whole_disk() {
        let dir = tempfile::tempdir().unwrap();
        let storage = plan(&mut Slots::default(), &[layer(dir.path(), "only")], Upper::None).unwrap();
        assert_eq!(storage.disks[0].1.layout, BlockLayout::Whole);
        assert_eq!(storage.rootfs.lower[0].partition, 0);
        assert!(storage.rootfs.upper.is_none());
    }

    #[test]
    fn an_ext4_is_a_root_without_layers() {
        let storage = plan_ext4(&mut Slots::default(), tempfile::tempfile().unwrap()).unwrap();
        assert!(storage.rootfs.lower.is_empty() && !storage.disks[0].1.read_only);
        assert_eq!(storage.rootfs.ext4().slot, u32::from(storage.disks[0].0));
    }

    #[test]
    fn too_many_layers_none_and_a_missing_one_are_refused() {
        assert!(matches!(plan(&mut Slots::default(), &[], Upper::None), Err(StorageError::Layers(0))));
        let many = vec![PathBuf::from("x"); LAYERS_MAX + 1];
        assert!(matches!(plan(&mut Slots::default(), &many, Upper::None), Err(StorageError::Layers(_))));
        assert!(matches!(
            plan(&mut Slots::default(), &["/nonexistent".into()], Upper::None),
            Err(StorageError::Layer(_))
        ));
    }

    #[test]
    fn tools_are_looked_for_in_the_system_first_and_never_in_the_current_directory() {
        let system = "/usr/sbin:/usr/bin:/sbin:/bin";
        assert_eq!(search_path(""), system);
        assert_eq!(search_path(":/opt/bin::bin:.:"), format!("{system}:/opt/bin"));
    }

    #[tokio::test]
    async fn a_scratch_disk_is_an_ext4_that_takes_no_space_yet() {
        use std::os::unix::fs::MetadataExt;

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("scratch.ext4");
        let file = make_scratch(&path, Size(64 << 20)).await.unwrap();
        assert_eq!(image_file::open(&path).unwrap().1, Format::Ext4);
        assert!(file.metadata().unwrap().blocks() * 512 < 8 << 20);
        let storage =
            plan(&mut Slots::default(), &[layer(dir.path(), "only")], Upper::Scratch(file)).unwrap();
        assert_ne!(storage.disks[1].0, storage.disks[0].0);
        assert_eq!(storage.rootfs.ext4().slot, u32::from(storage.disks[1].0));
        assert!(matches!(make_scratch(&path, Size(1)).await, Err(StorageError::ScratchSize(_))));
        assert!(matches!(make_scratch(&path, SCRATCH_MIN).await, Err(StorageError::Scratch(..))));
    }

    #[tokio::test]
    async fn what_was_written_above_a_snapshot_is_kept_and_half_a_disk_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(WRITTEN_FILE);
        fs::write(path.with_extension("new"), "half").unwrap();
        let disk = snapshot_disk(dir.path(), Size(64 << 20)).await.unwrap();
        // Where ext4 keeps nothing.
        disk.write_all_at(b"mark", 0).unwrap();
        assert_eq!(image_file::open(&path).unwrap().1, Format::Ext4);
        let mut mark = [0; 4];
        snapshot_disk(dir.path(), Size(1 << 30)).await.unwrap().read_exact_at(&mut mark, 0).unwrap();
        assert_eq!(&mark, b"mark");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        fs::write(&path, "no disk").unwrap();
        assert!(matches!(snapshot_disk(dir.path(), SCRATCH_MIN).await, Err(StorageError::Written(_))));
    }
}
