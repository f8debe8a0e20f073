//! What the host says of a file, and how the guest is told: `statx` on one side, `fuse_attr` on the other.

use std::ffi::CStr;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, StatxTimestamp, statx};
use rustix::io::Errno;

use crate::wire::Writer;

/// Which file it is, as long as it exists. The mount belongs to it: a directory that is mounted in two places is two nodes, or a
/// tree with a loop would come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The mount's id.
    pub mount: u64,
    /// The device number.
    pub device: u64,
    /// The inode number there.
    pub inode: u64,
}

/// Longer than the host's clock stands still for the times of files.
const CLOCK_TICK: Duration = Duration::from_millis(50);

/// By what it is told whether the content of a file has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    modified: Duration,
    changed: Duration,
    size: u64,
}

/// Attributes of a file.
#[derive(Clone, Copy, Debug)]
pub struct Attributes(Statx);

impl Attributes {
    /// Those of something in a directory; a symbolic link is not followed.
    ///
    /// # Errors
    /// The kernel's.
    pub fn at(directory: impl AsFd, name: &CStr) -> Result<Self, Errno> {
        Self::get(directory, name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Those of an open file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of(file: impl AsFd) -> Result<Self, Errno> {
        Self::get(file, c"", AtFlags::EMPTY_PATH)
    }

    fn get(directory: impl AsFd, name: &CStr, flags: AtFlags) -> Result<Self, Errno> {
        let flags = flags | AtFlags::NO_AUTOMOUNT;
        statx(directory, name, flags, StatxFlags::BASIC_STATS | StatxFlags::MNT_ID).map(Self)
    }

    /// What the content is, as far as the times and the size tell. Nothing for a file that was changed just now: the next change could
    /// come within the same tick of the host's clock, and would not show.
    pub fn content(&self, now: Duration) -> Option<Content> {
        let (modified, changed) = (self.modified(), since_epoch(self.0.stx_ctime));
        let settled = now.checked_sub(CLOCK_TICK).is_some_and(|then| modified < then && changed < then);
        settled.then_some(Content { modified, changed, size: self.0.stx_size })
    }

    /// When it was modified last, since 1970.
    pub fn modified(&self) -> Duration {
        since_epoch(self.0.stx_mtime)
    }

    /// Which file it is.
    pub fn identity(&self) -> Identity {
        Identity { mount: self.0.stx_mnt_id, device: self.device(), inode: self.0.stx_ino }
    }

    /// The device number.
    pub fn device(&self) -> u64 {
        u64::from(self.0.stx_dev_major) << 32 | u64::from(self.0.stx_dev_minor)
    }

    /// Type and permissions.
    pub fn mode(&self) -> u32 {
        u32::from(self.0.stx_mode)
    }

    /// The type.
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.mode())
    }

    /// Names that it has.
    pub fn links(&self) -> u32 {
        self.0.stx_nlink
    }

    /// Writes `fuse_attr`, with flags of its own.
    pub fn write(&self, to: &mut Writer, flags: u32) {
        let stat = &self.0;
        to.u64(stat.stx_ino).u64(stat.stx_size).u64(stat.stx_blocks);
        let times = [stat.stx_atime, stat.stx_mtime, stat.stx_ctime];
        for time in times {
            to.u64(time.tv_sec.cast_unsigned());
        }
        for time in times {
            to.u32(time.tv_nsec);
        }
        to.u32(self.mode()).u32(stat.stx_nlink).u32(stat.stx_uid).u32(stat.stx_gid);
        to.u32(encode_device(stat.stx_rdev_major, stat.stx_rdev_minor)).u32(stat.stx_blksize).u32(flags);
    }
}

/// Writes the `fuse_attr` of the root directory, which exists nowhere else.
pub fn write_root(to: &mut Writer) {
    to.u64(1).zeros(16 + 24 + 12);
    to.u32(FileType::Directory.as_raw_mode() | 0o555).u32(2).u32(0).u32(0).u32(0).u32(4096).u32(0);
}

/// A time before 1970 is taken for that.
fn since_epoch(time: StatxTimestamp) -> Duration {
    Duration::new(time.tv_sec.try_into().unwrap_or(0), time.tv_nsec)
}

/// A device number in the 32 bits that Linux's `new_encode_dev` makes of it.
fn encode_device(major: u32, minor: u32) -> u32 {
    minor & 0xff | (major & 0xfff) << 8 | (minor & !0xff) << 12
}

/// A device number of such 32 bits.
pub fn decode_device(device: u32) -> rustix::fs::Dev {
    rustix::fs::makedev(device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xf_ff00)
}

/// For how long the guest may believe something.
pub fn write_timeouts(to: &mut Writer, entry: Duration, attributes: Duration) {
    to.u64(entry.as_secs()).u64(attributes.as_secs());
    to.u32(entry.subsec_nanos()).u32(attributes.subsec_nanos());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_the_way_there_and_back() {
        for (major, minor) in [(0, 0), (1, 3), (8, 0x1_2345), (0xfff, 0xf_ffff)] {
            let device = decode_device(encode_device(major, minor));
            assert_eq!((rustix::fs::major(device), rustix::fs::minor(device)), (major, minor));
        }
    }

    #[test]
    fn attributes_have_the_length_that_the_kernel_expects() {
        let mut writer = Writer::default();
        Attributes::at(rustix::fs::CWD, c".").unwrap().write(&mut writer, 0);
        assert_eq!(writer.0.len(), 88);
        let mut root = Writer::default();
        write_root(&mut root);
        assert_eq!(root.0.len(), 88);
    }

    #[test]
    fn a_file_is_the_same_by_name_and_by_descriptor() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a"), "").unwrap();
        let parent = std::fs::File::open(directory.path()).unwrap();
        let file = std::fs::File::open(directory.path().join("a")).unwrap();
        let by_name = Attributes::at(&parent, c"a").unwrap();
        assert_eq!(by_name.identity(), Attributes::of(&file).unwrap().identity());
        assert_ne!(by_name.identity(), Attributes::of(&parent).unwrap().identity());
    }
}
