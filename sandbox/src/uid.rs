//! A uid of its own for every VMM, so that a VMM that has been taken over cannot reach another.
//!
//! One lock file stands for the whole range, byte n of it for the n-th uid. The locks belong to the open file
//! (`F_OFD_SETLK`), and the VMM inherits that file: a uid is free again when the last process that used it is gone, however
//! it ended, and not before.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::config::Uids;

// libc gives these as int, the struct takes short.
const WRITE_LOCK: libc::c_short = 1;
const FROM_START: libc::c_short = 0;
const _: () = assert!(WRITE_LOCK as i32 == libc::F_WRLCK && FROM_START as i32 == libc::SEEK_SET);

/// A uid that nobody else has while this or a duplicate of its file is open.
#[derive(Debug)]
pub struct UidLease {
    uid: u32,
    file: File,
}

/// Why there is no uid.
#[derive(Debug, thiserror::Error)]
pub enum UidError {
    /// The lock file cannot be used.
    #[error("cannot lock a uid in {0}")]
    Lock(PathBuf, #[source] io::Error),
    /// All are taken.
    #[error("all {0} uids for VMMs are in use: end some sandboxes or raise uids.count in the configuration")]
    NoneFree(u32),
}

impl UidLease {
    /// Takes a uid that is free. `lock_file` is made if need be.
    ///
    /// # Errors
    /// [`UidError`] when the file cannot be used or all uids are taken.
    pub fn take(uids: Uids, lock_file: &Path) -> Result<Self, UidError> {
        let failed = |e| UidError::Lock(lock_file.to_owned(), e);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(lock_file);
        let file = file.map_err(failed)?;
        // Callers that come at the same time start at different places.
        let start = std::process::id() % uids.count;
        for n in (start..uids.count).chain(0..start) {
            let (l_type, l_whence) = (WRITE_LOCK, FROM_START);
            let lock = libc::flock { l_type, l_whence, l_start: libc::off_t::from(n), l_len: 1, l_pid: 0 };
            match fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)) {
                Ok(_) => return Ok(Self { uid: uids.first + n, file }),
                Err(Errno::EAGAIN | Errno::EACCES) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
        }
        Err(UidError::NoneFree(uids.count))
    }

    /// The uid, and the gid.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The file whose being open keeps the uid.
    pub fn file(&self) -> &File {
        &self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_lease_has_its_own_uid_until_the_last_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let lock = dir.path().join("uids");
        let uids = Uids { first: 70_000, count: 3 };
        let leases: Vec<UidLease> = (0..3).map(|_| UidLease::take(uids, &lock).unwrap()).collect();
        let mut taken: Vec<u32> = leases.iter().map(UidLease::uid).collect();
        taken.sort_unstable();
        assert_eq!(taken, [70_000, 70_001, 70_002]);
        assert!(matches!(UidLease::take(uids, &lock), Err(UidError::NoneFree(3))));
    }

    #[test]
    fn a_duplicate_keeps_the_uid_until_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let lock = dir.path().join("uids");
        let uids = Uids { first: 70_000, count: 1 };
        let lease = UidLease::take(uids, &lock).unwrap();
        let inherited = lease.file().try_clone().unwrap();
        drop(lease);
        assert!(UidLease::take(uids, &lock).is_err());
        drop(inherited);
        assert_eq!(UidLease::take(uids, &lock).unwrap().uid(), 70_000);
    }
}
