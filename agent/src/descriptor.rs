//! Descriptors that the runtime watches.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A descriptor that the runtime watches; it closes with this.
pub(crate) type Descriptor = AsyncFd<OwnedFd>;

/// Has the runtime watch a descriptor.
///
/// # Errors
/// When the kernel cannot poll it.
pub(crate) fn watch(fd: OwnedFd) -> io::Result<Descriptor> {
    // SAFETY: an OwnedFd is the same open descriptor for as long as it exists.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

/// The same for a file that tells of changes by `POLLPRI`, as those of cgroups do.
///
/// # Errors
/// When the kernel cannot poll it.
pub(crate) fn watch_changes(fd: OwnedFd) -> io::Result<Descriptor> {
    // SAFETY: an OwnedFd is the same open descriptor for as long as it exists.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::PRIORITY) }?)
}

/// The same for one that is to be read and written, which becomes non-blocking. Only this side of it does: the other end
/// of a pipe or a terminal is another open file.
///
/// # Errors
/// When the kernel cannot poll it.
pub(crate) fn nonblocking(fd: OwnedFd) -> io::Result<Descriptor> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    watch(fd)
}
