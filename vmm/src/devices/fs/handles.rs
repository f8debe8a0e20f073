//! The files that the guest has open, by the handles that the server gave them.

use std::collections::HashMap;
use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::unistd::close;

/// Files at most that a guest may have open at once on one device.
pub const HANDLES_MAX: usize = 60 << 10;

/// A file that the guest has open.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) file: File,
    /// The flags of preadv2(2) that make it return what the host has in memory, without waiting for anything else. None when the file's
    /// file system has no such way.
    pub(super) at_once: Option<i32>,
    /// Its status flags, once they are known.
    flags: Option<OFlag>,
}

impl OpenFile {
    fn new(file: File) -> Self {
        Self { file, at_once: Some(libc::RWF_NOWAIT), flags: None }
    }

    /// `RWF_NOWAIT` is not supported. A tmpfs says so although all it has is in memory; its pages may have been swapped out, as the guest's
    /// own may.
    pub(super) fn without_nowait(&mut self) {
        let in_memory = fstatfs(&self.file).is_ok_and(|stat| stat.filesystem_type() == TMPFS_MAGIC);
        self.at_once = in_memory.then_some(0);
    }

    /// Has writes go to the end of the file, or to where they say: pwritev(2) appends whatever its offset is, and to say for a single write
    /// that it should not takes a newer kernel (`RWF_NOAPPEND`, Linux 6.9). Nobody else writes by this descriptor.
    ///
    /// # Errors
    /// The kernel's: a file that can only be appended to (`chattr +a`) stays so.
    pub(super) fn set_append(&mut self, append: bool) -> nix::Result<()> {
        let flags = match self.flags {
            Some(flags) => flags,
            None => OFlag::from_bits_retain(fcntl(&self.file, FcntlArg::F_GETFL)?),
        };
        self.flags = Some(flags);
        if flags.contains(OFlag::O_APPEND) != append {
            let wanted = flags ^ OFlag::O_APPEND;
            fcntl(&self.file, FcntlArg::F_SETFL(wanted))?;
            self.flags = Some(wanted);
        }
        Ok(())
    }

    /// Closes a second descriptor of the file, by which a network file system sends what it has not sent yet. Locks would end by it, too, but
    /// the VMM has none: the guest's are in its kernel.
    ///
    /// # Errors
    /// That of close(2): there is no room (NFS, FUSE). That of another descriptor when the VMM has too many.
    pub(super) fn flush(&self) -> io::Result<()> {
        Ok(close(self.file.try_clone()?)?)
    }
}

/// The table.
#[derive(Debug)]
pub(super) struct Handles {
    // Its hash is keyed when the device is made: a server cannot choose handles that collide.
    files: HashMap<u64, OpenFile>,
    max: usize,
}

impl Default for Handles {
    fn default() -> Self {
        Self { files: HashMap::new(), max: HANDLES_MAX }
    }
}

impl Handles {
    /// Room for so many more.
    pub(super) fn room(&self) -> usize {
        self.max.saturating_sub(self.files.len())
    }

    /// Adds a file. One that had the handle before is closed: the server has it no longer.
    pub(super) fn insert(&mut self, handle: u64, file: File) {
        self.files.insert(handle, OpenFile::new(file));
    }

    /// The file with this handle.
    pub(super) fn get(&mut self, handle: u64) -> Option<&mut OpenFile> {
        self.files.get_mut(&handle)
    }

    /// Closes a file.
    pub(super) fn remove(&mut self, handle: u64) {
        self.files.remove(&handle);
    }

    /// Closes all. The table's memory goes too, but not its hash: a new one would need random bytes, for which a vCPU's thread, where a
    /// reset happens, may not ask.
    pub(super) fn clear(&mut self) {
        self.files.clear();
        self.files.shrink_to_fit();
    }

    /// Room for fewer, so that a test can fill it.
    #[cfg(test)]
    pub(super) fn limit(&mut self, max: usize) {
        self.max = max;
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.files.len()
    }
}
