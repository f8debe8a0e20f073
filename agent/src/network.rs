//! The loopback device, which every network namespace has and none has up by itself.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// `libc` has it as an `int`, the flags of an interface are a `short`.
const IFF_UP: libc::c_short = 1;

/// Sets `IFF_UP` on `lo`; the kernel then gives it 127.0.0.1 and ::1 by itself.
///
/// # Errors
/// What the kernel said.
pub(crate) fn loopback_up() -> io::Result<()> {
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: all-zero bytes are a valid ifreq, a struct of integers and a union of such.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = IFF_UP;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which `request` is.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The same in the network namespace of process `pid`, where the calling thread stays.
///
/// # Errors
/// As [`loopback_up`], or when the namespace cannot be entered.
pub(crate) fn loopback_up_of(pid: i32) -> io::Result<()> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    loopback_up()
}
