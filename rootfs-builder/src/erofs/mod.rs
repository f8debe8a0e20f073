//! An EROFS writer: entries in, an uncompressed read-only file system out, without unpacking anything anywhere.
//!
//! Content is written to the image as it arrives; only names and metadata stay in memory, about 200 bytes for each entry.
//! An image is block 0 with the superblock, the content of files in blocks of 4 KiB, the directories that are larger than
//! a block, and then all inodes, each with its extended attributes and the last, partial block of its content. Content
//! lies on page boundaries, so that the guests which map the same image share it through the host's page cache. The same
//! calls make the same bytes.
//!
//! No crate served: `erofs-rs` only reads, and `composefs` writes images that hold metadata and refer to content elsewhere.

mod builder;
mod content;
mod directory;
mod format;
mod layout;
mod tree;
mod xattr;

use std::io;

pub use builder::{Builder, Options, Summary};
pub use content::Extent;
pub use format::{BLOCK, BLOCK_BYTES, FILE_MAX, NAME_MAX, image_size};
pub use tree::{FileType, Metadata, NodeId, Special};
pub use xattr::Xattrs;

/// Longest target of a symbolic link in bytes: `PATH_MAX` without its terminating zero.
pub const SYMLINK_MAX: usize = 4095;

/// Why an image could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Writing the image failed.
    #[error("writing the image failed; check the free space")]
    Write(#[source] io::Error),
    /// Writing or reading the scratch file failed.
    #[error("using the scratch file beside the image failed")]
    Scratch(#[source] io::Error),
    /// Reading content failed.
    #[error("reading the content failed")]
    Read(#[source] io::Error),
    /// There was less content than announced.
    #[error("the content ends before its announced size")]
    ContentEnds,
    /// The image would be larger than its limit.
    #[error("the image would be larger than its limit of {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// A file is larger than the format allows.
    #[error("a file of {size} bytes is larger than the limit of {FILE_MAX} bytes")]
    FileTooLarge {
        /// Its size in bytes.
        size: u64,
    },
    /// More than 2^32 inodes.
    #[error("too many inodes for one image")]
    TooManyNodes,
    /// A name that no Linux file system can hold.
    #[error("{name:?} is not a valid file name: {reason}")]
    Name {
        /// The name, lossily as text.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A symbolic link without a target or with one that is too long.
    #[error(
        "the target of a symbolic link is {length} bytes long, not 1 to {SYMLINK_MAX} without a zero byte"
    )]
    SymlinkTarget {
        /// Its length in bytes.
        length: usize,
    },
    /// A device number that Linux cannot represent.
    #[error("device number {major}:{minor} is out of range")]
    Device {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// A second name for a directory.
    #[error("a directory cannot have hard links")]
    DirectoryLink,
    /// An entry below something that is not a directory.
    #[error("the parent is not a directory")]
    ParentNotDirectory,
    /// An extended attribute that cannot be stored.
    #[error("extended attribute {name:?} cannot be stored: {reason}")]
    Xattr {
        /// Its name, lossily as text.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A map of a sparse file that is out of order or out of bounds.
    #[error("sparse map: {length} bytes at {offset} are out of order or beyond the file's end at {size}")]
    SparseMap {
        /// Start of the offending extent in bytes.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// Size of the file in bytes.
        size: u64,
    },
}
