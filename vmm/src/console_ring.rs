//! The guest's console, kept in a memfd that VMM and owner share: the owner can read its tail even after the VMM has been
//! killed. The guest decides what is written, so there is a bound and nothing but bytes.
//!
//! The file is a little-endian `u64`, the number of bytes ever written, then [`CAPACITY`] bytes of ring.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Bytes that are kept.
pub const CAPACITY: usize = 64 << 10;
/// Size of the memfd.
pub const FILE_SIZE: usize = HEADER + CAPACITY;
const HEADER: usize = size_of::<u64>();

/// The VMM's side. Writing never fails and never waits.
#[derive(Debug)]
pub struct ConsoleRing {
    base: std::ptr::NonNull<libc::c_void>,
}

// SAFETY: the mapping belongs to the process, not to a thread, and `write` takes `&mut self`.
unsafe impl Send for ConsoleRing {}

impl ConsoleRing {
    /// Maps a memfd of [`FILE_SIZE`] bytes.
    ///
    /// # Errors
    /// When the file is shorter or cannot be mapped.
    pub fn new(file: &File) -> io::Result<Self> {
        if file.metadata()?.len() < FILE_SIZE as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the console file is too short"));
        }
        let length = std::num::NonZeroUsize::new(FILE_SIZE).expect("not zero");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new shared mapping at an address of the kernel's choice; only `self` refers to it. The owner seals the
        // file against shrinking, and if it did not, only this VMM would suffer.
        let base = unsafe { mmap(None, length, protection, MapFlags::MAP_SHARED, file.as_fd(), 0)? };
        Ok(Self { base })
    }

    /// Appends bytes; the oldest make room.
    pub fn write(&mut self, bytes: &[u8]) {
        // SAFETY: the mapping begins with the counter, page-aligned, and lives as long as `self`.
        let written = unsafe { &*self.base.as_ptr().cast::<AtomicU64>() };
        let total = written.load(Ordering::Relaxed);
        let kept = &bytes[bytes.len().saturating_sub(CAPACITY)..];
        let mut at = usize::try_from((total + (bytes.len() - kept.len()) as u64) % CAPACITY as u64)
            .expect("below CAPACITY");
        for part in [&kept[..kept.len().min(CAPACITY - at)], &kept[kept.len().min(CAPACITY - at)..]] {
            // SAFETY: `at + part.len()` is at most CAPACITY, and the ring of that many bytes follows the counter. The owner
            // may read at the same time and sees bytes of either age, which is all it expects.
            unsafe {
                let ring = self.base.as_ptr().cast::<u8>().add(HEADER);
                std::ptr::copy_nonoverlapping(part.as_ptr(), ring.add(at), part.len());
            }
            at = 0;
        }
        written.store(total.wrapping_add(bytes.len() as u64), Ordering::Release);
    }
}

impl Drop for ConsoleRing {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `new`, and nothing refers to it any more.
        let _ = unsafe { munmap(self.base, FILE_SIZE) };
    }
}

/// The owner's side: the bytes that the ring holds, oldest first. They are the guest's choice: escape them before a terminal.
///
/// # Errors
/// When the file cannot be read.
pub fn read(file: &File) -> io::Result<Vec<u8>> {
    let mut content = vec![0; FILE_SIZE];
    file.read_exact_at(&mut content, 0)?;
    let (counter, ring) = content.split_at(HEADER);
    let total = u64::from_le_bytes(counter.try_into().expect("8 bytes"));
    let kept = usize::try_from(total).unwrap_or(usize::MAX).min(CAPACITY);
    let end = usize::try_from(total % CAPACITY as u64).expect("below CAPACITY");
    let mut out = Vec::with_capacity(kept);
    if kept == CAPACITY {
        out.extend_from_slice(&ring[end..]);
    }
    out.extend_from_slice(&ring[..end]);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(FILE_SIZE as u64).unwrap();
        file
    }

    #[test]
    fn a_short_file_is_refused() {
        assert!(ConsoleRing::new(&tempfile::tempfile().unwrap()).is_err());
    }

    proptest! {
        #[test]
        fn the_tail_of_all_that_was_written_is_read(chunks in proptest::collection::vec(0usize..100_000, 0..6)) {
            let file = file();
            let mut ring = ConsoleRing::new(&file).unwrap();
            let mut all = Vec::new();
            for (n, length) in chunks.into_iter().enumerate() {
                let chunk: Vec<u8> = (0..length).map(|i| u8::try_from((i * 7 + n) % 251).unwrap()).collect();
                ring.write(&chunk);
                all.extend(chunk);
            }
            let tail = &all[all.len().saturating_sub(CAPACITY)..];
            prop_assert_eq!(read(&file).unwrap(), tail);
        }
    }
}
