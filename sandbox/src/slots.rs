//! The slots of a machine: which hold what every machine has, and which are free for disks.

use bulkhead_vmm::arch::layout::SLOTS;

/// The guest's image.
pub const GUEST_IMAGE: u8 = 0;
/// Connections to the guest.
pub const VSOCK: u8 = 1;
/// Random bytes.
pub const RNG: u8 = 2;
/// The guest's console.
pub const CONSOLE: u8 = 3;
/// Gives freed memory back.
pub const BALLOON: u8 = 4;
/// Files and directories of the host, in machines that share any.
pub const FS: u8 = 5;
/// The first that may hold a disk.
const FIRST_DISK: u8 = 6;

/// Hands out the slots that disks may have.
#[derive(Debug)]
pub struct Slots {
    taken: [bool; SLOTS as usize],
}

/// No slot is free.
#[derive(Debug, thiserror::Error)]
#[error("a virtual machine has room for {} disks, and all are in use", SLOTS - FIRST_DISK)]
pub struct NoSlot;

impl Default for Slots {
    fn default() -> Self {
        Self { taken: std::array::from_fn(|slot| slot < usize::from(FIRST_DISK)) }
    }
}

impl Slots {
    /// Takes a free slot.
    ///
    /// # Errors
    /// [`NoSlot`].
    pub fn take(&mut self) -> Result<u8, NoSlot> {
        let free = self.taken.iter().position(|taken| !taken).ok_or(NoSlot)?;
        self.taken[free] = true;
        u8::try_from(free).map_err(|_| NoSlot)
    }

    /// Gives a slot back.
    pub fn give_back(&mut self, slot: u8) {
        if let (Some(taken), FIRST_DISK..) = (self.taken.get_mut(usize::from(slot)), slot) {
            *taken = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_get_every_slot_but_the_fixed_ones_once() {
        let mut slots = Slots::default();
        let taken: Vec<u8> = std::iter::from_fn(|| slots.take().ok()).collect();
        assert_eq!(taken, (FIRST_DISK..SLOTS).collect::<Vec<_>>());
        slots.give_back(VSOCK);
        assert!(slots.take().is_err());
        slots.give_back(9);
        assert_eq!(slots.take().unwrap(), 9);
    }
}
