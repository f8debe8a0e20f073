//! A saved machine in one file. On the way back it is untrusted: nothing of it is used before all of it has been checked.
//!
//! ```text
//! 0    magic "BLKHDVM" and a NUL
//! 8    u32 version          12  u32 CRC-32 of the state   16  u64 length of the state
//! 24   u64 memory's offset  32  u64 memory's length        40  u32 CRC-32 of the memory    44  u32 CRC-32 of bytes 0 to 43
//! 48   the state, in postcard's encoding
//! ...  memory, at a multiple of 4 KiB, region after region; pages of zeros are holes
//! ```
//!
//! All numbers are little-endian. The memory's checksum covers each page that is not all zeros, preceded by its number.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::machine::MachineState;
use crate::memory::{self, Memory, MemoryError};

const MAGIC: [u8; 8] = *b"BLKHDVM\0";
/// Raised with every change of any state's type. There is no migration: a saved machine is a cache, made again when it does not fit.
pub const VERSION: u32 = 2;
const HEADER_LEN: usize = 48;
/// Longest state in bytes: 32 vCPUs of some 20 KiB, and little more.
const STATE_MAX: u64 = 4 << 20;
const PAGE: usize = 4096;
/// Memory is read and written in pieces of this many bytes.
const PIECE: usize = 1 << 20;

