//! Puts an image together: takes entries, and at the end lays out and writes directories and inodes.

use std::fs::File;
use std::io::Read;

use super::content::{DataArea, Extent};
use super::format::{BLOCK, BLOCK_BYTES, FILE_MAX, INODE_SLOT, Layout, NAME_MAX, Superblock};
use super::layout::{Beside, Plan};
use super::tree::{Entries, FileType, Kind, Metadata, Node, NodeId, Special, Tree};
use super::{Error, SYMLINK_MAX, directory};
use crate::excerpt::excerpt_of_bytes;

/// What the caller decides about an image as a whole.
#[derive(Clone, Debug)]
pub struct Options {
    /// The volume's identity. Derive it from what the image is made of: overlayfs tells its layers apart by it.
    pub uuid: [u8; 16],
    /// The most bytes that the image may have, holes included.
    pub max_size: u64,
}

/// A finished image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Its size in bytes, a multiple of [`BLOCK`].
    pub size: u64,
    /// How many inodes it has.
    pub inodes: u64,
}

/// An image being built. Adding an entry under a name that exists replaces what had it.
pub struct Builder {
    tree: Tree,
    data: DataArea,
    options: Options,
}

impl Builder {
    /// Starts an image in the empty file `output` whose root directory is root's and has mode 0755. `scratch` is an empty
    /// file opened for reading and writing that nobody needs afterwards.
    ///
    /// # Errors
    /// If `options` leave no room for a superblock.
    pub fn new(output: File, scratch: File, options: Options) -> Result<Self, Error> {
        let root = Metadata { mode: 0o755, ..Metadata::default() };
        Ok(Self { tree: Tree::new(root), data: DataArea::new(output, scratch, options.max_size)?, options })
    }

    /// The root directory.
    pub fn root(&self) -> NodeId {
        Tree::ROOT
    }

    /// What `name` leads to in `parent`; nothing if `parent` is not a directory.
    pub fn lookup(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        self.tree.entries(parent)?.get(name).copied()
    }

    /// The type of a node.
    pub fn file_type(&self, id: NodeId) -> FileType {
        self.tree.node(id).file_type()
    }

    /// Adds a regular file of `size` bytes, which are read from `data`.
    ///
    /// # Errors
    /// As for every addition: if the name is not one, the parent not a directory, the image full, or reading or writing
    /// fails. Here also if `data` ends early.
    pub fn add_file(
        &mut self,
        (parent, name): (NodeId, &[u8]),
        meta: Metadata,
        size: u64,
        data: &mut dyn Read,
    ) -> Result<NodeId, Error> {
        self.check_place(parent, name)?;
        check_size(size)?;
        let content = self.data.store(size, meta.xattrs.as_bytes().len(), data)?;
        self.add((parent, name), meta, Kind::File(content))
    }

