//! FUSE's messages, as Linux's `include/uapi/linux/fuse.h` has them (7.38): what a request consists of is read here, and what a reply
//! consists of is written here. All numbers are little-endian.

use rustix::io::Errno;

use crate::name::Name;

/// Bytes of `fuse_in_header`.
pub const IN_HEADER: usize = 40;
/// Bytes of `fuse_out_header`.
pub const OUT_HEADER: usize = 16;
/// Bytes of `fuse_entry_out`.
pub const ENTRY_OUT: usize = 128;
/// Bytes of `fuse_dirent` without the name.
pub const DIRENT: usize = 24;
/// The version that is spoken, and the oldest one that the driver may speak.
pub const MAJOR: u32 = 7;
/// See [`MAJOR`].
pub const MINOR: u32 = 38;
/// See [`MAJOR`]: from it on, the driver knows all that is used here.
pub const MINOR_MIN: u32 = 31;

/// Numbers of requests.
pub mod opcode {
    #![allow(missing_docs)] // the names are fuse.h's
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
}

/// Flags of INIT.
pub mod init {
    #![allow(missing_docs)] // the names are fuse.h's
    pub const ASYNC_READ: u32 = 1;
    pub const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const DONT_MASK: u32 = 1 << 6;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const POSIX_ACL: u32 = 1 << 20;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const CACHE_SYMLINKS: u32 = 1 << 23;
    pub const SUBMOUNTS: u32 = 1 << 27;
    pub const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
    pub const SETXATTR_EXT: u32 = 1 << 29;
    pub const INIT_EXT: u32 = 1 << 30;
}

/// What of an inode SETATTR sets.
pub mod fattr {
    #![allow(missing_docs)] // the names are fuse.h's
    pub const MODE: u32 = 1;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `FUSE_GETATTR_FH`: GETATTR names an open file.
pub const GETATTR_FH: u32 = 1;
/// `FUSE_OPEN_KILL_SUIDGID`: OPEN and CREATE are to clear set-id bits when they truncate.
pub const OPEN_KILL_SUIDGID: u32 = 1;
/// `FUSE_SETXATTR_ACL_KILL_SGID`: SETXATTR is to clear the set-group-id bit.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1;
/// `FUSE_FSYNC_FDATASYNC`
pub const FSYNC_FDATASYNC: u32 = 1;
/// `FOPEN_KEEP_CACHE`: what the guest has cached of the file stays valid.
pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// `FOPEN_CACHE_DIR`: the guest may cache what it reads of the directory.
pub const FOPEN_CACHE_DIR: u32 = 1 << 3;
/// `FOPEN_NOFLUSH`: the guest need not ask what close(2) says of the file. It has no effect with WRITEBACK_CACHE.
pub const FOPEN_NOFLUSH: u32 = 1 << 5;
/// `FUSE_ATTR_SUBMOUNT`: the directory is on another file system than its parent.
pub const ATTR_SUBMOUNT: u32 = 1;

/// What every request begins with.
#[derive(Clone, Copy, Debug)]
pub struct InHeader {
    /// Bytes of the whole request.
    pub len: u32,
    /// One of [`opcode`].
    pub opcode: u32,
    /// Repeated in the reply.
    pub unique: u64,
    /// The node that it is about.
    pub node: u64,
    /// Who asks.
    pub uid: u32,
    /// See `uid`.
    pub gid: u32,
}

impl InHeader {
    /// Reads it from the beginning of a request.
    ///
    /// # Errors
    /// EINVAL when there is no header.
    pub fn parse(request: &[u8]) -> Result<(Self, Reader<'_>), Errno> {
        let mut reader = Reader(request);
        let header = Self {
            len: reader.u32()?,
            opcode: reader.u32()?,
            unique: reader.u64()?,
            node: reader.u64()?,
            uid: reader.u32()?,
            gid: reader.u32()?,
        };
        reader.skip(8)?;
        Ok((header, reader))
    }
}

/// What of a request has not been read yet. Every method fails with EINVAL when the request ends too early.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a>(pub &'a [u8]);

#[allow(clippy::missing_errors_doc)] // said once, above
impl<'a> Reader<'a> {
    /// A number.
    pub fn u32(&mut self) -> Result<u32, Errno> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(u32::from_le_bytes(*bytes))
    }

