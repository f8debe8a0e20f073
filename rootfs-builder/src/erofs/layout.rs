//! Decides where directories and inodes lie, once all of them are known.

use super::content::Content;
use super::format::{BLOCK, BLOCK_BYTES, FILE_MAX, INODE_BYTES, INODE_SLOT, Inode, Layout, device_number};
use super::tree::{Kind, Links, Node, NodeId, Special, Tree};
use super::{Error, directory};

/// Where everything is.
pub(super) struct Plan {
    pub(super) links: Links,
    /// Content of each directory, by the number of its node; none for others.
    pub(super) directories: Vec<Option<Content>>,
    /// Node numbers on disk; 0 for nodes that are left out.
    pub(super) numbers: Vec<u32>,
    /// First block of the inodes.
    pub(super) meta_block: u32,
    pub(super) inodes: u64,
}

/// What follows an inode and its attributes.
pub(super) enum Beside {
    Nothing,
    /// Offset and length in the scratch file.
    Scratch((u64, u32)),
    /// The last block of the directory's content.
    DirectoryTail,
}

impl Plan {
    /// Plans an image whose directories start at `first_block`.
    pub(super) fn new(tree: &Tree, first_block: u32) -> Result<Self, Error> {
        let links = tree.links();
        let mut block = u64::from(first_block);
        let mut directories = Vec::with_capacity(links.counts.len());
        for (id, node) in tree.iter() {
            let entries = tree.entries(id).filter(|_| links.counts[id.0 as usize] > 0);
            let content = entries.map(|entries| {
                let start = u32::try_from(block).unwrap_or(u32::MAX);
                let (content, blocks) = place_directory(directory::size(entries), node, start);
                block += blocks;
                content
            });
            directories.push(content);
        }
        let meta_block = u32::try_from(block).map_err(|_| Error::TooLarge { limit: FILE_MAX })?;
        let mut plan =
            Self { numbers: vec![0; links.counts.len()], links, directories, meta_block, inodes: 0 };
        plan.place_inodes(tree)?;
        Ok(plan)
    }

    fn place_inodes(&mut self, tree: &Tree) -> Result<(), Error> {
        // Number 0 stays unused: readdir(3) of some C libraries takes an entry with inode 0 for a deleted one.
        let mut at = INODE_SLOT;
        for (id, node) in tree.iter().filter(|(id, _)| self.links.counts[id.0 as usize] > 0) {
            // An inline tail must lie in one block, the target of a link even in the block of its inode; so an inode and
            // what follows it cross a block boundary only if they are longer than a block.
            let unit = self.unit_bytes(id, node);
            if at % BLOCK + unit > BLOCK {
                at = at.next_multiple_of(BLOCK);
            }
            self.numbers[id.0 as usize] = u32::try_from(at / INODE_SLOT).map_err(|_| Error::TooManyNodes)?;
            at = (at + unit).next_multiple_of(INODE_SLOT);
            self.inodes += 1;
        }
        Ok(())
    }

    /// Bytes of an inode with everything that follows it.
    pub(super) fn unit_bytes(&self, id: NodeId, node: &Node) -> u64 {
        let beside = match &node.kind {
            Kind::File(content) | Kind::Symlink(content) => content.beside.1,
            Kind::Directory(_) => self.directory(id).beside.1,
            Kind::Special(_) => 0,
        };
        (INODE_BYTES + node.meta.xattrs.as_bytes().len()) as u64 + u64::from(beside)
    }

    /// The inode of a node, and what comes after its attributes.
    pub(super) fn describe(&self, id: NodeId, node: &Node) -> (Inode, Beside) {
        let mut inode = Inode {
            layout: Layout::FlatPlain,
            xattr_bytes: node.meta.xattrs.as_bytes().len(),
            mode: node.file_type().mode_bits() | node.meta.mode & 0o7777,
            size: 0,
            address: 0,
            number: id.0.wrapping_add(1),
            uid: node.meta.uid,
            gid: node.meta.gid,
            seconds: node.meta.seconds,
            nanoseconds: node.meta.nanoseconds,
            links: self.links.counts[id.0 as usize],
        };
        let (content, beside) = match &node.kind {
            Kind::File(content) | Kind::Symlink(content) => (content, Beside::Scratch(content.beside)),
            Kind::Directory(_) => {
                let content = self.directory(id);
                let inline = content.layout == Layout::FlatInline;
                (content, if inline { Beside::DirectoryTail } else { Beside::Nothing })
            }
            Kind::Special(special) => {
                if let Special::CharDevice(major, minor) | Special::BlockDevice(major, minor) = *special {
                    inode.address = device_number(major, minor);
                }
                return (inode, Beside::Nothing);
            }
        };
        inode.layout = content.layout;
        inode.size = content.size;
        inode.address = content.block;
        (inode, beside)
    }

    fn directory(&self, id: NodeId) -> &Content {
        self.directories[id.0 as usize].as_ref().expect("only asked for directories that have a name")
    }
}

/// The content of a directory of `size` bytes that starts at `block`, and how many blocks it takes there.
fn place_directory(size: u64, node: &Node, block: u32) -> (Content, u64) {
    let tail = usize::try_from(size % BLOCK).expect("less than a block");
    if tail != 0 && INODE_BYTES + node.meta.xattrs.as_bytes().len() + tail <= BLOCK_BYTES {
        let beside = (0, u32::try_from(tail).expect("less than a block"));
        (Content { size, layout: Layout::FlatInline, block, beside }, size / BLOCK)
    } else {
        (Content { size, layout: Layout::FlatPlain, block, beside: (0, 0) }, size.div_ceil(BLOCK))
    }
}
