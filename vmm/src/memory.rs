//! Guest memory: private mappings, below and above the gap that holds device registers.

use std::fs::File;
use std::sync::Arc;

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::arch::layout::{MMIO_GAP_END, MMIO_GAP_START};

/// The memory of one guest.
pub type Memory = GuestMemoryMmap<()>;

/// Least guest memory, in MiB: below it the kernel does not reach its init.
pub const MEMORY_MIN_MIB: u32 = 64;
/// Most guest memory, in MiB: 512 GiB, so that it ends below the window left for PCI.
pub const MEMORY_MAX_MIB: u32 = 512 << 10;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size out of bounds.
    #[error("guest memory of {0} MiB: give {MEMORY_MIN_MIB} to {MEMORY_MAX_MIB} MiB")]
    Size(u32),
    /// The host refused the mapping.
    #[error("cannot map {0} MiB of guest memory")]
    Map(u32, #[source] vm_memory::mmap::MmapRegionError),
    /// The regions do not fit together.
    #[error("cannot arrange guest memory")]
    Arrange(#[source] vm_memory::GuestRegionCollectionError),
}

/// The regions of a guest with so much memory: start and length in bytes.
///
/// # Errors
/// [`MemoryError::Size`] when the size is out of bounds.
pub fn regions(mib: u32) -> Result<Vec<(GuestAddress, u64)>, MemoryError> {
    if !(MEMORY_MIN_MIB..=MEMORY_MAX_MIB).contains(&mib) {
        return Err(MemoryError::Size(mib));
    }
    let total = u64::from(mib) << 20;
    let low = total.min(MMIO_GAP_START);
    let mut regions = vec![(GuestAddress(0), low)];
    if total > low {
        regions.push((GuestAddress(MMIO_GAP_END), total - low));
    }
    Ok(regions)
}

/// Anonymous memory, zero, not yet taken from the host.
///
/// # Errors
/// [`MemoryError`] when the size is out of bounds or the host refuses.
pub fn anonymous(mib: u32) -> Result<Memory, MemoryError> {
    build(mib, None)
}

/// A private view of saved memory, which starts at `offset` in `file`, region after region. What the guest writes stays its own.
///
/// # Errors
/// As [`anonymous`].
pub fn from_file(mib: u32, file: &Arc<File>, offset: u64) -> Result<Memory, MemoryError> {
    build(mib, Some((file, offset)))
}

fn build(mib: u32, source: Option<(&Arc<File>, u64)>) -> Result<Memory, MemoryError> {
    let mut next = source.map_or(0, |(_, offset)| offset);
    let mut built = Vec::new();
    for (start, length) in regions(mib)? {
        let size = usize::try_from(length).map_err(|_| MemoryError::Size(mib))?;
        let file = source.map(|(file, _)| FileOffset::from_arc(Arc::clone(file), next));
        let mut flags = libc::MAP_NORESERVE | libc::MAP_PRIVATE;
        if file.is_none() {
            flags |= libc::MAP_ANONYMOUS;
        }
        let mapping = MmapRegion::build(file, size, libc::PROT_READ | libc::PROT_WRITE, flags)
            .map_err(|source| MemoryError::Map(mib, source))?;
        next += length;
        built.push(GuestRegionMmap::new(mapping, start).ok_or(MemoryError::Size(mib))?);
    }
    Memory::from_regions(built).map_err(MemoryError::Arrange)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    #[test]
    fn memory_goes_around_the_device_registers() {
        assert_eq!(regions(1024).unwrap(), [(GuestAddress(0), 1 << 30)]);
        let split = regions(4096).unwrap();
        assert_eq!(
            split,
            [(GuestAddress(0), MMIO_GAP_START), (GuestAddress(1 << 32), (4 << 30) - MMIO_GAP_START)]
        );
        assert!(matches!(regions(MEMORY_MIN_MIB - 1), Err(MemoryError::Size(63))));
        assert!(regions(u32::MAX).is_err());
    }

    #[test]
    fn what_a_guest_writes_does_not_reach_the_file_it_came_from() {
        let file = tempfile::tempfile().unwrap();
        file.set_len((64 << 20) + 4096).unwrap();
        let file = Arc::new(file);
        let first = from_file(64, &file, 4096).unwrap();
        first.write_obj(0xabcd_u32, GuestAddress(0x1000)).unwrap();
        let second = from_file(64, &file, 4096).unwrap();
        assert_eq!(second.read_obj::<u32>(GuestAddress(0x1000)).unwrap(), 0);
        assert_eq!(GuestMemoryBackend::last_addr(&second), GuestAddress((64 << 20) - 1));
    }
}
