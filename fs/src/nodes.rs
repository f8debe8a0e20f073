//! What the guest knows: a table of nodes, each a file of the host under the name by which it can be opened again. The guest looks
//! them up and forgets them; ids are never used twice.

use std::collections::HashMap;
use std::ffi::CStr;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use rustix::fs::FileType;
use rustix::io::Errno;

use crate::attributes::{Attributes, Content, Identity};
use crate::descriptors::{Descriptors, Slot};
use crate::host::FileSystem;

/// The root directory's id, which is FUSE's. It is in no table.
pub const ROOT: u64 = 1;

/// Nodes at most. Beyond it, lookups fail with ENFILE until the guest forgets something.
pub const NODES_MAX: usize = 4 << 20;

/// How deep a node may be below its share.
pub const DEPTH_MAX: usize = 4096;

/// A file of a share.
#[derive(Debug)]
pub struct Node {
    /// Its share's id.
    pub share: u64,
    /// The directory where it was seen last; [`ROOT`] for what is shared itself.
    pub parent: u64,
    /// Its name there, or nothing if it has never had one.
    pub name: Box<CStr>,
    /// Which file it is.
    pub identity: Identity,
    /// Its type, which never changes.
    pub kind: FileType,
    /// Its content when the guest opened it last, whose cache may hold that.
    pub content: Option<Box<Content>>,
    /// When it was made, as far as its time of modification tells, if it is a symbolic link: the guest keeps where the link of a node leads.
    made: Option<Duration>,
    /// What it is on: that of its parent, unless something is mounted here. Of the kernel's, nothing is the guest's but that it is there.
    pub(crate) file_system: FileSystem,
    /// Its descriptor.
    pub(crate) slot: Option<Slot>,
    /// How often the guest has looked it up and not forgotten it.
    lookups: u64,
    /// Nodes that have it as their parent, and so keep it.
    children: u32,
}

/// All of them.
#[derive(Debug)]
pub struct Nodes {
    table: HashMap<u64, Node>,
    /// Their ids by share and identity.
    index: HashTable<u64>,
    hasher: RandomState,
    next: u64,
    pub(crate) descriptors: Descriptors,
}

