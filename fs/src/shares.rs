//! What is shared: the entries of the root directory.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::limits::is_valid_id;
use rustix::fs::FileType;
use rustix::io::Errno;

use crate::attributes::Attributes;
use crate::control::ShareKind;
use crate::host::FileSystem;
use crate::wire::{FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE};

/// A directory or a file of the host under a name in the root directory.
#[derive(Debug)]
pub struct Share {
    /// Its name.
    pub name: Box<str>,
    /// Who changes it.
    pub kind: ShareKind,
    /// Refuses changes.
    pub read_only: bool,
    /// What it is on.
    pub file_system: FileSystem,
    /// What is shared.
    pub root: Arc<OwnedFd>,
}

/// Why a share is not added or removed.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// It would be no file name, or be too long.
    #[error("{0:?} is no name for a share")]
    Name(String),
    /// Names are used once.
    #[error("there is a share {0:?} already")]
    Exists(String),
    /// Nothing to remove.
    #[error("there is no share {0:?}")]
    Missing(String),
    /// The bound is a part of `--nofile`.
    #[error("there are {0} shares already: no room for more")]
    TooMany(usize),
    /// A device, for example.
    #[error("only directories, regular files, sockets and fifos can be shared, not a {0:?}")]
    Type(FileType),
    /// The message has no such descriptor.
    #[error("the descriptor of the share is missing")]
    NoDescriptor,
    /// The descriptor is no good.
    #[error("cannot look at what is to be shared")]
    Look(#[source] Errno),
}

/// All of them, by ids that are never used twice.
#[derive(Debug)]
pub struct Shares {
    table: BTreeMap<u64, Share>,
    next: u64,
    max: usize,
}

impl Shares {
    /// None, but there may be so many.
    pub fn new(max: usize) -> Self {
        Self { table: BTreeMap::new(), next: 1, max }
    }

    /// Adds one.
    ///
    /// # Errors
    /// [`ShareError`]
    pub fn add(
        &mut self,
        name: &str,
        root: OwnedFd,
        kind: ShareKind,
        read_only: bool,
    ) -> Result<(), ShareError> {
        if !is_valid_id(name) {
            return Err(ShareError::Name(name.to_owned()));
        }
        if self.by_name(name.as_bytes()).is_some() {
            return Err(ShareError::Exists(name.to_owned()));
        }
        if self.table.len() >= self.max {
            return Err(ShareError::TooMany(self.max));
        }
        let attributes = Attributes::of(&root).map_err(ShareError::Look)?;
        match attributes.kind() {
            FileType::Directory | FileType::RegularFile | FileType::Socket | FileType::Fifo => {}
            other => return Err(ShareError::Type(other)),
        }
        let file_system = FileSystem::of(&root).map_err(ShareError::Look)?;
        let share = Share { name: name.into(), kind, read_only, file_system, root: Arc::new(root) };
        self.table.insert(self.next, share);
        self.next += 1;
        Ok(())
    }

    /// Has one refuse changes from now on.
    ///
    /// # Errors
    /// [`ShareError::Missing`]
    pub fn protect(&mut self, name: &str) -> Result<(), ShareError> {
        let share = self.table.values_mut().find(|share| &*share.name == name);
        share.ok_or_else(|| ShareError::Missing(name.to_owned()))?.read_only = true;
        Ok(())
    }

    /// Removes one and gives its id.
    ///
    /// # Errors
    /// [`ShareError::Missing`]
    pub fn remove(&mut self, name: &str) -> Result<u64, ShareError> {
        let id = self.by_name(name.as_bytes()).ok_or_else(|| ShareError::Missing(name.to_owned()))?;
        self.table.remove(&id);
        Ok(id)
    }

    /// The id of a name.
    pub fn by_name(&self, name: &[u8]) -> Option<u64> {
        self.table.iter().find(|(_, share)| share.name.as_bytes() == name).map(|(id, _)| *id)
    }

    /// A share.
    ///
    /// # Errors
    /// ESTALE when it is gone.
    pub fn get(&self, id: u64) -> Result<&Share, Errno> {
        self.table.get(&id).ok_or(Errno::STALE)
    }

    /// The first one with an id above this.
    pub fn after(&self, id: u64) -> Option<(u64, &Share)> {
        self.table.range(id.checked_add(1)?..).next().map(|(id, share)| (*id, share))
    }
}

/// What the guest may remember of a share.
impl ShareKind {
    /// For how long what it has read of names and attributes.
    pub fn timeout(self) -> Duration {
        match self {
            Self::Root => Duration::from_hours(1),
            Self::Bind => Duration::from_secs(1),
        }
    }

    /// For how long that a name is not there. Nothing must come up late that another has made: not even in a root, into which
    /// `docker cp` puts files while it is a guest's.
    pub fn negative_timeout(self) -> Option<Duration> {
        match self {
            Self::Root => Some(Duration::from_secs(1)),
            Self::Bind => None,
        }
    }

    /// Flags of the reply to OPENDIR.
    pub fn open_directory_flags(self) -> u32 {
        match self {
            Self::Root => FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE,
            Self::Bind => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(shares: &mut Shares, name: &str, path: &str) -> Result<(), ShareError> {
        shares.add(name, std::fs::File::open(path).unwrap().into(), ShareKind::Bind, true)
    }

    #[test]
    fn names_are_used_once_and_ids_never_again() {
        let mut shares = Shares::new(8);
        add(&mut shares, "a", "/").unwrap();
        assert!(matches!(add(&mut shares, "a", "/"), Err(ShareError::Exists(_))));
        let old = shares.remove("a").unwrap();
        assert!(matches!(shares.remove("a"), Err(ShareError::Missing(_))));
        assert_eq!(shares.get(old).err(), Some(Errno::STALE));
        add(&mut shares, "a", "/").unwrap();
        assert_ne!(shares.by_name(b"a"), Some(old));
    }

    #[test]
    fn what_is_no_name_or_no_file_is_refused() {
        let mut shares = Shares::new(1);
        for name in ["", ".", "..", "a/b", "/"] {
            assert!(matches!(add(&mut shares, name, "/"), Err(ShareError::Name(_))), "{name:?}");
        }
        assert!(matches!(add(&mut shares, "a", "/dev/null"), Err(ShareError::Type(_))));
        add(&mut shares, "a", "/").unwrap();
        assert!(matches!(add(&mut shares, "b", "/"), Err(ShareError::TooMany(1))));
    }

    #[test]
    fn shares_are_walked_in_order_of_age() {
        let mut shares = Shares::new(8);
        for name in ["c", "a", "b"] {
            add(&mut shares, name, "/").unwrap();
        }
        shares.remove("a").unwrap();
        let (first, share) = shares.after(0).unwrap();
        assert_eq!(&*share.name, "c");
        let (second, share) = shares.after(first).unwrap();
        assert_eq!(&*share.name, "b");
        assert!(shares.after(second).is_none() && shares.after(u64::MAX).is_none());
    }
}