    /// Adds a regular file of `size` bytes of which only `extents` have data; `data` has them one after the other.
    ///
    /// # Errors
    /// Also if the extents are not in order, overlap, or reach beyond `size`.
    pub fn add_sparse_file(
        &mut self,
        (parent, name): (NodeId, &[u8]),
        meta: Metadata,
        size: u64,
        extents: &[Extent],
        data: &mut dyn Read,
    ) -> Result<NodeId, Error> {
        self.check_place(parent, name)?;
        check_size(size)?;
        let content = self.data.store_sparse(size, extents, data)?;
        self.add((parent, name), meta, Kind::File(content))
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// Also if the target is empty, too long, or has a zero byte.
    pub fn add_symlink(
        &mut self,
        (parent, name): (NodeId, &[u8]),
        meta: Metadata,
        target: &[u8],
    ) -> Result<NodeId, Error> {
        self.check_place(parent, name)?;
        if target.is_empty() || target.len() > SYMLINK_MAX || target.contains(&0) {
            return Err(Error::SymlinkTarget { length: target.len() });
        }
        let content = self.data.store(target.len() as u64, meta.xattrs.as_bytes().len(), &mut &target[..])?;
        self.add((parent, name), meta, Kind::Symlink(content))
    }

    /// Adds an empty directory.
    ///
    /// # Errors
    /// As for every addition.
    pub fn add_directory(
        &mut self,
        (parent, name): (NodeId, &[u8]),
        meta: Metadata,
    ) -> Result<NodeId, Error> {
        self.check_place(parent, name)?;
        self.add((parent, name), meta, Kind::Directory(Entries::new()))
    }

    /// Adds a device, pipe or socket.
    ///
    /// # Errors
    /// Also if a device number is out of range.
    pub fn add_special(
        &mut self,
        (parent, name): (NodeId, &[u8]),
        meta: Metadata,
        special: Special,
    ) -> Result<NodeId, Error> {
        self.check_place(parent, name)?;
        match special {
            Special::CharDevice(major, minor) | Special::BlockDevice(major, minor)
                if major >= 1 << 12 || minor >= 1 << 20 =>
            {
                Err(Error::Device { major, minor })
            }
            _ => self.add((parent, name), meta, Kind::Special(special)),
        }
    }

    /// Adds another name for something that is not a directory.
    ///
    /// # Errors
    /// Also if it is a directory.
    pub fn add_hard_link(&mut self, (parent, name): (NodeId, &[u8]), target: NodeId) -> Result<(), Error> {
        self.check_place(parent, name)?;
        if self.tree.entries(target).is_some() {
            return Err(Error::DirectoryLink);
        }
        self.link((parent, name), target);
        Ok(())
    }

    /// The metadata of a directory, to be changed; none for other nodes, whose content may already lie where it does because
    /// of their attributes.
    pub fn directory_metadata(&mut self, id: NodeId) -> Option<&mut Metadata> {
        let node = self.tree.node_mut(id);
        matches!(node.kind, Kind::Directory(_)).then_some(&mut node.meta)
    }

    /// Writes directories, inodes and superblock, and gives back the file. Nothing is synced.
    ///
    /// # Errors
    /// If the image is full or writing fails.
    pub fn finish(mut self) -> Result<(File, Summary), Error> {
        let plan = Plan::new(&self.tree, self.data.next_block()?)?;
        self.write_directories(&plan)?;
        let chunked_files = self.write_inodes(&plan)?;
        let superblock = Superblock {
            root: u16::try_from(plan.numbers[Tree::ROOT.0 as usize]).expect("the root is first"),
            inodes: plan.inodes,
            blocks: self.data.next_block()?,
            meta_block: plan.meta_block,
            uuid: self.options.uuid,
            chunked_files,
        };
        let (file, size) = self.data.finish(&superblock.encode())?;
        Ok((file, Summary { size, inodes: plan.inodes }))
    }

    /// Writes the metadata area; true if a file in it is chunk-based.
    fn write_inodes(&mut self, plan: &Plan) -> Result<bool, Error> {
        let mut chunked_files = false;
        let mut at = 0;
        for (id, node) in self.tree.iter() {
            let start = u64::from(plan.numbers[id.0 as usize]) * INODE_SLOT;
            if start == 0 {
                continue;
            }
            self.data.zeros(start - at)?;
            let (inode, beside) = plan.describe(id, node);
            chunked_files |= matches!(inode.layout, Layout::Chunked { .. });
            self.data.append(&inode.encode())?;
            self.data.append(node.meta.xattrs.as_bytes())?;
            match beside {
                Beside::Nothing => {}
                Beside::Scratch(place) => self.data.append_beside(place)?,
                Beside::DirectoryTail => {
                    let content = encode_directory(&self.tree, plan, id);
                    self.data.append(&content[content.len() / BLOCK_BYTES * BLOCK_BYTES..])?;
                }
            }
            at = start + plan.unit_bytes(id, node);
        }
        // fsck.erofs 1.5 looks for attributes behind every inode, also where there are none: at the image's end they must not be
        // beyond it.
        self.data.zeros(INODE_SLOT)?;
        self.data.fill_block()?;
        Ok(chunked_files)
    }

    fn add(&mut self, place: (NodeId, &[u8]), mut meta: Metadata, kind: Kind) -> Result<NodeId, Error> {
        meta.xattrs = meta.xattrs.shrink();
        let id = self.tree.add(Node { meta, kind }).ok_or(Error::TooManyNodes)?;
        self.link(place, id);
        Ok(id)
    }

    fn link(&mut self, (parent, name): (NodeId, &[u8]), id: NodeId) {
        let Kind::Directory(entries) = &mut self.tree.node_mut(parent).kind else {
            unreachable!("check_place was called");
        };
        entries.insert(name.into(), id);
    }

    fn check_place(&self, parent: NodeId, name: &[u8]) -> Result<(), Error> {
        let reason = match name {
            _ if self.tree.entries(parent).is_none() => return Err(Error::ParentNotDirectory),
            b"" => "it is empty",
            b"." | b".." => "it has a meaning of its own",
            _ if name.len() > NAME_MAX => "it is longer than 255 bytes",
            _ if name.contains(&0) || name.contains(&b'/') => "it has a slash or a zero byte",
            _ => return Ok(()),
        };
        Err(Error::Name { name: excerpt_of_bytes(name), reason })
    }

    /// Writes the blocks of directories that do not lie beside their inode.
    fn write_directories(&mut self, plan: &Plan) -> Result<(), Error> {
        for (id, content) in (0..).map(NodeId).zip(&plan.directories) {
            let Some(content) = content else { continue };
            let inline = content.layout == Layout::FlatInline;
            if inline && content.size < BLOCK {
                continue;
            }
            let mut encoded = encode_directory(&self.tree, plan, id);
            if inline {
                encoded.truncate(encoded.len() / BLOCK_BYTES * BLOCK_BYTES);
            }
            self.data.append(&encoded)?;
            self.data.fill_block()?;
        }
        Ok(())
    }
}

fn encode_directory(tree: &Tree, plan: &Plan, id: NodeId) -> Vec<u8> {
    let entries = tree.entries(id).expect("only called for directories");
    directory::encode(entries, (id, plan.links.parents[id.0 as usize]), |child| {
        (u64::from(plan.numbers[child.0 as usize]), tree.node(child).file_type())
    })
}

fn check_size(size: u64) -> Result<(), Error> {
    if size < FILE_MAX { Ok(()) } else { Err(Error::FileTooLarge { size }) }
}
