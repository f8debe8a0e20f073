//! One entry of an archive, checked and owned: what the header says, not yet what it means in the tree.

use std::collections::BTreeMap;

use tar_core::parse::ParsedEntry;
use tar_core::{EntryType, PaxExtensions, SparseEntry};

use super::{EntryError, Error};
use crate::erofs::{Extent, Metadata, Special, Xattrs};
use crate::excerpt::excerpt_of_bytes;

/// What an entry is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File { size: u64 },
    SparseFile { size: u64, extents: Vec<Extent> },
    Directory,
    Symlink(Vec<u8>),
    HardLink(Vec<u8>),
    Special(Special),
}

#[derive(Debug)]
pub(super) struct Entry {
    /// As the archive has it.
    pub(super) name: Vec<u8>,
    pub(super) kind: Kind,
    pub(super) meta: Metadata,
    /// Attributes of namespaces that Linux does not have.
    pub(super) foreign_xattrs: u64,
    /// Bytes of content that follow the header.
    pub(super) stored: u64,
}

impl Entry {
    /// Checks and copies a parsed header. `sparse` is the size of a sparse file and its map.
    pub(super) fn new(
        parsed: &ParsedEntry<'_>,
        sparse: Option<(u64, Vec<SparseEntry>)>,
    ) -> Result<Self, Error> {
        Self::check(parsed, sparse)
            .map_err(|source| Error::Entry { name: excerpt_of_bytes(&parsed.path), source })
    }

    /// The name for messages.
    pub(super) fn display_name(&self) -> String {
        excerpt_of_bytes(&self.name)
    }

    fn check(parsed: &ParsedEntry<'_>, sparse: Option<(u64, Vec<SparseEntry>)>) -> Result<Self, EntryError> {
        let pax = Pax::new(parsed.pax.unwrap_or_default())?;
        let (xattrs, foreign_xattrs) = xattrs(parsed)?;
        let (seconds, nanoseconds) = match pax.mtime {
            Some(time) => time,
            // Base-256 fields are two's complement, and negative before 1970.
            None => (parsed.mtime.cast_signed(), 0),
        };
        let meta = Metadata {
            mode: u16::try_from(parsed.mode & 0o7777).expect("12 bits"),
            uid: narrow("uid", parsed.uid)?,
            gid: narrow("gid", parsed.gid)?,
            seconds,
            nanoseconds,
            xattrs,
        };
        let kind = kind(parsed, sparse)?;
        let stored = match &kind {
            Kind::File { size } => *size,
            Kind::SparseFile { extents, .. } => stored_sparse(parsed, extents, &pax)?,
            // As in Go's reader: these have no content, whatever the size field says.
            _ => 0,
        };
        Ok(Self { name: parsed.path.to_vec(), kind, meta, foreign_xattrs, stored })
    }
}

fn kind(parsed: &ParsedEntry<'_>, sparse: Option<(u64, Vec<SparseEntry>)>) -> Result<Kind, EntryError> {
    let target = || parsed.link_target.as_deref().unwrap_or_default().to_vec();
    let device = || (parsed.dev_major.unwrap_or(0), parsed.dev_minor.unwrap_or(0));
    if let Some((size, map)) = sparse
        && matches!(parsed.entry_type, EntryType::Regular | EntryType::Continuous | EntryType::GnuSparse)
    {
        let extents = map.into_iter().map(|SparseEntry { offset, length }| Extent { offset, length });
        return Ok(Kind::SparseFile { size, extents: extents.filter(|extent| extent.length > 0).collect() });
    }
    Ok(match parsed.entry_type {
        // Archives older than POSIX mark directories only by their name.
        EntryType::Regular if parsed.path.ends_with(b"/") && parsed.size == 0 => Kind::Directory,
        EntryType::Regular | EntryType::Continuous => Kind::File { size: parsed.size },
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => Kind::Symlink(target()),
        EntryType::Link => Kind::HardLink(target()),
        EntryType::Char => Kind::Special(Special::CharDevice(device().0, device().1)),
        EntryType::Block => Kind::Special(Special::BlockDevice(device().0, device().1)),
        EntryType::Fifo => Kind::Special(Special::Fifo),
        other => return Err(EntryError::Type { kind: char::from(other.to_byte()) }),
    })
}

