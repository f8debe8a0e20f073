//! The register pages of all slots, in memory that the guest reads without leaving guest mode.
//!
//! KVM maps these pages into the guest as a read-only memory slot: reads cost nothing, writes exit. So whatever a write
//! changes must be stored here before the vCPU runs on, and nothing has to be answered for a read.

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::arch::layout::{SLOT_SIZE, SLOTS};

#[allow(clippy::cast_possible_truncation)] // a page
const PAGE: usize = SLOT_SIZE as usize;
const LENGTH: usize = PAGE * SLOTS as usize;

/// The pages of all slots.
#[derive(Debug)]
pub struct RegisterPages {
    base: NonNull<libc::c_void>,
}

// SAFETY: the mapping belongs to the process, and all access through `&self` is atomic.
unsafe impl Send for RegisterPages {}
// SAFETY: as above.
unsafe impl Sync for RegisterPages {}

impl RegisterPages {
    /// Pages of zeros.
    ///
    /// # Errors
    /// When the host refuses the mapping.
    pub fn new() -> Result<Self, nix::Error> {
        let length = NonZeroUsize::new(LENGTH).expect("not zero");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private mapping at an address of the kernel's choice; only `self` refers to it.
        let base = unsafe { mmap_anonymous(None, length, protection, MapFlags::MAP_PRIVATE)? };
        Ok(Self { base })
    }

    /// Where the host has the pages: address and length in bytes.
    pub fn host_range(&self) -> (u64, u64) {
        (self.base.as_ptr() as u64, LENGTH as u64)
    }
}

impl Drop for RegisterPages {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `new`, and nothing refers to it any more.
        let _ = unsafe { munmap(self.base, LENGTH) };
    }
}

/// The page of one slot.
#[derive(Clone, Debug)]
pub struct SlotRegisters {
    pages: Arc<RegisterPages>,
    slot: u8,
}

impl SlotRegisters {
    /// The page of `slot`, which must be below [`SLOTS`].
    pub fn new(pages: Arc<RegisterPages>, slot: u8) -> Self {
        assert!(slot < SLOTS);
        Self { pages, slot }
    }

    /// The 32-bit register at a byte offset.
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4) && offset < PAGE);
        // SAFETY: the offset is aligned and inside this slot's page, which lives as long as `self.pages`; all access to it,
        // the guest's included, is by whole aligned words or by bytes of the configuration space.
        unsafe { &*self.pages.base.as_ptr().cast::<u8>().add(usize::from(self.slot) * PAGE + offset).cast() }
    }

    /// Stores a 32-bit register.
    pub fn set(&self, offset: usize, value: u32) {
        self.word(offset).store(value.to_le(), Ordering::SeqCst);
    }

    /// Stores bytes, such as those of the configuration space. What does not fit into the page is left out.
    pub fn set_bytes(&self, offset: usize, bytes: &[u8]) {
        for (at, byte) in (offset..PAGE).zip(bytes) {
            // SAFETY: `at` is inside this slot's page.
            let cell: &AtomicU8 = unsafe {
                &*self.pages.base.as_ptr().cast::<u8>().add(usize::from(self.slot) * PAGE + at).cast()
            };
            cell.store(*byte, Ordering::SeqCst);
        }
    }

    /// Makes the whole page zero.
    pub fn clear(&self) {
        for offset in (0..PAGE).step_by(4) {
            self.set(offset, 0);
        }
    }
}
