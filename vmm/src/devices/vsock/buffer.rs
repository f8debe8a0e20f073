//! The guest memory of one descriptor chain, whatever pieces it is in.

use std::io;

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, Permissions, VolatileSlice};

use super::packet::{HEADER_SIZE, Header};
use crate::memory::Memory;
use crate::virtio::device::DeviceError;

/// Most descriptors of one chain. It may have as many as its queue has entries (2.7.5.3.1), but an indirect table could claim 65,535;
/// Linux uses up to 18.
const DESCRIPTORS_MAX: usize = 256;

/// One packet's place in guest memory.
#[derive(Debug)]
pub(super) struct Buffer<'m> {
    head: u16,
    pieces: Vec<VolatileSlice<'m>>,
    length: usize,
}

impl<'m> Buffer<'m> {
    /// What the driver sends with this chain.
    pub(super) fn readable(
        memory: &'m Memory,
        chain: DescriptorChain<&'m Memory>,
    ) -> Result<Self, DeviceError> {
        Self::new(memory, chain, false)
    }

    /// What the driver lets the device write with this chain.
    pub(super) fn writable(
        memory: &'m Memory,
        chain: DescriptorChain<&'m Memory>,
    ) -> Result<Self, DeviceError> {
        Self::new(memory, chain, true)
    }

    fn new(
        memory: &'m Memory,
        chain: DescriptorChain<&'m Memory>,
        writable: bool,
    ) -> Result<Self, DeviceError> {
        let mut buffer = Self { head: chain.head_index(), pieces: Vec::new(), length: 0 };
        let access = if writable { Permissions::Write } else { Permissions::Read };
        for (count, descriptor) in chain.enumerate() {
            if count == DESCRIPTORS_MAX {
                return Err(DeviceError::Driver("a vsock packet in more pieces than its queue has entries"));
            }
            if descriptor.is_write_only() != writable {
                continue;
            }
            for piece in memory.get_slices(descriptor.addr(), descriptor.len() as usize, access)? {
                let piece = piece?;
                // No overflow: the iterator ends a chain before its lengths exceed 32 bits.
                buffer.length += piece.len();
                buffer.pieces.push(piece);
            }
        }
        // Reading data into no room would look like the end of the data.
        let least = if writable { HEADER_SIZE + 1 } else { HEADER_SIZE };
        if buffer.length < least {
            return Err(DeviceError::Driver("a vsock buffer that cannot hold a packet"));
        }
        Ok(buffer)
    }

    /// The index by which the driver knows the chain.
    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that fit behind the header.
    pub(super) fn room(&self) -> usize {
        self.length - HEADER_SIZE
    }

    /// The header, read once: the driver may change it while we work.
    pub(super) fn header(&self) -> Header {
        let mut bytes = [0; HEADER_SIZE];
        let mut at = 0;
        for piece in &self.pieces {
            at += piece.copy_to(&mut bytes[at..]);
        }
        Header::from_bytes(&bytes)
    }

    /// Writes the header.
    pub(super) fn set_header(&self, header: Header) {
        let bytes = header.to_bytes();
        let mut at = 0;
        for piece in &self.pieces {
            let part = piece.len().min(HEADER_SIZE - at);
            piece.copy_from(&bytes[at..at + part]);
            at += part;
        }
    }

    /// Those parts of the pieces that hold `length` bytes of data from `offset` on, as far as there are any.
    pub(super) fn data(&self, offset: usize, length: usize) -> impl Iterator<Item = VolatileSlice<'m>> + '_ {
        let mut skip = HEADER_SIZE + offset;
        let mut left = length;
        self.pieces.iter().filter_map(move |piece| {
            let skipped = skip.min(piece.len());
            skip -= skipped;
            let part = left.min(piece.len() - skipped);
            left -= part;
            if part == 0 { None } else { piece.subslice(skipped, part).ok() }
        })
    }
}

/// Sends guest memory with one system call. Returns how many bytes the socket took.
///
/// # Errors
/// Those of `sendmsg`; `WouldBlock` when the socket takes nothing at the moment.
pub(super) fn send<'m>(
    socket: &impl std::os::fd::AsRawFd,
    parts: impl Iterator<Item = VolatileSlice<'m>>,
) -> io::Result<usize> {
    let mut vectors: Vec<libc::iovec> = parts.map(|part| vector(&part)).collect();
    let message = message(&mut vectors);
    // SAFETY: the vectors name guest memory, which stays mapped for 'm. The guest may change it meanwhile; the kernel copies bytes
    // without caring what they are.
    let sent = unsafe {
        libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives into guest memory with one system call. Returns how many bytes came; 0 is the end.
///
/// # Errors
/// Those of `recvmsg`; `WouldBlock` when there is nothing at the moment.
pub(super) fn receive<'m>(
    socket: &impl std::os::fd::AsRawFd,
    parts: impl Iterator<Item = VolatileSlice<'m>>,
) -> io::Result<usize> {
    let mut vectors: Vec<libc::iovec> = parts.map(|part| vector(&part)).collect();
    let mut message = message(&mut vectors);
    // SAFETY: the vectors name guest memory, which stays mapped for 'm and which the VMM never borrows as a Rust slice.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}

fn vector(part: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: part.ptr_guard_mut().as_ptr().cast(), iov_len: part.len() }
}

fn message(vectors: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: a msghdr of zeros is a valid one: no address, no data, no control messages.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    message.msg_iovlen = vectors.len();
    message
}
