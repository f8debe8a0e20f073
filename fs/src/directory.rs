//! Directories as the kernel lists them: `getdents64` and what it gives.

use std::collections::VecDeque;
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// Bytes that are read of a directory at a time.
const BATCH: usize = 32 << 10;

/// Directories of which what has been read is kept until it is asked for. The guest asks for a page at a time.
const KEPT_MAX: usize = 32;

/// Bytes of `struct linux_dirent64` before the name.
const HEADER: usize = 19;

/// An entry of a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The inode number, as the directory has it.
    pub inode: u64,
    /// Where the next entry is.
    pub next: u64,
    /// The type, `DT_*`.
    pub kind: u8,
    /// The name.
    pub name: &'a CStr,
}

/// Some of a directory's entries.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    at: usize,
    /// The offset of the next entry.
    offset: u64,
    /// The offset behind all of them, where the kernel has arrived.
    end: u64,
}

impl Batch {
    /// The entries from an offset on, where the kernel has arrived. Empty at the end of the directory.
    ///
    /// # Errors
    /// The kernel's; EIO when it gives something else than entries.
    pub fn read(directory: impl AsFd, offset: u64) -> Result<Self, Errno> {
        let mut bytes: Vec<u8> = Vec::with_capacity(BATCH);
        let raw = directory.as_fd().as_raw_fd();
        // SAFETY: the kernel writes at most BATCH bytes to where there is room for them.
        let read = unsafe { libc::syscall(libc::SYS_getdents64, raw, bytes.as_mut_ptr(), BATCH) };
        let Ok(read) = usize::try_from(read) else {
            let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
            return Err(Errno::from_raw_os_error(errno));
        };
        // SAFETY: it has written that many.
        unsafe { bytes.set_len(read.min(BATCH)) };
        let mut batch = Self { bytes, at: 0, offset, end: offset };
        let mut rest = &batch.bytes[..];
        while !rest.is_empty() {
            let (entry, length) = parse(rest).ok_or(Errno::IO)?;
            batch.end = entry.next;
            rest = &rest[length..];
        }
        Ok(batch)
    }

    /// The next entry.
    pub fn peek(&self) -> Option<Entry<'_>> {
        parse(self.bytes.get(self.at..)?).map(|(entry, _)| entry)
    }

    /// Goes on behind it.
    pub fn advance(&mut self) {
        if let Some((entry, length)) = self.bytes.get(self.at..).and_then(parse) {
            self.offset = entry.next;
            self.at += length;
        }
    }

    /// True when there are no more.
    pub fn is_empty(&self) -> bool {
        self.at >= self.bytes.len()
    }

    /// The offset of the next entry.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The offset that the kernel has arrived at.
    pub fn end(&self) -> u64 {
        self.end
    }
}

/// The first entry, and how many bytes it has.
fn parse(bytes: &[u8]) -> Option<(Entry<'_>, usize)> {
    let (inode, rest) = bytes.split_first_chunk()?;
    let (next, rest) = rest.split_first_chunk()?;
    let (length, rest) = rest.split_first_chunk()?;
    let (kind, _) = rest.split_first()?;
    let length = usize::from(u16::from_le_bytes(*length));
    let name = CStr::from_bytes_until_nul(bytes.get(HEADER..length)?).ok()?;
    let (inode, next) = (u64::from_le_bytes(*inode), u64::from_le_bytes(*next));
    Some((Entry { inode, next, kind: *kind, name }, length))
}

/// What has been read of directories and not been asked for yet, by handle. The oldest goes first.
#[derive(Debug, Default)]
pub struct ReadAhead(VecDeque<(u64, Batch)>);

impl ReadAhead {
    /// What is kept for a handle, if it begins at the offset that is asked for.
    pub fn take(&mut self, handle: u64, offset: u64) -> Option<Batch> {
        let at = self.0.iter().position(|(owner, _)| *owner == handle)?;
        let (_, batch) = self.0.remove(at)?;
        (batch.offset() == offset).then_some(batch)
    }

    /// Keeps what is left of a batch.
    pub fn keep(&mut self, handle: u64, batch: Batch) {
        if batch.is_empty() {
            return;
        }
        if self.0.len() >= KEPT_MAX {
            self.0.pop_front();
        }
        self.0.push_back((handle, batch));
    }

    /// Forgets a handle.
    pub fn remove(&mut self, handle: u64) {
        self.0.retain(|(owner, _)| *owner != handle);
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs::File;

    use super::*;

    fn directory(files: usize) -> (tempfile::TempDir, File) {
        let directory = tempfile::tempdir().unwrap();
        for file in 0..files {
            File::create(directory.path().join(format!("file-{file}"))).unwrap();
        }
        let opened = File::open(directory.path()).unwrap();
        (directory, opened)
    }

    #[test]
    fn every_entry_is_seen_once() {
        let (_keep, directory) = directory(3000);
        let (mut seen, mut offset) = (BTreeSet::new(), 0);
        loop {
            let mut batch = Batch::read(&directory, offset).unwrap();
            if batch.is_empty() {
                break;
            }
            while let Some(entry) = batch.peek() {
                assert!(seen.insert(entry.name.to_owned()));
                batch.advance();
            }
            assert_eq!(batch.offset(), batch.end());
            offset = batch.end();
        }
        assert_eq!(seen.len(), 3002);
    }

    #[test]
    fn what_is_kept_is_given_for_its_handle_and_offset_only() {
        let (_keep, directory) = directory(3);
        let mut ahead = ReadAhead::default();
        let mut batch = Batch::read(&directory, 0).unwrap();
        batch.advance();
        let offset = batch.offset();
        ahead.keep(7, batch);
        assert!(ahead.take(8, offset).is_none());
        let batch = ahead.take(7, offset).unwrap();
        assert!(ahead.take(7, offset).is_none(), "it was taken");
        ahead.keep(7, batch);
        assert!(ahead.take(7, offset + 1).is_none() && ahead.take(7, offset).is_none());
    }

    #[test]
    fn only_so_much_is_kept() {
        let (_keep, directory) = directory(1);
        let mut ahead = ReadAhead::default();
        for handle in 0..100 {
            rustix::fs::seek(&directory, rustix::fs::SeekFrom::Start(0)).unwrap();
            ahead.keep(handle, Batch::read(&directory, 0).unwrap());
        }
        assert_eq!(ahead.0.len(), KEPT_MAX);
        assert!(ahead.take(99, 0).is_some() && ahead.take(0, 0).is_none());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_entries_or_not(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..80)) {
            if let Some((entry, length)) = parse(&bytes) {
                proptest::prop_assert!(length <= bytes.len() && entry.name.count_bytes() < length);
            }
        }
    }
}
