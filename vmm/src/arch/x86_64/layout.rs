//! Guest-physical addresses and interrupt lines.
//!
//! ```text
//! 0x0000_0500   GDT of the first vCPU's entry            0xd000_0000   22 virtio-mmio slots, 4 KiB each
//! 0x0000_6000   PVH start info                           0xfec0_0000   IOAPIC
//! 0x0000_7000   PVH memory map                           0xfee0_0000   local APICs
//! 0x0002_0000   command line                             0xfffb_c000   KVM's identity map and TSS (Intel)
//! 0x0009_fc00   MP table, to 640 KiB                     0x1_0000_0000 memory above 3.25 GiB
//! 0x0010_0000   memory; the kernel at 16 MiB
//! ```
//!
//! From [`PCI_WINDOW_START`] on, 64-bit addresses are left for PCI devices to come.

/// GDT for the PVH entry.
pub const GDT_START: u64 = 0x500;
/// `hvm_start_info` of the PVH boot protocol.
pub const PVH_INFO_START: u64 = 0x6000;
/// Its memory map.
pub const PVH_MEMMAP_START: u64 = 0x7000;
/// The kernel's command line.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Longest command line with its NUL, in bytes: `COMMAND_LINE_SIZE` of x86.
pub const CMDLINE_MAX: usize = 2048;
/// End of the memory below the BIOS area, where the MP table hides: the last KiB of 640 KiB.
pub const MPTABLE_START: u64 = 0x9_fc00;
/// Room for the MP table, in bytes.
pub const MPTABLE_MAX: usize = 1024;
/// Where memory goes on after the legacy hole.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// End of the memory below 4 GiB: device registers follow.
pub const MMIO_GAP_START: u64 = 0xd000_0000;
/// Where memory goes on above the gap.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;
/// Above any memory that a guest can have.
pub const PCI_WINDOW_START: u64 = 0x100_0000_0000;

/// virtio-mmio slots. Each has an interrupt line of the IOAPIC's 24: 0 is the timer's, 2 the cascade's.
pub const SLOTS: u8 = 22;
/// Registers of the first slot.
pub const SLOTS_START: u64 = MMIO_GAP_START;
/// Size of one slot's registers: one page, so that reads can be served from memory.
pub const SLOT_SIZE: u64 = 0x1000;

/// Pins of the IOAPIC.
pub const IOAPIC_PINS: u8 = 24;
/// Registers of the IOAPIC.
pub const IOAPIC_START: u32 = 0xfec0_0000;
/// Registers of the local APICs.
pub const LAPIC_START: u32 = 0xfee0_0000;

/// Three pages that KVM uses on Intel processors without unrestricted guest mode. Untested: the lab is AMD.
pub const KVM_TSS_START: usize = 0xfffb_d000;
/// One page, below the former.
pub const KVM_IDENTITY_MAP_START: u64 = 0xfffb_c000;

/// Most CPUs: as many entries fit into the MP table's kilobyte.
pub const VCPUS_MAX: u8 = 32;

/// COM1, for `earlyprintk`.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Command port of a keyboard controller. There is none, but a reset is asked for there.
pub const RESET_PORT: u16 = 0x64;
/// What is written there to reset the machine.
pub const RESET_COMMAND: u8 = 0xfe;

/// First register address of a slot.
pub fn slot_address(slot: u8) -> u64 {
    SLOTS_START + u64::from(slot) * SLOT_SIZE
}

/// Interrupt line of a slot: 1, then 3 to 23.
pub fn slot_gsi(slot: u8) -> u32 {
    if slot == 0 { 1 } else { u32::from(slot) + 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_slot_has_a_line_of_its_own_that_is_neither_timer_nor_cascade() {
        let lines: Vec<u32> = (0..SLOTS).map(slot_gsi).collect();
        assert!(lines.windows(2).all(|pair| pair[0] < pair[1]), "{lines:?}");
        assert!(!lines.contains(&0) && !lines.contains(&2));
        assert!(lines.iter().all(|&line| line < u32::from(IOAPIC_PINS)));
    }

    #[test]
    fn the_slots_end_before_the_ioapic() {
        assert!(slot_address(SLOTS) < u64::from(IOAPIC_START));
    }
}