/// Why a machine was not saved or not taken from its file.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file fails.
    #[error("cannot read or write the saved machine")]
    Io(#[from] io::Error),
    /// The file is something else, or is cut short.
    #[error("not a saved machine, or one cut short: save it again")]
    NotSaved,
    /// The file is of another build.
    #[error("the saved machine has version {0}, but this is version {VERSION}: save it again")]
    Version(u32),
    /// A bit has changed.
    #[error("the saved machine is damaged ({0}): save it again")]
    Damaged(&'static str),
    /// The state cannot be written down.
    #[error("cannot encode the machine's state")]
    Encode(#[source] postcard::Error),
    /// Guest memory cannot be read.
    #[error("cannot read guest memory")]
    Read(#[from] vm_memory::GuestMemoryError),
    /// The saved memory cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

struct Header {
    state_crc: u32,
    state_len: u64,
    memory_offset: u64,
    memory_len: u64,
    memory_crc: u32,
}

impl Header {
    fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = Vec::with_capacity(HEADER_LEN);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.state_crc.to_le_bytes());
        bytes.extend(self.state_len.to_le_bytes());
        bytes.extend(self.memory_offset.to_le_bytes());
        bytes.extend(self.memory_len.to_le_bytes());
        bytes.extend(self.memory_crc.to_le_bytes());
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes.try_into().expect("HEADER_LEN bytes")
    }

    fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, SnapshotError> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        if bytes[..8] != MAGIC {
            return Err(SnapshotError::NotSaved);
        }
        if word(8) != VERSION {
            return Err(SnapshotError::Version(word(8)));
        }
        if crc32fast::hash(&bytes[..HEADER_LEN - 4]) != word(HEADER_LEN - 4) {
            return Err(SnapshotError::Damaged("header"));
        }
        Ok(Self {
            state_crc: word(12),
            state_len: long(16),
            memory_offset: long(24),
            memory_len: long(32),
            memory_crc: word(40),
        })
    }
}

/// Writes a machine to an empty file.
///
/// # Errors
/// When the file fails; what it then holds is not accepted by [`open`].
pub fn write(file: &File, state: &MachineState, memory: &Memory) -> Result<(), SnapshotError> {
    let state = postcard::to_stdvec(state).map_err(SnapshotError::Encode)?;
    let memory_offset = (HEADER_LEN + state.len()).next_multiple_of(PAGE) as u64;
    let memory_len = GuestMemoryBackend::iter(memory).map(GuestMemoryRegion::len).sum();
    file.set_len(memory_offset + memory_len)?;
    file.write_all_at(&state, HEADER_LEN as u64)?;

    let mut checksum = MemoryChecksum::default();
    let mut piece = vec![0; PIECE];
    let mut at = 0u64;
    for region in GuestMemoryBackend::iter(memory) {
        for start in (0..region.len()).step_by(PIECE) {
            let length = usize::try_from(region.len() - start).unwrap_or(PIECE).min(PIECE);
            region.read_slice(&mut piece[..length], MemoryRegionAddress(start))?;
            checksum.add(at, &piece[..length], |page_at, page| {
                file.write_all_at(page, memory_offset + page_at)
            })?;
            at += length as u64;
        }
    }
    let header = Header {
        state_crc: crc32fast::hash(&state),
        state_len: state.len() as u64,
        memory_offset,
        memory_len,
        memory_crc: checksum.value(),
    };
    // Last, so that a file that was not written to its end is no saved machine.
    Ok(file.write_all_at(&header.encode(), 0)?)
}

/// Checks a saved machine and opens it: its state, and a private view of its memory.
///
/// # Errors
/// [`SnapshotError`] for anything that [`write`] of this version did not write.
pub fn open(file: File) -> Result<(MachineState, Memory), SnapshotError> {
    let mut bytes = [0; HEADER_LEN];
    file.read_exact_at(&mut bytes, 0).map_err(|_| SnapshotError::NotSaved)?;
    let header = Header::decode(&bytes)?;
    if header.state_len > STATE_MAX {
        return Err(SnapshotError::Damaged("length of the state"));
    }
    let mut state = vec![0; usize::try_from(header.state_len).map_err(|_| SnapshotError::NotSaved)?];
    file.read_exact_at(&mut state, HEADER_LEN as u64).map_err(|_| SnapshotError::NotSaved)?;
    if crc32fast::hash(&state) != header.state_crc {
        return Err(SnapshotError::Damaged("state"));
    }
    let state: MachineState = postcard::from_bytes(&state).map_err(|_| SnapshotError::Damaged("state"))?;

    let expected: u64 = memory::regions(state.memory_mib)?.iter().map(|(_, length)| length).sum();
    let end = header.memory_offset.checked_add(header.memory_len);
    if header.memory_len != expected
        || header.memory_offset % PAGE as u64 != 0
        || end != Some(file.metadata()?.len())
    {
        return Err(SnapshotError::NotSaved);
    }
    if memory_checksum(&file, header.memory_offset, header.memory_len)? != header.memory_crc {
        return Err(SnapshotError::Damaged("memory"));
    }
    let memory = memory::from_file(state.memory_mib, &Arc::new(file), header.memory_offset)?;
    Ok((state, memory))
}

/// Reads the memory in the file, but for its holes.
fn memory_checksum(file: &File, offset: u64, length: u64) -> Result<u32, SnapshotError> {
    let mut checksum = MemoryChecksum::default();
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < length {
        let Some(data) = next_data(file, offset + at)? else { break };
        // File systems tell data from holes by their own blocks, which may be smaller than a page.
        at = data.saturating_sub(offset) / PAGE as u64 * PAGE as u64;
        let size = usize::try_from(length - at).unwrap_or(PIECE).min(PIECE);
        file.read_exact_at(&mut piece[..size], offset + at)?;
        checksum.add(at, &piece[..size], |_, _| Ok(()))?;
        at += size as u64;
    }
    Ok(checksum.value())
}

/// Where the next data begins, at `from` or behind it.
fn next_data(file: &File, from: u64) -> Result<Option<u64>, SnapshotError> {
    use nix::unistd::{Whence, lseek64};

    let from = i64::try_from(from).map_err(|_| SnapshotError::NotSaved)?;
    match lseek64(file, from, Whence::SeekData) {
        Ok(at) => Ok(u64::try_from(at).ok()),
        Err(nix::Error::ENXIO) => Ok(None),
        Err(error) => Err(io::Error::from(error).into()),
    }
}

/// The checksum of memory: of each page that is not all zeros, and of its number.
#[derive(Default)]
struct MemoryChecksum(crc32fast::Hasher);

impl MemoryChecksum {
    fn add(
        &mut self,
        at: u64,
        piece: &[u8],
        mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        for (page_at, page) in (at..).step_by(PAGE).zip(piece.chunks(PAGE)) {
            if page.iter().any(|&byte| byte != 0) {
                self.0.update(&page_at.to_le_bytes());
                self.0.update(page);
                each(page_at, page)?;
            }
        }
        Ok(())
    }

    fn value(self) -> u32 {
        self.0.finalize()
    }
}
