//! The least kernel that can be booted: an ELF file with a PVH entry note and some code.

const BASE: u32 = 0x10_0000;
const HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
/// `XEN_ELFNOTE_PHYS32_ENTRY`
const NOTE_PHYS32_ENTRY: u32 = 18;

/// An ELF kernel whose PVH entry is the first byte of `code`, which runs in 32-bit protected mode.
#[must_use]
pub fn pvh_kernel(code: &[u8]) -> Vec<u8> {
    let note: Vec<u8> = [4u32, 8, NOTE_PHYS32_ENTRY]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .chain(*b"Xen\0")
        .chain(u64::from(BASE).to_le_bytes())
        .collect();
    let note_at = HEADER_LEN + 2 * PROGRAM_HEADER_LEN;
    let code_at = note_at + note.len();

    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version 1
    file.extend(u64::from(BASE).to_le_bytes()); // entry
    file.extend((HEADER_LEN as u64).to_le_bytes()); // program headers
    file.extend([0; 12]); // section headers, flags
    for half in [HEADER_LEN, PROGRAM_HEADER_LEN, 2, 0, 0, 0] {
        file.extend(u16::try_from(half).expect("small").to_le_bytes());
    }
    for (kind, at, length) in [(4u32, note_at, note.len()), (1, code_at, code.len())] {
        file.extend(kind.to_le_bytes());
        file.extend(5u32.to_le_bytes()); // readable, executable
        let (at, length) = (at as u64, length as u64);
        for word in [at, u64::from(BASE), u64::from(BASE), length, length, 4] {
            file.extend(word.to_le_bytes());
        }
    }
    file.extend(note);
    file.extend(code);
    file
}