    /// A number.
    pub fn u64(&mut self) -> Result<u64, Errno> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*bytes))
    }

    /// What is of no interest.
    pub fn skip(&mut self, bytes: usize) -> Result<(), Errno> {
        self.bytes(bytes).map(drop)
    }

    /// So many bytes.
    pub fn bytes(&mut self, bytes: usize) -> Result<&'a [u8], Errno> {
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(taken)
    }

    /// Text up to a NUL.
    pub fn text(&mut self) -> Result<&'a std::ffi::CStr, Errno> {
        let text = std::ffi::CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.skip(text.count_bytes() + 1)?;
        Ok(text)
    }

    /// A name in a directory.
    pub fn name(&mut self) -> Result<Name<'a>, Errno> {
        Name::new(self.text()?)
    }
}

/// The body of a reply.
#[derive(Debug, Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    /// A writer behind the room for a header.
    pub fn reply() -> Self {
        Self(vec![0; OUT_HEADER])
    }

    /// A number.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// A number.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// A number.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Zeros.
    pub fn zeros(&mut self, bytes: usize) -> &mut Self {
        self.0.resize(self.0.len() + bytes, 0);
        self
    }

    /// Fills in the header of a reply. An error has no body.
    pub fn finish(mut self, unique: u64, error: Option<Errno>) -> Vec<u8> {
        if error.is_some() {
            self.0.truncate(OUT_HEADER);
        }
        let len = u32::try_from(self.0.len()).expect("replies are bounded far below this");
        let error = error.map_or(0, |errno| -errno.raw_os_error());
        let mut bytes = self.0;
        if let Some(header) = bytes.first_chunk_mut::<OUT_HEADER>() {
            header[..4].copy_from_slice(&len.to_le_bytes());
            header[4..8].copy_from_slice(&error.to_le_bytes());
            header[8..].copy_from_slice(&unique.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let mut writer = Writer::default();
        writer.u32(40).u32(1).u64(2).u64(3).u32(4).u32(5).u32(6).u32(0);
        let (header, rest) = InHeader::parse(&writer.0).unwrap();
        assert_eq!((header.len, header.opcode, header.unique), (40, 1, 2));
        assert_eq!((header.node, header.uid, header.gid), (3, 4, 5));
        assert!(rest.0.is_empty());
    }

    #[test]
    fn an_error_has_no_body() {
        let mut writer = Writer::reply();
        writer.u64(1);
        let reply = writer.finish(7, Some(Errno::NOENT));
        assert_eq!(reply, [16, 0, 0, 0, 254, 255, 255, 255, 7, 0, 0, 0, 0, 0, 0, 0]);
    }

    proptest! {
        #[test]
        fn no_bytes_are_read_twice_or_beyond_the_end(
            bytes in prop::collection::vec(any::<u8>(), 0..100),
            steps in prop::collection::vec(0..5_u8, 0..20),
        ) {
            let mut reader = Reader(&bytes);
            for step in steps {
                let before = reader.0.len();
                let (taken, done) = match step {
                    0 => (4, reader.u32().is_ok()),
                    1 => (8, reader.u64().is_ok()),
                    2 => (9, reader.skip(9).is_ok()),
                    3 => (0, { let mut copy = reader; copy.name().is_ok() }),
                    _ => match reader.text() {
                        Ok(text) => (text.count_bytes() + 1, true),
                        Err(_) => (0, false),
                    },
                };
                prop_assert_eq!(reader.0.len(), if done { before - taken } else { before });
            }
        }
    }
}
