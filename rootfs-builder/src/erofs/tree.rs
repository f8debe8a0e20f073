//! The tree of an image while it is being built: an arena of nodes and the names that lead to them.

use std::collections::BTreeMap;

use super::content::Content;
use super::xattr::Xattrs;

/// A file, directory or other inode of the image being built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(pub(super) u32);

/// Everything about an inode but its type and content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Permissions with set-uid, set-gid and sticky bit: the lower 12 bits of `st_mode`. Others are ignored.
    pub mode: u16,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Last modification, seconds since the epoch.
    pub seconds: i64,
    /// Nanoseconds of the last modification, below 1,000,000,000.
    pub nanoseconds: u32,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

/// The type of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileType {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
}

impl FileType {
    /// The type as bits of `st_mode`.
    pub(super) fn mode_bits(self) -> u16 {
        match self {
            Self::Fifo => 0o010_000,
            Self::CharDevice => 0o020_000,
            Self::Directory => 0o040_000,
            Self::BlockDevice => 0o060_000,
            Self::File => 0o100_000,
            Self::Symlink => 0o120_000,
            Self::Socket => 0o140_000,
        }
    }

    /// The type in a directory entry: the kernel's generic `FT_*`.
    pub(super) fn dirent_type(self) -> u8 {
        match self {
            Self::File => 1,
            Self::Directory => 2,
            Self::CharDevice => 3,
            Self::BlockDevice => 4,
            Self::Fifo => 5,
            Self::Socket => 6,
            Self::Symlink => 7,
        }
    }
}

/// An inode that has no content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// A character device with its major (below 4,096) and minor (below 1,048,576) number.
    CharDevice(u32, u32),
    /// A block device, likewise.
    BlockDevice(u32, u32),
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
}

pub(super) type Entries = BTreeMap<Box<[u8]>, NodeId>;

pub(super) enum Kind {
    Directory(Entries),
    File(Content),
    Symlink(Content),
    Special(Special),
}

pub(super) struct Node {
    pub(super) meta: Metadata,
    pub(super) kind: Kind,
}

impl Node {
    pub(super) fn file_type(&self) -> FileType {
        match self.kind {
            Kind::Directory(_) => FileType::Directory,
            Kind::File(_) => FileType::File,
            Kind::Symlink(_) => FileType::Symlink,
            Kind::Special(Special::CharDevice(..)) => FileType::CharDevice,
            Kind::Special(Special::BlockDevice(..)) => FileType::BlockDevice,
            Kind::Special(Special::Fifo) => FileType::Fifo,
            Kind::Special(Special::Socket) => FileType::Socket,
        }
    }
}

/// The nodes by number, the root first. Nodes that lost their last name stay, unreachable, until the end.
pub(super) struct Tree {
    nodes: Vec<Node>,
}

/// What a walk from the root finds out about each node.
pub(super) struct Links {
    /// `st_nlink`; 0 for a node that no name leads to.
    pub(super) counts: Vec<u32>,
    /// The directory that holds a directory; the root holds itself.
    pub(super) parents: Vec<NodeId>,
}

impl Tree {
    pub(super) const ROOT: NodeId = NodeId(0);

    pub(super) fn new(root: Metadata) -> Self {
        Self { nodes: vec![Node { meta: root, kind: Kind::Directory(Entries::new()) }] }
    }

    pub(super) fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.0 as usize]
    }

    pub(super) fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.0 as usize]
    }

    /// All nodes with their numbers, in the order in which they were added.
    pub(super) fn iter(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        (0..).map(NodeId).zip(&self.nodes)
    }

    /// The entries of a directory; none if `id` is something else.
    pub(super) fn entries(&self, id: NodeId) -> Option<&Entries> {
        match &self.node(id).kind {
            Kind::Directory(entries) => Some(entries),
            _ => None,
        }
    }

    /// Adds a node that no name leads to yet; none if there are 2^32 already.
    pub(super) fn add(&mut self, node: Node) -> Option<NodeId> {
        let id = NodeId(u32::try_from(self.nodes.len()).ok()?);
        self.nodes.push(node);
        Some(id)
    }

    /// Counts links from the root down. Every directory has exactly one name, so the walk ends.
    pub(super) fn links(&self) -> Links {
        let mut links =
            Links { counts: vec![0; self.nodes.len()], parents: vec![Self::ROOT; self.nodes.len()] };
        links.counts[Self::ROOT.0 as usize] = 2;
        let mut pending = vec![Self::ROOT];
        while let Some(directory) = pending.pop() {
            for &child in self.entries(directory).into_iter().flat_map(BTreeMap::values) {
                if self.entries(child).is_some() {
                    links.counts[child.0 as usize] = 2;
                    links.counts[directory.0 as usize] += 1;
                    links.parents[child.0 as usize] = directory;
                    pending.push(child);
                } else {
                    links.counts[child.0 as usize] += 1;
                }
            }
        }
        links
    }
}
