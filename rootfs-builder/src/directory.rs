//! Packs a directory tree into an EROFS image: the root file system of `--rootfs DIR`.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata as HostMetadata};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::SeekFrom as Whence;

use crate::erofs::{
    Builder, Error as ErofsError, Extent, Metadata, NodeId, Options, Special, Summary, Xattrs,
};

/// Why a directory could not be packed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something in it cannot be read.
    #[error("reading {path:?} failed; packing needs to read everything in the directory")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not a directory.
    #[error("{path:?} is not a directory; give the root of a file system")]
    NotADirectory {
        /// Its path.
        path: PathBuf,
    },
    /// The image cannot be written.
    #[error("writing the image {path:?} failed; check that its directory exists and has free space")]
    Output {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something in it cannot be stored.
    #[error("packing {path:?} failed")]
    Pack {
        /// The file, or the image as a whole.
        path: PathBuf,
        /// Why.
        source: ErofsError,
    },
}

/// Packs the tree at `root` into the new file `output`, which appears when it is whole. `max_size` bounds the image in bytes;
/// `progress` is told the bytes of files that were read.
///
/// Links are stored, not followed, and mounts below `root` belong to the tree. Owners, modes, times, extended attributes, hard
/// links and holes are kept, and so are sockets, whose names a program may expect. A file that changes meanwhile is
/// stored as it was found; one that becomes shorter is an error.
///
/// # Errors
/// If something cannot be read or written. `output` is then not there.
pub fn pack(
    root: &Path,
    output: &Path,
    max_size: u64,
    progress: &mut dyn FnMut(u64),
) -> Result<Summary, Error> {
    let output_error = |source| Error::Output { path: output.into(), source };
    let found = std::fs::symlink_metadata(root).map_err(read_error(root))?;
    if !found.is_dir() {
        return Err(Error::NotADirectory { path: root.into() });
    }
    let directory = output.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    let temporary = tempfile::NamedTempFile::new_in(directory).map_err(output_error)?;
    let scratch = tempfile::tempfile_in(directory).map_err(output_error)?;
    let file = temporary.as_file().try_clone().map_err(output_error)?;
    let whole = |source| Error::Pack { path: root.into(), source };
    let options = Options { uuid: *b"bulkhead-rootfs\0", max_size };
    let mut image = Builder::new(file, scratch, options).map_err(whole)?;
    let top = image.root();
    *image.directory_metadata(top).expect("the root is a directory") = metadata(root, &found)?;
    let mut packer = Packer { image, links: HashMap::new(), done: 0, progress, own: identity(&found) };
    // A stack of our own: a tree may be deeper than the thread's.
    let mut pending = vec![(root.to_path_buf(), top)];
    while let Some((path, node)) = pending.pop() {
        packer.directory(&path, node, &mut pending)?;
    }
    let (_, summary) = packer.image.finish().map_err(whole)?;
    temporary.as_file().sync_all().map_err(output_error)?;
    temporary.persist(output).map_err(|error| output_error(error.error))?;
    Ok(summary)
}

struct Packer<'a> {
    image: Builder,
    /// Files with several names that were seen, by device and inode.
    links: HashMap<(u64, u64), NodeId>,
    done: u64,
    progress: &'a mut dyn FnMut(u64),
    own: (u64, u64),
}

