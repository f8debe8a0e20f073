//! Container image layers: a tar stream in, the entries of an EROFS image out.
//!
//! The headers are parsed by `tar-core` (ustar, GNU, PAX; sparse files in all four formats). What this module adds is what
//! an archive means as a layer, and suspicion: names cannot leave the root, nothing is followed, everything that an archive
//! can make large has a limit, and every refusal names the entry.

mod archive;
mod entry;
mod layer;
mod path;

use std::io;

use tar_core::parse::ParseError;

use crate::erofs;

pub(crate) use archive::{Listed, list};
pub use layer::{Report, append_layer};

/// How much one layer may ask for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Inodes and names, including directories that are only implied.
    pub entries: u64,
    /// Bytes of the uncompressed archive.
    pub archive_bytes: u64,
    /// Bytes of names and extended attributes, which stay in memory until the image is finished.
    pub metadata_bytes: u64,
    /// Bytes of a path or link target.
    pub path_bytes: u32,
    /// Bytes of all extension headers of one entry: long names, PAX records.
    pub header_bytes: u32,
    /// Runs of data in one sparse file.
    pub extents: usize,
}

impl Default for Limits {
    /// Several times what the largest public images have; a hostile layer at every limit costs about 700 MiB of memory.
    fn default() -> Self {
        Self {
            entries: 2_000_000,
            archive_bytes: 64 << 30,
            metadata_bytes: 256 << 20,
            path_bytes: 4095,
            header_bytes: 1 << 20,
            extents: 32_768,
        }
    }
}

/// Why a layer could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stream itself failed.
    #[error("reading the archive failed at byte {offset}")]
    Read {
        /// Bytes read before.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// It does not begin like a tar archive.
    #[error("this is not a tar archive: its first header is invalid")]
    NotTar(#[source] ParseError),
    /// There is not even one header in the stream.
    #[error("this is not a tar archive: it has only {length} bytes")]
    TooShort {
        /// Its length in bytes.
        length: usize,
    },
    /// A header makes no sense.
    #[error("the header at byte {offset}, after entry {previous:?}, is invalid")]
    Header {
        /// Where it starts.
        offset: u64,
        /// The entry before it.
        previous: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// A header with its extensions is larger than any limit on its parts allows.
    #[error("the header at byte {offset}, after entry {previous:?}, is longer than {limit} bytes")]
    HeaderTooLong {
        /// Where it starts.
        offset: u64,
        /// The entry before it.
        previous: String,
        /// The limit in bytes.
        limit: usize,
    },
    /// The archive is cut short.
    #[error("the archive ends at byte {offset}, in the middle of what follows entry {previous:?}")]
    Truncated {
        /// Its length in bytes.
        offset: u64,
        /// The last entry that was read whole.
        previous: String,
    },
    /// The archive is too long.
    #[error("the archive is longer than the limit of {limit} bytes; the last entry read was {previous:?}")]
    TooLong {
        /// The limit in bytes.
        limit: u64,
        /// The last entry.
        previous: String,
    },
    /// An entry was refused.
    #[error("entry {name:?} cannot be used")]
    Entry {
        /// Its name in the archive, lossily as text.
        name: String,
        /// Why.
        source: EntryError,
    },
    /// The image could not be written.
    #[error("writing the image failed at the end of the archive")]
    Image(#[source] erofs::Error),
}

/// Why one entry was refused.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    /// `..` beyond the root.
    #[error("its name leads out of the root")]
    Escapes,
    /// Something is put where the root directory is.
    #[error("the root can only be a directory")]
    Root,
    /// A parent is something else than a directory.
    #[error("its parent {parent:?} is {what}, which is not followed")]
    Parent {
        /// The parent's path.
        parent: String,
        /// What it is.
        what: &'static str,
    },
    /// A hard link to nothing.
    #[error("it is a hard link to {target:?}, which is not an earlier entry of this layer")]
    LinkToNothing {
        /// The target's name in the archive.
        target: String,
    },
    /// A hard link that leaves the root.
    #[error("it is a hard link to {target:?}, which leads out of the root")]
    LinkEscapes {
        /// The target's name in the archive.
        target: String,
    },
    /// A hard link to a directory.
    #[error("it is a hard link to {target:?}, which is a directory")]
    LinkToDirectory {
        /// The target's name in the archive.
        target: String,
    },
    /// A whiteout of nothing.
    #[error("it is a whiteout without the name of a file")]
    Whiteout,
    /// A number that a file cannot have.
    #[error("its {field} {value:?} is not a number in range")]
    Number {
        /// Which one.
        field: &'static str,
        /// As it was given.
        value: String,
    },
    /// The map of a sparse file and its content do not fit together.
    #[error("its sparse map covers {mapped} bytes, but {stored} are stored")]
    SparseSize {
        /// Bytes that the map names.
        mapped: u64,
        /// Bytes that follow the header.
        stored: u64,
    },
    /// A type that no root file system has.
    #[error("its type {kind:?} is not one that a layer may have")]
    Type {
        /// The type flag as a character.
        kind: char,
    },
    /// More entries than allowed.
    #[error("the layer has more than {limit} files and directories")]
    TooMany {
        /// The limit.
        limit: u64,
    },
    /// More metadata than allowed.
    #[error("names and extended attributes of the layer exceed {limit} bytes")]
    TooMuchMetadata {
        /// The limit in bytes.
        limit: u64,
    },
    /// The image cannot hold it, or writing or reading failed.
    #[error(transparent)]
    Image(#[from] erofs::Error),
}
