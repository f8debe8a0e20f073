//! What the guest has open.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

/// Something open.
#[derive(Clone, Debug)]
pub enum Open {
    /// A regular file, which the VMM has as well.
    File(Arc<OwnedFd>),
    /// A directory, and the offset that the kernel has arrived at in it.
    Directory(Arc<OwnedFd>, u64),
    /// The root directory.
    Root,
}

#[derive(Debug)]
struct Handle {
    share: u64,
    open: Open,
}

/// All of it, by node and by ids that are never used twice.
#[derive(Debug)]
pub struct Handles {
    open: BTreeMap<(u64, u64), Handle>,
    next: u64,
    max: usize,
}

impl Handles {
    /// None, but there may be so many.
    pub fn new(max: usize) -> Self {
        Self { open: BTreeMap::new(), next: 1, max }
    }

    /// Asked before something is opened.
    ///
    /// # Errors
    /// EMFILE when there is no room.
    pub fn check_room(&self) -> Result<(), Errno> {
        if self.open.len() < self.max { Ok(()) } else { Err(Errno::MFILE) }
    }

    /// Takes what has been opened of a node. The share is 0 if it is of none.
    pub fn insert(&mut self, node: u64, share: u64, open: Open) -> u64 {
        let id = self.next;
        self.next += 1;
        self.open.insert((node, id), Handle { share, open });
        id
    }

    /// What is open, if it is this node.
    ///
    /// # Errors
    /// EBADF otherwise.
    pub fn get(&self, id: u64, node: u64) -> Result<&Open, Errno> {
        self.open.get(&(node, id)).map(|handle| &handle.open).ok_or(Errno::BADF)
    }

    /// An open regular file.
    ///
    /// # Errors
    /// EBADF when it is none, or is not this node.
    pub fn file(&self, id: u64, node: u64) -> Result<Arc<OwnedFd>, Errno> {
        match self.get(id, node)? {
            Open::File(file) => Ok(Arc::clone(file)),
            Open::Directory(..) | Open::Root => Err(Errno::BADF),
        }
    }

    /// A node's file or directory, if it is open at all: what it is of, whatever has become of its name.
    pub fn of(&self, node: u64) -> Option<Arc<OwnedFd>> {
        let (_, handle) = self.open.range((node, 0)..=(node, u64::MAX)).next()?;
        match &handle.open {
            Open::File(open) | Open::Directory(open, _) => Some(Arc::clone(open)),
            Open::Root => None,
        }
    }

    /// The kernel has arrived elsewhere in a directory.
    pub fn set_position(&mut self, id: u64, node: u64, to: u64) {
        if let Some(Handle { open: Open::Directory(_, position), .. }) = self.open.get_mut(&(node, id)) {
            *position = to;
        }
    }

    /// Closes something.
    pub fn remove(&mut self, id: u64, node: u64) {
        self.open.remove(&(node, id));
    }

    /// Closes what is open of a share.
    pub fn close_share(&mut self, share: u64) {
        self.open.retain(|_, handle| handle.share != share);
    }

    /// Closes everything.
    pub fn clear(&mut self) {
        self.open = BTreeMap::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> Open {
        Open::File(Arc::new(std::fs::File::open("/dev/null").unwrap().into()))
    }

    #[test]
    fn a_handle_is_good_for_its_node_and_type_only() {
        let mut handles = Handles::new(8);
        let (file, root) = (handles.insert(5, 1, file()), handles.insert(1, 0, Open::Root));
        assert!(handles.file(file, 5).is_ok());
        for (handle, node) in [(file, 6), (file + 9, 5), (root, 1), (0, 5)] {
            assert_eq!(handles.file(handle, node).err(), Some(Errno::BADF));
        }
    }

    #[test]
    fn a_node_is_found_open_until_its_last_handle_is_gone() {
        let mut handles = Handles::new(8);
        let (first, second) = (handles.insert(5, 1, file()), handles.insert(5, 2, file()));
        handles.insert(1, 0, Open::Root);
        handles.remove(first, 6);
        for node in [0, 1, 4, 6, u64::MAX] {
            assert!(handles.of(node).is_none(), "{node}");
        }
        assert!(handles.of(5).is_some());
        handles.remove(first, 5);
        assert!(handles.of(5).is_some());
        handles.close_share(2);
        assert!(handles.of(5).is_none() && handles.get(second, 5).is_err());
    }

    #[test]
    fn there_is_room_for_so_many_and_again_when_a_share_is_gone() {
        let mut handles = Handles::new(2);
        for share in [1, 2] {
            assert_eq!(handles.check_room(), Ok(()));
            handles.insert(5, share, file());
        }
        assert_eq!(handles.check_room(), Err(Errno::MFILE));
        handles.close_share(2);
        assert_eq!(handles.check_room(), Ok(()));
        assert!(handles.insert(5, 1, file()) > 2, "ids are not used again");
    }
}
