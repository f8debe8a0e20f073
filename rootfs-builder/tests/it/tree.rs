//! What a file system holds, whoever reads it: by `erofs-rs` from an image, or by the kernel from a directory.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use erofs_rs::EroFS;
use erofs_rs::backend::SliceImage;
use rustix::fs::FileType;
use rustix::fs::{lgetxattr, llistxattr, major, minor};

pub(crate) type Tree = BTreeMap<Vec<u8>, Facts>;

/// Everything about an entry that must survive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    /// With the type, as in `st_mode`.
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, u32),
    pub(crate) links: u64,
    pub(crate) device: Option<(u32, u32)>,
    /// Of a file, or the target of a link.
    pub(crate) content: Content,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same inode.
    pub(crate) first: Vec<u8>,
}

/// Content, printed by its length only.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Content(pub(crate) Vec<u8>);

impl std::fmt::Debug for Content {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "{} bytes: {:?}...",
            self.0.len(),
            String::from_utf8_lossy(&self.0[..self.0.len().min(40)])
        )
    }
}

/// Reads an image with `erofs-rs`, having `fsck.erofs` look at it too.
pub(crate) fn read_image(path: &Path) -> Tree {
    if let Some(Err(said)) = fsck(path) {
        panic!("fsck.erofs: {said}");
    }
    let bytes = std::fs::read(path).unwrap();
    let image = EroFS::new(SliceImage::new(&bytes)).unwrap();
    let root = image.get_inode(image.super_block().root_inode_id()).unwrap();
    let mut inodes = vec![(Vec::new(), root)];
    for entry in image.walk_dir("/").unwrap() {
        let entry = entry.unwrap();
        if !matches!(entry.dir_entry.file_name(), b"." | b"..") {
            let path = entry.dir_entry.path();
            inodes.push((path.as_bytes().strip_prefix(b"/").unwrap().to_vec(), entry.inode));
        }
    }
    inodes.sort_by(|a, b| a.0.cmp(&b.0));
    assert!(inodes.windows(2).all(|pair| pair[0].0 != pair[1].0), "a name occurs twice");
    let mut firsts = BTreeMap::new();
    let facts = inodes.into_iter().map(|(path, inode)| {
        let kind = match inode.file_type() {
            FileType::Fifo => 0o010_000,
            FileType::CharacterDevice => 0o020_000,
            FileType::Directory => 0o040_000,
            FileType::BlockDevice => 0o060_000,
            FileType::RegularFile => 0o100_000,
            FileType::Symlink => 0o120_000,
            FileType::Socket => 0o140_000,
            FileType::Unknown => panic!("{path:?} has no type"),
        };
        let mut content = Vec::new();
        if inode.is_file() {
            image.open_inode_file(inode).unwrap().read_to_end(&mut content).unwrap();
        } else if inode.is_symlink() {
            content = image.read_link_inode(inode).unwrap().as_bytes().to_vec();
        }
        let first = firsts.entry(inode.id()).or_insert_with(|| path.clone()).clone();
        let facts = Facts {
            mode: kind | inode.permissions().mode(),
            owner: (inode.uid(), inode.gid()),
            mtime: inode.modified_unix(),
            links: u64::from(inode.nlink()),
            device: inode.device(),
            content: Content(content),
            xattrs: image.xattrs_inode(inode).unwrap(),
            first,
        };
        (path, facts)
    });
    facts.collect()
}

/// Reads a directory through the kernel, without following links.
pub(crate) fn read_directory(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut pending = vec![root.to_path_buf()];
    let mut paths = Vec::new();
    while let Some(path) = pending.pop() {
        if path.symlink_metadata().unwrap().is_dir() {
            pending.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        paths.push(path);
    }
    paths.sort_by(|a, b| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
    let mut firsts = BTreeMap::new();
    for path in paths {
        let found = path.symlink_metadata().unwrap();
        let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
        let content = if found.is_file() {
            std::fs::read(&path).unwrap()
        } else if found.is_symlink() {
            path.read_link().unwrap().as_os_str().as_bytes().to_vec()
        } else {
            Vec::new()
        };
        let is_device = matches!(found.mode() & 0o170_000, 0o020_000 | 0o060_000);
        let facts = Facts {
            mode: found.mode(),
            owner: (found.uid(), found.gid()),
            mtime: (found.mtime(), found.mtime_nsec().try_into().unwrap()),
            links: found.nlink(),
            device: is_device.then(|| (major(found.rdev()), minor(found.rdev()))),
            content: Content(content),
            xattrs: xattrs(&path),
            first: firsts.entry((found.dev(), found.ino())).or_insert_with(|| name.clone()).clone(),
        };
        tree.insert(name, facts);
    }
    tree
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut list = vec![0; 65_536];
    let length = llistxattr(path, &mut list).unwrap_or(0);
    let names = list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let values = names.map(|name| {
        let mut value = vec![0; 65_536];
        let length = lgetxattr(path, std::ffi::OsStr::from_bytes(name), &mut value).unwrap();
        value.truncate(length);
        (name.to_vec(), value)
    });
    values.collect()
}

/// Fails where two trees first differ, with both sides.
pub(crate) fn assert_same(actual: &Tree, expected: &Tree) {
    for (path, facts) in expected {
        let shown = String::from_utf8_lossy(path);
        let other = actual.get(path).unwrap_or_else(|| panic!("{shown:?} is missing"));
        assert!(other == facts, "{shown:?} differs:\n actual  {other:?}\n expected {facts:?}");
    }
    for path in actual.keys() {
        assert!(expected.contains_key(path), "{:?} is too much", String::from_utf8_lossy(path));
    }
}

/// What `fsck.erofs` says against an image; nothing where it is missing.
fn fsck(image: &Path) -> Option<Result<(), String>> {
    // It reads the content of every file, and checks the superblock's checksum.
    match Command::new("fsck.erofs").arg("--extract").arg(image).output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            // Version 1.5 exits with 0 at a wrong checksum, of which it only tells.
            Some(if output.status.success() && !said.contains("<E>") { Ok(()) } else { Err(said) })
        }
        Err(error) => {
            crate::skipped("fsck.erofs", &error.to_string());
            None
        }
    }
}

#[test]
fn fsck_finds_damage() {
    use std::os::unix::fs::FileExt;

    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    bulkhead_rootfs_builder::directory::pack(directory.path(), &image, 1 << 20, &mut |_| {}).unwrap();
    assert!(fsck(&image).is_none_or(|said| said.is_ok()));
    std::fs::File::options().write(true).open(&image).unwrap().write_all_at(b"x", 1100).unwrap();
    assert!(fsck(&image).is_none_or(|said| said.is_err()));
}
