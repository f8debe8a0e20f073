//! The files that the guest has open, by the handles that the server gave them.

use std::collections::HashMap;
use std::fs::File;

/// Files at most that a guest may have open at once on one device.
pub const HANDLES_MAX: usize = 60 << 10;

/// The table.
#[derive(Debug)]
pub(super) struct Handles {
    // Its hash is keyed when the device is made: a server cannot choose handles that collide.
    files: HashMap<u64, File>,
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
        self.files.insert(handle, file);
    }

    /// The file with this handle.
    pub(super) fn get(&self, handle: u64) -> Option<&File> {
        self.files.get(&handle)
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
