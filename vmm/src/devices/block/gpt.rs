//! A GUID partition table, UEFI 2.10 section 5.3, made up for a list of files so that each is a partition of one disk.
//!
//! The disk begins with the protective MBR, the header and the entries, then comes each file at a multiple of 4 KiB. There
//! is no backup table at the end: Linux does not look for it when the first table is good.

use super::SECTOR;

const ENTRY_SIZE: usize = 128;
const HEADER_SIZE: u32 = 92;
/// Files begin at multiples of this, in sectors, so that pages of the guest are pages of the file.
const ALIGNMENT: u64 = 4096 / SECTOR;
/// Linux file system data, 0FC63DAF-8483-4772-8E79-3D69D8477DE4, as it is stored.
const TYPE: [u8; 16] =
    [0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47, 0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4];

/// Where each file is, and the sectors before the first.
#[derive(Debug, PartialEq, Eq)]
pub struct Table {
    /// First sector of each file.
    pub starts: Vec<u64>,
    /// Size of the whole disk in sectors.
    pub sectors: u64,
    /// What the disk holds before the first file: MBR, header, entries.
    pub head: Vec<u8>,
}

/// Lays out files of so many sectors each. None when there are none, an empty one, or more than a disk can hold.
pub fn lay_out(files: &[u64]) -> Option<Table> {
    if files.is_empty() || files.contains(&0) {
        return None;
    }
    let entries_len = (files.len() * ENTRY_SIZE).next_multiple_of(usize::try_from(SECTOR).ok()?);
    let first_usable = 2 + entries_len as u64 / SECTOR;
    let mut starts = Vec::with_capacity(files.len());
    let mut next = first_usable;
    for length in files {
        next = next.checked_next_multiple_of(ALIGNMENT)?;
        starts.push(next);
        next = next.checked_add(*length)?;
    }
    let sectors = next.checked_add(1)?.checked_mul(SECTOR)? / SECTOR;

    let mut entries = vec![0; entries_len];
    for (number, ((start, length), entry)) in
        (1u32..).zip(starts.iter().zip(files).zip(entries.chunks_exact_mut(ENTRY_SIZE)))
    {
        entry[..16].copy_from_slice(&TYPE);
        // A GUID of its own for each partition; nobody compares those of two disks.
        entry[16..20].copy_from_slice(&number.to_le_bytes());
        entry[31] = 1;
        entry[32..40].copy_from_slice(&start.to_le_bytes());
        entry[40..48].copy_from_slice(&(start + length - 1).to_le_bytes());
    }
    let used = &entries[..files.len() * ENTRY_SIZE];
    let header = header(first_usable, sectors - 1, u32::try_from(files.len()).ok()?, crc32fast::hash(used));
    let head = [protective_mbr(sectors), header, entries].concat();
    Some(Table { starts, sectors, head })
}

fn protective_mbr(sectors: u64) -> Vec<u8> {
    let mut mbr = vec![0; 512];
    mbr[446 + 4] = 0xee;
    mbr[446 + 8..446 + 12].copy_from_slice(&1u32.to_le_bytes());
    let size = u32::try_from(sectors - 1).unwrap_or(u32::MAX);
    mbr[446 + 12..446 + 16].copy_from_slice(&size.to_le_bytes());
    mbr[510..].copy_from_slice(&[0x55, 0xaa]);
    mbr
}

fn header(first_usable: u64, last_sector: u64, entries: u32, entries_crc: u32) -> Vec<u8> {
    let mut header = Vec::with_capacity(512);
    header.extend(b"EFI PART");
    header.extend(0x0001_0000_u32.to_le_bytes());
    header.extend(HEADER_SIZE.to_le_bytes());
    header.extend([0; 8]); // its own CRC, below, and a reserved word
    header.extend(1u64.to_le_bytes()); // this header's sector
    header.extend(last_sector.to_le_bytes()); // the backup's
    header.extend(first_usable.to_le_bytes());
    header.extend((last_sector - 1).to_le_bytes());
    header.extend(TYPE); // the disk's GUID: any
    header.extend(2u64.to_le_bytes()); // the entries' sector
    header.extend(entries.to_le_bytes());
    header.extend(u32::try_from(ENTRY_SIZE).expect("128").to_le_bytes());
    header.extend(entries_crc.to_le_bytes());
    let crc = crc32fast::hash(&header);
    header[16..20].copy_from_slice(&crc.to_le_bytes());
    header.resize(512, 0);
    header
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    proptest! {
        #[test]
        fn files_are_aligned_and_do_not_overlap(files in proptest::collection::vec(1u64..1 << 40, 1..200)) {
            let table = lay_out(&files).unwrap();
            let mut end = table.head.len() as u64 / SECTOR;
            for (start, length) in table.starts.iter().zip(&files) {
                prop_assert!(start % ALIGNMENT == 0 && *start >= end);
                end = start + length;
            }
            prop_assert!(table.sectors > end);
        }
    }

    #[test]
    fn the_table_says_where_the_files_are() {
        let table = lay_out(&[8, 100]).unwrap();
        assert_eq!(table.head.len(), 3 * 512);
        let entry = &table.head[1024 + 128..];
        assert_eq!((u64_at(entry, 32), u64_at(entry, 40)), (table.starts[1], table.starts[1] + 99));
        let mut header = table.head[512..512 + 92].to_vec();
        let crc = u32::from_le_bytes(header[16..20].try_into().unwrap());
        header[16..20].fill(0);
        assert_eq!(crc, crc32fast::hash(&header));
    }

    #[test]
    fn no_files_empty_files_and_files_beyond_counting_are_refused() {
        assert_eq!(lay_out(&[]), None);
        assert_eq!(lay_out(&[8, 0]), None);
        assert_eq!(lay_out(&[u64::MAX, 1]), None);
        assert_eq!(lay_out(&[u64::MAX / 512]), None);
    }
}
