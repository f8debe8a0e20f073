//! The MP table (Intel MultiProcessor Specification 1.4): CPUs, the IOAPIC, and which line is whose. With it the kernel
//! needs no ACPI.
//!
//! All CPUs that the guest may ever get are listed; the command line says how many start.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout::{IOAPIC_PINS, IOAPIC_START, LAPIC_START, MPTABLE_MAX, MPTABLE_START, VCPUS_MAX};
use crate::memory::Memory;

const POINTER_LEN: usize = 16;
const HEADER_LEN: usize = 44;
/// Version 0x14 of a local APIC and of an IOAPIC: integrated ones, which is all that matters.
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;
const CPU_ENABLED: u8 = 1;
const CPU_BOOTSTRAP: u8 = 2;
/// `INT`, `NMI` and `ExtINT` interrupt types.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
const ALL_LAPICS: u8 = 0xff;

/// Writes the table for `vcpus` CPUs, at most [`VCPUS_MAX`].
///
/// # Errors
/// When guest memory is too small to hold it.
pub fn write(memory: &Memory, vcpus: u8) -> Result<(), GuestMemoryError> {
    memory.write_slice(&build(vcpus), GuestAddress(MPTABLE_START))
}

fn build(vcpus: u8) -> Vec<u8> {
    assert!((1..=VCPUS_MAX).contains(&vcpus));
    let ioapic_id = vcpus;
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..vcpus {
        let role = if id == 0 { CPU_BOOTSTRAP } else { 0 };
        let mut entry = vec![0, id, APIC_VERSION, CPU_ENABLED | role];
        entry.extend([0; 16]); // signature and features: the kernel asks CPUID
        entries.push(entry);
    }
    entries.push([&[1, ISA_BUS][..], b"ISA   "].concat());
    entries.push([&[2, ioapic_id, APIC_VERSION, 1][..], &IOAPIC_START.to_le_bytes()].concat());
    for line in 0..IOAPIC_PINS {
        entries.push(vec![3, INT, 0, 0, ISA_BUS, line, ioapic_id, line]);
    }
    entries.push(vec![4, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.push(vec![4, NMI, 0, 0, ISA_BUS, 0, ALL_LAPICS, 1]);

    let mut table = Vec::with_capacity(MPTABLE_MAX);
    table.extend(b"PCMP");
    let length = HEADER_LEN + entries.iter().map(Vec::len).sum::<usize>();
    table.extend(u16::try_from(length).expect("below MPTABLE_MAX").to_le_bytes());
    table.extend([4, 0]); // revision 1.4, checksum
    table.extend(b"BULKHEADVIRTUAL     "); // 8 bytes of maker, 12 of product
    table.extend([0; 6]); // no OEM table
    table.extend(u16::try_from(entries.len()).expect("below MPTABLE_MAX").to_le_bytes());
    table.extend(LAPIC_START.to_le_bytes());
    table.extend([0; 4]); // no extended table
    table.extend(entries.concat());
    table[7] = checksum(&table);

    let mut pointer = Vec::with_capacity(POINTER_LEN);
    pointer.extend(b"_MP_");
    let table_start =
        u32::try_from(MPTABLE_START).expect("below 1 MiB") + u32::try_from(POINTER_LEN).expect("16");
    pointer.extend(table_start.to_le_bytes());
    pointer.extend([1, 4, 0, 0, 0, 0, 0, 0]); // one paragraph, revision, checksum, no default configuration
    pointer[10] = checksum(&pointer);
    pointer.extend(table);
    assert!(pointer.len() <= MPTABLE_MAX);
    pointer
}

/// What makes all bytes add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_table_fits_and_adds_up() {
        for vcpus in [1, 2, VCPUS_MAX] {
            let all = build(vcpus);
            let (pointer, table) = all.split_at(POINTER_LEN);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let entries = usize::from(u16::from_le_bytes([table[34], table[35]]));
            assert_eq!(entries, usize::from(vcpus) + 2 + usize::from(IOAPIC_PINS) + 2);
        }
    }
}