/// The bytes of a sparse file that are stored: what its map names, and what the header says must be the same. tar-core
/// counts the map of format 1.0 as content when a PAX record gives the size.
fn stored_sparse(parsed: &ParsedEntry<'_>, extents: &[Extent], pax: &Pax) -> Result<u64, EntryError> {
    let mapped = extents.iter().try_fold(0u64, |sum, extent| sum.checked_add(extent.length));
    let mapped = mapped.unwrap_or(u64::MAX);
    let fits = if pax.map_in_content && pax.size.is_some() {
        mapped <= parsed.size && (parsed.size - mapped).is_multiple_of(512)
    } else {
        mapped == parsed.size
    };
    if fits { Ok(mapped) } else { Err(EntryError::SparseSize { mapped, stored: parsed.size }) }
}

fn xattrs(parsed: &ParsedEntry<'_>) -> Result<(Xattrs, u64), EntryError> {
    // The last record of a name counts.
    let sorted: BTreeMap<&[u8], &[u8]> =
        parsed.xattrs.iter().map(|(name, value)| (name.as_ref(), value.as_ref())).collect();
    let (mut xattrs, mut foreign) = (Xattrs::new(), 0);
    for (name, value) in sorted {
        if Xattrs::supports(name) {
            xattrs.add_below_overlay(name, value)?;
        } else {
            foreign += 1;
        }
    }
    Ok((xattrs, foreign))
}

/// The PAX records that tar-core does not give in full.
struct Pax {
    size: Option<u64>,
    mtime: Option<(i64, u32)>,
    /// Sparse format 1.0, where the map is in front of the data.
    map_in_content: bool,
}

impl Pax {
    fn new(records: &[u8]) -> Result<Self, EntryError> {
        let mut pax = Self { size: None, mtime: None, map_in_content: false };
        // tar-core has refused malformed records.
        for record in PaxExtensions::new(records).filter_map(Result::ok) {
            let value = record.value_bytes();
            match record.key_bytes() {
                b"size" => pax.size = Some(number("size", value)?),
                b"uid" => drop(number("uid", value)?),
                b"gid" => drop(number("gid", value)?),
                b"mtime" => pax.mtime = Some(time(value).ok_or_else(|| out_of_range("mtime", value))?),
                b"GNU.sparse.major" => pax.map_in_content = value == b"1",
                _ => {}
            }
        }
        Ok(pax)
    }
}

fn number(field: &'static str, value: &[u8]) -> Result<u64, EntryError> {
    let parsed = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
    parsed.ok_or_else(|| out_of_range(field, value))
}

fn narrow(field: &'static str, value: u64) -> Result<u32, EntryError> {
    u32::try_from(value).map_err(|_| EntryError::Number { field, value: value.to_string() })
}

fn out_of_range(field: &'static str, value: &[u8]) -> EntryError {
    EntryError::Number { field, value: excerpt_of_bytes(value) }
}

/// A decimal time, such as `-1.25`, as seconds and nanoseconds after them.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds));
    }
    Some((seconds, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_nanoseconds_and_may_be_before_1970() {
        for (text, expected) in [
            ("0", Some((0, 0))),
            ("1700000000.123456789", Some((1_700_000_000, 123_456_789))),
            ("1.5", Some((1, 500_000_000))),
            ("1.0000000019", Some((1, 1))),
            ("-1", Some((-1, 0))),
            ("-1.25", Some((-2, 750_000_000))),
            ("-0.5", Some((-1, 500_000_000))),
            ("1.", Some((1, 0))),
            ("", None),
            ("1.x", None),
            ("1.-5", None),
            ("99999999999999999999", None),
        ] {
            assert_eq!(time(text.as_bytes()), expected, "{text}");
        }
    }
}
