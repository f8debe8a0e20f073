//! A uid of its own for every VMM, so that a VMM that has been taken over cannot reach another.
//!
//! A file stands for each uid, and a shared `flock` on it for its being used: by the VMM's owner, and by the VMM itself, which
//! inherits an open file of its own. So a uid is free again when both are gone, however they ended. What a VMM can do with its
//! file concerns nobody's uid but its own, and cannot take its owner's lock away.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::config::Uids;

/// A uid that nobody else has while this or the VMM's file is open.
#[derive(Debug)]
pub struct UidLease {
    uid: u32,
    _owner: File,
    vmm: File,
}

/// Why there is no uid.
#[derive(Debug, thiserror::Error)]
pub enum UidError {
    /// A lock file cannot be used.
    #[error("cannot lock a uid in {0}")]
    Lock(PathBuf, #[source] io::Error),
    /// All are taken.
    #[error("all {0} uids for VMMs are in use: end some sandboxes or raise uids.count in the configuration")]
    NoneFree(u32),
}

impl UidLease {
    /// Takes the first uid that is free. `directory` holds the lock files and is made if need be.
    ///
    /// # Errors
    /// [`UidError`] when the files cannot be used or all uids are taken.
    pub fn take(uids: Uids, directory: &Path) -> Result<Self, UidError> {
        let failed = |e| UidError::Lock(directory.to_owned(), e);
        DirBuilder::new().mode(0o700).recursive(true).create(directory).map_err(failed)?;
        for n in 0..uids.count {
            let path = directory.join(n.to_string());
            let owner = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
            let owner = owner.map_err(failed)?;
            // Exclusive to see that nobody has it, then shared; in between, somebody else may have been faster.
            let free = lock(&owner, FlockOperation::NonBlockingLockExclusive).map_err(failed)?
                && lock(&owner, FlockOperation::NonBlockingLockShared).map_err(failed)?;
            if free {
                let vmm = File::open(&path).map_err(failed)?;
                if lock(&vmm, FlockOperation::NonBlockingLockShared).map_err(failed)? {
                    return Ok(Self { uid: uids.first + n, _owner: owner, vmm });
                }
            }
        }
        Err(UidError::NoneFree(uids.count))
    }

    /// The uid, and the gid.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The file for the VMM to inherit, open for reading.
    pub fn file(&self) -> &File {
        &self.vmm
    }
}

/// False when somebody else has a lock that does not go with this one.
fn lock(file: &File, operation: FlockOperation) -> io::Result<bool> {
    match flock(file, operation) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lease_has_its_own_uid_until_the_last_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let uids = Uids { first: 70_000, count: 3 };
        let leases: Vec<UidLease> = (0..3).map(|_| UidLease::take(uids, dir.path()).unwrap()).collect();
        let taken: Vec<u32> = leases.iter().map(UidLease::uid).collect();
        assert_eq!(taken, [70_000, 70_001, 70_002]);
        assert!(matches!(UidLease::take(uids, dir.path()), Err(UidError::NoneFree(3))));
        drop(leases);
        assert_eq!(UidLease::take(uids, dir.path()).unwrap().uid(), 70_000);
    }

    #[test]
    fn a_vmm_keeps_its_uid_beyond_its_owner_and_cannot_give_it_away_before() {
        let dir = tempfile::tempdir().unwrap();
        let uids = Uids { first: 70_000, count: 1 };
        let lease = UidLease::take(uids, dir.path()).unwrap();
        let inherited = lease.file().try_clone().unwrap();
        flock(&inherited, FlockOperation::Unlock).unwrap();
        assert!(UidLease::take(uids, dir.path()).is_err());
        flock(&inherited, FlockOperation::LockShared).unwrap();
        drop(lease);
        assert!(UidLease::take(uids, dir.path()).is_err());
        drop(inherited);
        assert_eq!(UidLease::take(uids, dir.path()).unwrap().uid(), 70_000);
    }
}
