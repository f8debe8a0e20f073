//! The on-disk structures of EROFS, as `Documentation/filesystems/erofs.rst` and `fs/erofs/erofs_fs.h` of Linux define
//! them. All integers are little-endian.

use super::tree::FileType;

/// Size of a block in bytes: the page size of every host and guest that Bulkhead runs on, so that a block of the image is
/// a page of the page cache.
pub const BLOCK: u64 = 4096;
/// [`BLOCK`] as the size of a buffer.
pub const BLOCK_BYTES: usize = 4096;
const BLOCK_BITS: u8 = 12;

/// Where the superblock starts.
const SUPER_OFFSET: usize = 1024;
const SUPER_MAGIC: u32 = 0xe0f5_e1e2;
const COMPAT_SB_CHKSUM: u32 = 0x1;
const COMPAT_MTIME: u32 = 0x2;
const INCOMPAT_CHUNKED_FILE: u32 = 0x4;

/// Inodes start at multiples of this; a node number counts them from the start of the metadata area.
pub(super) const INODE_SLOT: u64 = 32;
/// Size of an extended inode. Compact ones have no time of their own, which the files of a layer need.
pub(super) const INODE_BYTES: usize = 64;
/// Size of a directory entry without its name.
pub(super) const DIRENT_BYTES: usize = 12;
/// Longest file name in bytes.
pub const NAME_MAX: usize = 255;
/// The block address that means a hole in a chunk-based file.
pub(super) const HOLE: u32 = u32::MAX;
/// Largest file in bytes: as many blocks as a 32-bit address can name.
pub const FILE_MAX: u64 = BLOCK << 32;

/// How the content of an inode is found (`i_format`, bits 1 to 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// Consecutive blocks.
    FlatPlain,
    /// Consecutive blocks, but the last, partial one follows the inode.
    FlatInline,
    /// An array of block addresses follows the inode, one for each chunk of `BLOCK << bits` bytes.
    Chunked {
        /// Chunk size as a shift of the block size, at most 31.
        bits: u8,
    },
}

/// What an extended inode holds.
pub(super) struct Inode {
    pub(super) layout: Layout,
    /// Bytes of extended attributes after the inode, header included: 0, or 12 and a multiple of four.
    pub(super) xattr_bytes: usize,
    /// Type and permissions, as in `st_mode`.
    pub(super) mode: u16,
    pub(super) size: u64,
    /// First block, or the device number in the encoding of [`device_number`]; unused by chunked files.
    pub(super) address: u32,
    pub(super) number: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) seconds: i64,
    pub(super) nanoseconds: u32,
    pub(super) links: u32,
}

impl Inode {
    /// The inode as `struct erofs_inode_extended`.
    pub(super) fn encode(&self) -> [u8; INODE_BYTES] {
        let (layout, address) = match self.layout {
            Layout::FlatPlain => (0, self.address),
            Layout::FlatInline => (2, self.address),
            Layout::Chunked { bits } => (4, u32::from(bits)),
        };
        let xattr_count = if self.xattr_bytes == 0 { 0 } else { (self.xattr_bytes - 12) / 4 + 1 };
        let mut raw = [0; INODE_BYTES];
        put(&mut raw, 0, &(1u16 | layout << 1).to_le_bytes());
        put(&mut raw, 2, &u16::try_from(xattr_count).expect("bounded by Xattrs").to_le_bytes());
        put(&mut raw, 4, &self.mode.to_le_bytes());
        put(&mut raw, 8, &self.size.to_le_bytes());
        put(&mut raw, 16, &address.to_le_bytes());
        put(&mut raw, 20, &self.number.to_le_bytes());
        put(&mut raw, 24, &self.uid.to_le_bytes());
        put(&mut raw, 28, &self.gid.to_le_bytes());
        put(&mut raw, 32, &self.seconds.to_le_bytes());
        put(&mut raw, 40, &self.nanoseconds.to_le_bytes());
        put(&mut raw, 44, &self.links.to_le_bytes());
        raw
    }
}

