//! Bytes of files, moved straight into and out of guest memory.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;
use vm_memory::volatile_memory::Error as VolatileMemoryError;

/// Where bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Into guest memory.
    Read,
    /// Into guest memory, with flags of preadv2(2).
    ReadAtOnce(libc::c_int),
    /// Out of guest memory.
    Write,
}

/// Moves bytes between a file and guest memory until all have moved or the file takes or gives no more. What has moved is gone from the
/// front of `rest`.
///
/// # Errors
/// Those of the file. What moved before is gone from `rest` all the same.
pub fn transfer(
    file: &File,
    mut offset: u64,
    rest: &mut VecDeque<VolatileSlice<'_>>,
    direction: Direction,
) -> io::Result<()> {
    while !rest.is_empty() {
        let guards: Vec<_> = rest.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let iovecs: Vec<libc::iovec> = guards
            .iter()
            .map(|guard| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() })
            .collect();
        let count = libc::c_int::try_from(iovecs.len()).map_err(io::Error::other)?;
        let at = i64::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: each vector is valid for its length while its guard lives; the guest may change the bytes or see them
        // change, as it may with any device.
        let moved = unsafe {
            match direction {
                Direction::Read => libc::preadv64(file.as_raw_fd(), iovecs.as_ptr(), count, at),
                Direction::ReadAtOnce(flags) => {
                    libc::preadv2(file.as_raw_fd(), iovecs.as_ptr(), count, at, flags)
                }
                Direction::Write => libc::pwritev64(file.as_raw_fd(), iovecs.as_ptr(), count, at),
            }
        };
        match u64::try_from(moved) {
            Ok(0) => return Ok(()),
            Ok(moved) => {
                offset += moved;
                take_front(rest, moved).map_err(io::Error::other)?;
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Takes at most `length` bytes off the front.
///
/// # Errors
/// None: a slice is cut inside of itself.
pub fn take_front<'a>(
    rest: &mut VecDeque<VolatileSlice<'a>>,
    length: u64,
) -> Result<Vec<VolatileSlice<'a>>, VolatileMemoryError> {
    let mut left = usize::try_from(length).unwrap_or(usize::MAX);
    let mut taken = Vec::with_capacity(rest.len());
    while left > 0 {
        let Some(slice) = rest.pop_front() else { break };
        if slice.len() <= left {
            left -= slice.len();
            taken.push(slice);
        } else {
            let (now, later) = slice.split_at(left)?;
            taken.push(now);
            rest.push_front(later);
            left = 0;
        }
    }
    Ok(taken)
}
