//! Descriptors that tokio watches.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has tokio watch a descriptor for as long as the result lives.
///
/// # Errors
/// When there is nothing to watch, as with a regular file (`EPERM`), or no room for more.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    watch_owner(fd, interest)
}

/// The same for a type around one `OwnedFd`.
pub(crate) fn watch_owner<T: AsRawFd + Into<OwnedFd>>(
    owner: T,
    interest: Interest,
) -> io::Result<AsyncFd<T>> {
    // SAFETY: `owner` moves into the result and owns its descriptor, of which `as_raw_fd` gives the number: the
    // descriptor stays open and stays the same as long as it is watched.
    unsafe { AsyncFd::register_with_interest(owner, interest) }.map_err(|error| error.into_parts().1)
}
