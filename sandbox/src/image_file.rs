//! What a disk image holds, told from the magic numbers of the few formats that are accepted and never guessed otherwise, and
//! whether all of it is there.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Both formats keep their superblock here.
const SUPERBLOCK: u64 = 1024;

/// A format that guests can mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Read-only, made by `mkfs.erofs` or by the rootfs builder.
    Erofs,
    /// Made by `mke2fs`.
    Ext4,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageFileError {
    /// It cannot be opened or read.
    #[error("cannot read the image {0}")]
    Read(PathBuf, #[source] io::Error),
    /// It is in no known format.
    #[error("{0} is neither an EROFS nor an ext4 image")]
    Unknown(PathBuf),
    /// The end is missing.
    #[error("{path} is truncated: it should have {expected} bytes and has {actual}; make it again")]
    Truncated {
        /// The image.
        path: PathBuf,
        /// What its superblock says.
        expected: u64,
        /// What there is.
        actual: u64,
    },
}

/// Opens an image for reading and tells its format.
///
/// # Errors
/// [`ImageFileError`] when the file cannot be read, is in another format or lacks its end.
pub fn open(path: &Path) -> Result<(File, Format), ImageFileError> {
    let failed = |e| ImageFileError::Read(path.to_owned(), e);
    let file = File::open(path).map_err(failed)?;
    // Of a block device, whose metadata has none, as well.
    let actual = (&file).seek(SeekFrom::End(0)).map_err(failed)?;
    let mut superblock = [0; 1024];
    match file.read_exact_at(&mut superblock, SUPERBLOCK) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(ImageFileError::Unknown(path.to_owned()));
        }
        Err(e) => return Err(failed(e)),
    }
    let (format, expected) = identify(&superblock).ok_or_else(|| ImageFileError::Unknown(path.to_owned()))?;
    if actual < expected {
        return Err(ImageFileError::Truncated { path: path.to_owned(), expected, actual });
    }
    Ok((file, format))
}

/// The format and the size in bytes that a superblock speaks of.
fn identify(superblock: &[u8; 1024]) -> Option<(Format, u64)> {
    let u32_at = |at: usize| {
        u32::from_le_bytes([superblock[at], superblock[at + 1], superblock[at + 2], superblock[at + 3]])
    };
    // fs/erofs/erofs_fs.h: magic, blkszbits, blocks.
    if u32_at(0) == 0xe0f5_e1e2 {
        return size(u32_at(36).into(), superblock[12].into()).map(|size| (Format::Erofs, size));
    }
    // fs/ext4/ext4.h: s_magic, s_log_block_size, s_blocks_count_lo and, with INCOMPAT_64BIT, s_blocks_count_hi.
    if superblock[0x38..0x3a] == [0x53, 0xef] {
        let high = if u32_at(0x60) & 0x80 == 0 { 0 } else { u32_at(0x150) };
        let blocks = u64::from(high) << 32 | u64::from(u32_at(4));
        return size(blocks, u32_at(0x18).checked_add(10)?).map(|size| (Format::Ext4, size));
    }
    None
}

/// Blocks of a size between 512 bytes and 64 KiB.
fn size(blocks: u64, block_bits: u32) -> Option<u64> {
    if (9..=16).contains(&block_bits) { blocks.checked_mul(1 << block_bits) } else { None }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    fn erofs(blocks: u32) -> Vec<u8> {
        let mut image = vec![0; 8192];
        image[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        image[1036] = 12;
        image[1060..1064].copy_from_slice(&blocks.to_le_bytes());
        image
    }

    fn opened(content: &[u8]) -> Result<Format, ImageFileError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), content).unwrap();
        open(file.path()).map(|(_, format)| format)
    }

    #[test]
    fn erofs_and_ext4_are_told_by_their_magic() {
        assert_eq!(opened(&erofs(2)).unwrap(), Format::Erofs);
        let mut ext4 = vec![0; 8192];
        ext4[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xef]);
        ext4[1028] = 8;
        assert_eq!(opened(&ext4).unwrap(), Format::Ext4);
    }

    #[test]
    fn an_image_without_its_end_is_refused_with_both_sizes() {
        let error = opened(&erofs(3)).unwrap_err();
        assert!(error.to_string().contains("12288 bytes and has 8192"), "{error}");
    }

    #[test]
    fn other_content_is_refused() {
        for content in [&b""[..], b"#!/bin/sh\n", &[0; 8192]] {
            assert!(matches!(opened(content), Err(ImageFileError::Unknown(_))));
        }
        let missing = open(Path::new("/nonexistent/image")).unwrap_err();
        assert!(matches!(missing, ImageFileError::Read(..)));
    }

    proptest! {
        #[test]
        fn any_superblock_is_refused_or_has_a_size(mut bytes in proptest::array::uniform32(any::<u8>()), ext4 in any::<bool>()) {
            let mut superblock = [0; 1024];
            if ext4 { superblock[0x38..0x3a].copy_from_slice(&[0x53, 0xef]) } else { bytes[..4].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes()) }
            superblock[..32].copy_from_slice(&bytes);
            let _ = identify(&superblock);
        }
    }
}
