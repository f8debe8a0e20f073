//! Where a request and the room for its answer are in guest memory.

use std::collections::VecDeque;

use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions, VolatileSlice};

use crate::memory::Memory;
use crate::virtio::device::DeviceError;
use crate::virtio::io::Chain;

/// Descriptors of one request. Linux uses no more than the queue has entries, in an indirect table.
const DESCRIPTORS_MAX: usize = 512;

/// Pieces of guest memory, one behind the other. All of them have been checked to be there; the list is kept from one request to the
/// next, so that a request costs no allocation.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    pieces: Vec<(GuestAddress, usize)>,
    bytes: usize,
}

impl Buffer {
    /// Takes over what a chain's descriptors say, first those for the device to read, then those for it to write.
    ///
    /// # Errors
    /// When they are too many, or name memory that is not there.
    pub(super) fn gather(
        memory: &Memory,
        chain: Chain<'_>,
        readable: &mut Self,
        writable: &mut Self,
    ) -> Result<(), DeviceError> {
        readable.clear();
        writable.clear();
        for (count, descriptor) in chain.enumerate() {
            if count >= DESCRIPTORS_MAX {
                return Err(DeviceError::Driver("a request of more descriptors than allowed"));
            }
            let (access, buffer) = if descriptor.is_write_only() {
                (Permissions::Write, &mut *writable)
            } else {
                (Permissions::Read, &mut *readable)
            };
            let (address, length) = (descriptor.addr(), descriptor.len() as usize);
            if !GuestMemory::check_range(memory, address, length, access) {
                return Err(DeviceError::Driver("a request outside of memory"));
            }
            match buffer.pieces.last_mut() {
                // Linux gives each page a descriptor, and a new guest's pages often lie side by side.
                Some((start, before)) if start.0 + *before as u64 == address.0 => *before += length,
                _ if length > 0 => buffer.pieces.push((address, length)),
                _ => {}
            }
            // A chain has less than 4 GiB: the iterator ends before it exceeds them.
            buffer.bytes += length;
        }
        Ok(())
    }

    /// Bytes of all pieces.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    fn clear(&mut self) {
        self.pieces.clear();
        self.bytes = 0;
    }

    /// The pieces of a range of bytes, as far as there are any.
    fn range(&self, from: usize, length: usize) -> impl Iterator<Item = (GuestAddress, usize)> {
        let (mut skip, mut left) = (from, length);
        self.pieces.iter().map_while(move |&(address, length)| {
            let skipped = skip.min(length);
            let taken = (length - skipped).min(left);
            let ended = left == 0;
            skip -= skipped;
            left -= taken;
            // No overflow: the piece is inside guest memory.
            (!ended).then(|| (GuestAddress(address.0 + skipped as u64), taken))
        })
    }

    /// Copies bytes out, from this place on. They must be there.
    ///
    /// # Errors
    /// None, since memory is there as long as the machine.
    pub(super) fn read(&self, memory: &Memory, from: usize, mut bytes: &mut [u8]) -> Result<(), DeviceError> {
        for (address, length) in self.range(from, bytes.len()) {
            let (now, later) = bytes.split_at_mut(length);
            memory.read_slice(now, address)?;
            bytes = later;
        }
        Ok(())
    }

    /// Copies bytes in, at the beginning. There must be room.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(super) fn write(&self, memory: &Memory, mut bytes: &[u8]) -> Result<(), DeviceError> {
        for (address, length) in self.range(0, bytes.len()) {
            let (now, later) = bytes.split_at(length);
            memory.write_slice(now, address)?;
            bytes = later;
        }
        Ok(())
    }

    /// A range of bytes as slices, as far as there are any.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(super) fn slices<'m>(
        &self,
        memory: &'m Memory,
        from: usize,
        length: usize,
    ) -> Result<VecDeque<VolatileSlice<'m>>, DeviceError> {
        let mut slices = VecDeque::with_capacity(self.pieces.len());
        for (address, length) in self.range(from, length) {
            for slice in GuestMemory::get_slices(memory, address, length, Permissions::ReadWrite)? {
                slices.push_back(slice?);
            }
        }
        Ok(slices)
    }
}
