//! Acting as somebody: what is created belongs to the process of the guest that asked for it.

use libc::{SYS_setfsgid, SYS_setfsuid, c_long};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::umask;

/// Whether the server may act as somebody else. Without privileges it acts as itself, under its own mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identities {
    /// Anybody, and its capabilities stay with it: `SECBIT_NO_SETUID_FIXUP`.
    Any,
    /// Its own only.
    Own,
}

/// Somebody else's identity, until it is dropped.
#[derive(Debug)]
pub struct Assumed(());

impl Identities {
    /// Acts as a user and a group from now on, and creates files under a mask.
    ///
    /// # Errors
    /// EINVAL when there can be no such user or group.
    pub fn assume(self, uid: u32, gid: u32, mask: u32) -> Result<Option<Assumed>, Errno> {
        if self == Self::Own {
            return Ok(None);
        }
        umask(Mode::from_raw_mode(mask & 0o777));
        if (uid, gid) == (0, 0) {
            return Ok(None);
        }
        // Made first, so that it undoes the half of it as well.
        let assumed = Assumed(());
        set(SYS_setfsgid, gid)?;
        set(SYS_setfsuid, uid)?;
        Ok(Some(assumed))
    }
}

impl Drop for Assumed {
    fn drop(&mut self) {
        let back = set(SYS_setfsuid, 0).and_then(|()| set(SYS_setfsgid, 0));
        // Root may always become root again. If it could not, everything from here on would be done as somebody wrong.
        assert_eq!(back, Ok(()), "the server cannot become itself again");
    }
}

/// These calls say who it was before, and never that they have failed. So the second one tells what came of the first.
fn set(call: c_long, id: u32) -> Result<(), Errno> {
    // SAFETY: takes an integer, touches no memory.
    unsafe { libc::syscall(call, id) };
    // SAFETY: as above. There is no such id, so nothing changes.
    let now = unsafe { libc::syscall(call, u32::MAX) };
    if now == c_long::from(id) { Ok(()) } else { Err(Errno::INVAL) }
}