impl Packer<'_> {
    fn directory(
        &mut self,
        path: &Path,
        node: NodeId,
        pending: &mut Vec<(PathBuf, NodeId)>,
    ) -> Result<(), Error> {
        let listing = std::fs::read_dir(path).map_err(read_error(path))?;
        let names: io::Result<Vec<OsString>> =
            listing.map(|entry| entry.map(|entry| entry.file_name())).collect();
        let mut names = names.map_err(read_error(path))?;
        // The order on disk is the file system's own; the image must not depend on it.
        names.sort_unstable();
        for name in names {
            let path = path.join(&name);
            let found = std::fs::symlink_metadata(&path).map_err(read_error(&path))?;
            // A bind mount of the root below itself would never end.
            if found.is_dir() && identity(&found) == self.own {
                continue;
            }
            if let Some(directory) = self.entry(&path, node, &name, &found)? {
                pending.push((path, directory));
            }
        }
        Ok(())
    }

    /// Adds an entry; the node if it is a directory, to be read later.
    fn entry(
        &mut self,
        path: &Path,
        parent: NodeId,
        name: &OsStr,
        found: &HostMetadata,
    ) -> Result<Option<NodeId>, Error> {
        let place = (parent, name.as_bytes());
        let pack = |source| Error::Pack { path: path.into(), source };
        let several_names = found.nlink() > 1 && !found.is_dir();
        if several_names && let Some(node) = self.links.get(&identity(found)) {
            self.image.add_hard_link(place, *node).map_err(pack)?;
            return Ok(None);
        }
        let meta = metadata(path, found)?;
        let kind = found.file_type();
        let device = (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()));
        let node = if kind.is_dir() {
            return self.image.add_directory(place, meta).map(Some).map_err(pack);
        } else if kind.is_symlink() {
            let target = std::fs::read_link(path).map_err(read_error(path))?;
            self.image.add_symlink(place, meta, target.as_os_str().as_bytes()).map_err(pack)?
        } else if kind.is_file() {
            self.file(path, place, meta)?
        } else {
            let special = if kind.is_char_device() {
                Special::CharDevice(device.0, device.1)
            } else if kind.is_block_device() {
                Special::BlockDevice(device.0, device.1)
            } else if kind.is_fifo() {
                Special::Fifo
            } else {
                Special::Socket
            };
            self.image.add_special(place, meta, special).map_err(pack)?
        };
        if several_names {
            self.links.insert(identity(found), node);
        }
        Ok(None)
    }

    fn file(&mut self, path: &Path, place: (NodeId, &[u8]), meta: Metadata) -> Result<NodeId, Error> {
        // Not a link or pipe that has taken the file's place meanwhile.
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        let flags = i32::try_from(flags.bits()).expect("flags of open(2) are an int");
        let file = File::options().read(true).custom_flags(flags).open(path).map_err(read_error(path))?;
        let found = file.metadata().map_err(read_error(path))?;
        let size = found.len();
        let pack = |source| Error::Pack { path: path.into(), source };
        let node = if found.blocks() * 512 < size {
            let extents = extents(&file, size).map_err(read_error(path))?;
            let data = ExtentReader { file: &file, extents: extents.clone().into_iter(), left: 0 };
            self.image.add_sparse_file(place, meta, size, &extents, &mut { data }).map_err(pack)?
        } else {
            self.image.add_file(place, meta, size, &mut &file).map_err(pack)?
        };
        self.done += size;
        (self.progress)(self.done);
        Ok(node)
    }
}

/// The runs of data in a sparse file.
fn extents(file: &File, size: u64) -> io::Result<Vec<Extent>> {
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let offset = match rustix::fs::seek(file, Whence::Data(at)) {
            Ok(offset) => offset.min(size),
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(file, Whence::Hole(offset))?.min(size);
        extents.push(Extent { offset, length: end - offset });
        at = end;
    }
    Ok(extents)
}

/// The data of a sparse file, one extent after the other.
struct ExtentReader<'a> {
    file: &'a File,
    extents: std::vec::IntoIter<Extent>,
    left: u64,
}

impl Read for ExtentReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left == 0 {
            let Some(extent) = self.extents.next() else { return Ok(0) };
            self.file.seek(SeekFrom::Start(extent.offset))?;
            self.left = extent.length;
        }
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.file.read(&mut buffer[..wanted])?;
        self.left -= count as u64;
        Ok(count)
    }
}

fn metadata(path: &Path, found: &HostMetadata) -> Result<Metadata, Error> {
    Ok(Metadata {
        mode: u16::try_from(found.mode() & 0o7777).expect("12 bits"),
        uid: found.uid(),
        gid: found.gid(),
        seconds: found.mtime(),
        nanoseconds: u32::try_from(found.mtime_nsec()).expect("below 1,000,000,000"),
        xattrs: xattrs(path)?,
    })
}

/// The extended attributes that an image can hold. Those of overlayfs become those of an overlay inside the container.
fn xattrs(path: &Path) -> Result<Xattrs, Error> {
    let failed = |error: rustix::io::Errno| read_error(path)(error.into());
    let mut list = vec![0; XATTR_LIST_MAX];
    let length = match rustix::fs::llistxattr(path, &mut list) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => 0,
        Err(error) => return Err(failed(error)),
    };
    let mut names: Vec<&[u8]> =
        list[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()).collect();
    names.sort_unstable();
    let mut xattrs = Xattrs::new();
    for name in names.into_iter().filter(|name| Xattrs::supports(name)) {
        let mut value = vec![0; XATTR_VALUE_MAX];
        let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value).map_err(failed)?;
        let added = xattrs.add_below_overlay(name, &value[..length]);
        added.map_err(|source| Error::Pack { path: path.into(), source })?;
    }
    Ok(xattrs)
}

/// Limits of Linux (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const XATTR_LIST_MAX: usize = 65_536;
const XATTR_VALUE_MAX: usize = 65_536;

fn identity(found: &HostMetadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

fn read_error(path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| Error::Read { path, source }
}