impl Nodes {
    /// An empty table that keeps at most so many descriptors.
    pub fn new(descriptors_max: usize) -> Self {
        Self {
            table: HashMap::new(),
            index: HashTable::new(),
            hasher: RandomState::new(),
            next: ROOT + 1,
            descriptors: Descriptors::new(descriptors_max),
        }
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// True when the guest knows nothing.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// A node.
    ///
    /// # Errors
    /// ESTALE when there is none of that id.
    pub fn get(&self, id: u64) -> Result<&Node, Errno> {
        self.table.get(&id).ok_or(Errno::STALE)
    }

    pub(crate) fn get_mut(&mut self, id: u64) -> Option<&mut Node> {
        self.table.get_mut(&id)
    }

    /// The node of a file that the guest knows.
    pub fn find(&self, share: u64, identity: Identity) -> Option<u64> {
        let hash = self.hasher.hash_one((share, identity));
        self.index.find(hash, |id| self.is(*id, share, identity)).copied()
    }

    fn is(&self, id: u64, share: u64, identity: Identity) -> bool {
        self.table.get(&id).is_some_and(|node| node.share == share && node.identity == identity)
    }

    /// The guest looks something up: what was found in `parent`, which is [`ROOT`] or a node, under a name. Gives its id.
    ///
    /// # Errors
    /// ENFILE when there are [`NODES_MAX`] nodes.
    pub fn enter(&mut self, share: u64, parent: u64, name: &CStr, found: &Attributes) -> Result<u64, Errno> {
        let identity = found.identity();
        if let Some(id) = self.find(share, identity)
            && self.table.get(&id).is_some_and(|node| node.kind == found.kind() && node.made == made(found))
            && self.moved(id, parent, name)
        {
            if let Some(node) = self.table.get_mut(&id) {
                node.lookups = node.lookups.saturating_add(1);
            }
            return Ok(id);
        }
        if self.table.len() >= NODES_MAX {
            return Err(Errno::NFILE);
        }
        let id = self.next;
        self.next += 1;
        let mut file_system = FileSystem::Local;
        if let Some(parent) = self.table.get_mut(&parent) {
            parent.children += 1;
            file_system = parent.file_system;
        }
        let node = Node {
            share,
            parent,
            name: name.into(),
            identity,
            kind: found.kind(),
            content: None,
            made: made(found),
            file_system,
            slot: None,
            lookups: 1,
            children: 0,
        };
        self.table.insert(id, node);
        self.put_in_index(id, share, identity);
        Ok(id)
    }

    /// An older node of the same identity stays without being found: its inode number was used again, or it was moved to where a
    /// node of that id would be its own ancestor.
    fn put_in_index(&mut self, id: u64, share: u64, identity: Identity) {
        let (nodes, hasher) = (&self.table, &self.hasher);
        let hash_of = |id: &u64| nodes.get(id).map_or(0, |node| hasher.hash_one((node.share, node.identity)));
        let same = |other: &u64| {
            nodes.get(other).is_some_and(|node| node.share == share && node.identity == identity)
        };
        match self.index.entry(hasher.hash_one((share, identity)), same, hash_of) {
            Entry::Occupied(mut entry) => *entry.get_mut() = id,
            Entry::Vacant(entry) => drop(entry.insert(id)),
        }
    }

    /// A node is found in `parent` under a name now. False when it cannot be, by what is known: it is a directory above `parent`.
    pub fn moved(&mut self, id: u64, parent: u64, name: &CStr) -> bool {
        let Some(node) = self.table.get(&id) else { return false };
        let (old, slot) = (node.parent, node.slot);
        // What is shared itself stays where it is, wherever else it is mounted.
        if old == ROOT || parent == ROOT {
            return old == parent;
        }
        if old != parent || *node.name != *name {
            if node.kind == FileType::Directory && self.is_below(parent, id) {
                return false;
            }
            if let Some(parent) = self.table.get_mut(&parent) {
                parent.children += 1;
            }
            if let Some(node) = self.table.get_mut(&id) {
                node.parent = parent;
                if *node.name != *name {
                    node.name = name.into();
                }
            }
            self.release(old);
        }
        if let Some(slot) = slot {
            self.descriptors.unpin(slot);
        }
        true
    }

    fn is_below(&self, id: u64, ancestor: u64) -> bool {
        let mut at = id;
        for _ in 0..DEPTH_MAX {
            if at == ancestor {
                return true;
            }
            match self.table.get(&at) {
                Some(node) => at = node.parent,
                None => return false,
            }
        }
        true
    }

    /// The guest forgets so many of its lookups.
    pub fn forget(&mut self, id: u64, lookups: u64) {
        if let Some(node) = self.table.get_mut(&id) {
            node.lookups = node.lookups.saturating_sub(lookups);
            self.remove_unused(id);
        }
    }

    /// A node has one child less.
    fn release(&mut self, id: u64) {
        if let Some(node) = self.table.get_mut(&id) {
            node.children = node.children.saturating_sub(1);
            self.remove_unused(id);
        }
    }

    /// Removes a node that nothing keeps, and the parents that only it kept.
    fn remove_unused(&mut self, mut id: u64) {
        while let Some(node) = self.table.get(&id)
            && node.lookups == 0
            && node.children == 0
        {
            let hash = self.hasher.hash_one((node.share, node.identity));
            if let Ok(entry) = self.index.find_entry(hash, |other| *other == id) {
                entry.remove();
            }
            let Some(node) = self.table.remove(&id) else { return };
            if let Some(slot) = node.slot {
                self.descriptors.remove(slot);
            }
            id = node.parent;
            if let Some(parent) = self.table.get_mut(&id) {
                parent.children = parent.children.saturating_sub(1);
            }
        }
    }

    /// Closes the descriptors of a share that is gone. Its nodes stay until the guest forgets them.
    pub fn close_share(&mut self, share: u64) {
        for node in self.table.values_mut().filter(|node| node.share == share) {
            if let Some(slot) = node.slot.take() {
                self.descriptors.remove(slot);
            }
        }
    }

    /// The guest forgets everything.
    pub fn clear(&mut self) {
        for slot in self.table.drain().filter_map(|(_, node)| node.slot) {
            self.descriptors.remove(slot);
        }
        self.table = HashMap::new();
        self.index = HashTable::new();
    }
}

/// See [`Node::made`].
fn made(found: &Attributes) -> Option<Duration> {
    (found.kind() == FileType::Symlink).then(|| found.modified())
}

#[cfg(test)]
mod tests;
