//! How much of its file system an import may fill.

use std::io;
use std::path::Path;

/// What an import leaves free, in bytes: others on the host need to write too. Of a small file system it is a twentieth.
const RESERVE: u64 = 256 << 20;
const RESERVE_PARTS: u64 = 20;

/// The room on a file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Free for us.
    pub free: u64,
    /// What an import leaves free.
    pub reserve: u64,
}

impl Space {
    /// The room where `path` is.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let found = rustix::fs::statvfs(path)?;
        let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
        Ok(Self::new(bytes(found.f_blocks), bytes(found.f_bavail)))
    }

    fn new(total: u64, free: u64) -> Self {
        Self { free, reserve: RESERVE.min(total / RESERVE_PARTS) }
    }

    /// What an import may take.
    pub fn usable(self) -> u64 {
        self.free.saturating_sub(self.reserve)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn something_is_left_to_others() {
        assert_eq!(Space::new(1 << 40, 1 << 30).usable(), (1 << 30) - RESERVE);
        assert_eq!(Space::new(20_000, 1500).usable(), 500);
        assert_eq!(Space::new(20_000, 999).usable(), 0);
    }

    #[test]
    fn a_file_system_has_room() {
        let space = Space::of(Path::new(".")).unwrap();
        assert!(space.free > 0 && space.reserve > 0, "{space:?}");
    }
}