/// What differs between the superblocks of two images.
pub(super) struct Superblock {
    pub(super) root: u16,
    pub(super) inodes: u64,
    pub(super) blocks: u32,
    pub(super) meta_block: u32,
    pub(super) uuid: [u8; 16],
    pub(super) chunked_files: bool,
}

impl Superblock {
    /// Block 0 of the image: the superblock at its offset, with its checksum.
    pub(super) fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        let raw = &mut block[SUPER_OFFSET..];
        put(raw, 0, &SUPER_MAGIC.to_le_bytes());
        put(raw, 8, &(COMPAT_SB_CHKSUM | COMPAT_MTIME).to_le_bytes());
        raw[12] = BLOCK_BITS;
        put(raw, 14, &self.root.to_le_bytes());
        put(raw, 16, &self.inodes.to_le_bytes());
        put(raw, 36, &self.blocks.to_le_bytes());
        put(raw, 40, &self.meta_block.to_le_bytes());
        put(raw, 48, &self.uuid);
        put(raw, 80, &(if self.chunked_files { INCOMPAT_CHUNKED_FILE } else { 0 }).to_le_bytes());
        let checksum = superblock_checksum(raw);
        put(raw, 4, &checksum.to_le_bytes());
        block
    }
}

/// Whether `block`, the first block of a file, holds an intact superblock, and how many bytes long the image then is.
///
/// This is the cheap check for a truncated or overwritten image; it reads nothing beyond the block.
pub fn image_size(block: &[u8; BLOCK_BYTES]) -> Option<u64> {
    let mut raw = block[SUPER_OFFSET..].to_vec();
    let field = |at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
    let (magic, checksum, blocks) = (field(0), field(4), field(36));
    put(&mut raw, 4, &[0; 4]);
    (magic == SUPER_MAGIC && checksum == superblock_checksum(&raw)).then(|| u64::from(blocks) * BLOCK)
}

/// A directory entry, `struct erofs_dirent`.
pub(super) fn dirent(node: u64, name_offset: u16, kind: FileType) -> [u8; DIRENT_BYTES] {
    let mut raw = [0; DIRENT_BYTES];
    put(&mut raw, 0, &node.to_le_bytes());
    put(&mut raw, 8, &name_offset.to_le_bytes());
    raw[10] = kind.dirent_type();
    raw
}

/// A device number as the kernel's `new_encode_dev` writes it: 12 bits of major and 20 of minor.
pub(super) fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// CRC-32C with the initial value of all ones and, as the kernel's `crc32c()`, no final inversion.
fn superblock_checksum(bytes: &[u8]) -> u32 {
    const CASTAGNOLI_REFLECTED: u32 = 0x82f6_3b78;
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (CASTAGNOLI_REFLECTED & (crc & 1).wrapping_neg())
        })
    })
}

fn put(raw: &mut [u8], at: usize, bytes: &[u8]) {
    raw[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_is_crc32c_without_the_final_inversion() {
        // The check value of CRC-32C (RFC 3720, appendix B.4) is 0xe3069283.
        assert_eq!(!superblock_checksum(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn superblock_is_recognised_until_a_bit_flips() {
        let superblock =
            Superblock { root: 1, inodes: 3, blocks: 7, meta_block: 2, uuid: [5; 16], chunked_files: true };
        let mut block = superblock.encode();
        assert_eq!(image_size(&block), Some(7 * BLOCK));
        block[SUPER_OFFSET + 37] ^= 1;
        assert_eq!(image_size(&block), None);
    }

    #[test]
    fn device_numbers_keep_wide_majors_and_minors() {
        assert_eq!(device_number(0, 0), 0);
        assert_eq!(device_number(1, 3), 0x103);
        assert_eq!(device_number(0xfff, 0xf_ffff), 0xffff_ffff);
        assert_eq!(device_number(8, 0x1_23ab), 0x1230_08ab);
    }
}
