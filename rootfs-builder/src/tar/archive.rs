//! Reads a tar stream entry by entry, with a buffer that no archive can make grow without bound.

use std::io::{self, Read};

use tar_core::parse::{ParseEvent, Parser};

use super::entry::{Entry, Kind};
use super::path::components;
use super::{Error, Limits};

const BLOCK: u64 = 512;
/// How much is asked of the stream at once.
const READ_BYTES: usize = 128 << 10;

/// A tar stream.
pub(super) struct Archive<R> {
    source: R,
    parser: Parser,
    limits: Limits,
    buffer: Vec<u8>,
    /// The part of the buffer that was read and not yet used.
    start: usize,
    end: usize,
    /// Bytes of the stream that were used.
    position: u64,
    /// Bytes left of the current entry's content, and of the padding behind it.
    content: u64,
    padding: u64,
    /// Name of the last entry, for messages.
    previous: String,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(source: R, limits: Limits) -> Self {
        let mut parser = Parser::new(tar_core::parse::Limits {
            max_metadata_size: limits.header_bytes,
            max_path_len: Some(limits.path_bytes),
            max_sparse_entries: limits.extents,
            ..tar_core::parse::Limits::default()
        });
        // Times before 1970 are errors to tar-core; `Entry` checks the values itself.
        parser.set_ignore_pax_errors(true);
        Self {
            source,
            parser,
            limits,
            buffer: vec![0; READ_BYTES],
            start: 0,
            end: 0,
            position: 0,
            content: 0,
            padding: 0,
            previous: String::new(),
        }
    }

    /// The next entry, whose content is then read from `self`; nothing at the end of the archive.
    pub(super) fn next(&mut self) -> Result<Option<Entry>, Error> {
        self.skip_content()?;
        // The map of a sparse file has two numbers of at most 20 digits for each extent.
        let longest = 2 * self.limits.header_bytes as usize + 48 * self.limits.extents + READ_BYTES;
        loop {
            let event = self.parser.parse(&self.buffer[self.start..self.end]);
            match event {
                Ok(ParseEvent::NeedData { min_bytes }) => {
                    // tar-core may ask for no more than there is: it has not found the end of a line.
                    let available = self.end - self.start;
                    let wanted = min_bytes.max(available + 1);
                    if wanted > longest {
                        let previous = self.previous.clone();
                        return Err(Error::HeaderTooLong { offset: self.position, previous, limit: longest });
                    }
                    if !self.fill(wanted)? {
                        return if self.at_end() { Ok(None) } else { Err(self.truncated()) };
                    }
                }
                Ok(ParseEvent::GlobalExtensions { consumed, .. }) => self.advance(consumed)?,
                Ok(ParseEvent::End { consumed }) => {
                    self.advance(consumed)?;
                    return Ok(None);
                }
                Ok(ParseEvent::Entry { consumed, entry }) => {
                    let entry = Entry::new(&entry, None);
                    return self.begin(entry, consumed).map(Some);
                }
                Ok(ParseEvent::SparseEntry { consumed, entry, sparse_map, real_size }) => {
                    let entry = Entry::new(&entry, Some((real_size, sparse_map)));
                    return self.begin(entry, consumed).map(Some);
                }
                Err(source) if self.position == 0 => return Err(Error::NotTar(source)),
                Err(source) => {
                    return Err(Error::Header {
                        offset: self.position,
                        previous: self.previous.clone(),
                        source,
                    });
                }
            }
        }
    }

    /// Reads what follows the end of the archive, so that digests of the stream cover it.
    pub(super) fn drain(&mut self) -> Result<(), Error> {
        loop {
            self.advance(self.end - self.start)?;
            if !self.fill(1)? {
                return Ok(());
            }
        }
    }

    fn begin(&mut self, entry: Result<Entry, Error>, consumed: usize) -> Result<Entry, Error> {
        let entry = entry?;
        self.advance(consumed)?;
        self.content = entry.stored;
        self.padding = (BLOCK - entry.stored % BLOCK) % BLOCK;
        self.previous = entry.display_name();
        Ok(entry)
    }

    fn skip_content(&mut self) -> Result<(), Error> {
        let mut left = self.content.checked_add(self.padding).ok_or_else(|| self.too_long())?;
        (self.content, self.padding) = (0, 0);
        while left > 0 {
            if self.start == self.end && !self.fill(1)? {
                return Err(self.truncated());
            }
            let step = left.min((self.end - self.start) as u64);
            self.advance(usize::try_from(step).expect("within the buffer"))?;
            left -= step;
        }
        Ok(())
    }

    /// Whether a stream that ends here ends well: writers may leave out the two empty blocks at the end.
    fn at_end(&self) -> bool {
        let rest = &self.buffer[self.start..self.end];
        self.position + rest.len() as u64 > 0 && rest.iter().all(|byte| *byte == 0)
    }

    /// Makes at least `wanted` bytes available; false if the stream ends before. Asks for more each time, so that a header
    /// which is parsed again and again is not looked at more than a few times.
    fn fill(&mut self, wanted: usize) -> Result<bool, Error> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let goal = wanted.max(2 * self.end);
        if self.buffer.len() < goal {
            self.buffer.resize(goal, 0);
        }
        while self.end < goal {
            match self.source.read(&mut self.buffer[self.end..]) {
                Ok(0) => break,
                Ok(count) => self.end += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(Error::Read { offset: self.position + self.end as u64, source }),
            }
        }
        Ok(self.end >= wanted)
    }

    fn advance(&mut self, count: usize) -> Result<(), Error> {
        self.start += count;
        self.position += count as u64;
        if self.position > self.limits.archive_bytes { Err(self.too_long()) } else { Ok(()) }
    }

    fn too_long(&self) -> Error {
        Error::TooLong { limit: self.limits.archive_bytes, previous: self.previous.clone() }
    }

    fn truncated(&self) -> Error {
        if self.position == 0 {
            return Error::TooShort { length: self.end - self.start };
        }
        let offset = self.position + (self.end - self.start) as u64;
        Error::Truncated { offset, previous: self.previous.clone() }
    }
}

/// The content of the current entry.
impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.content).unwrap_or(usize::MAX).min(buffer.len());
        let count = if wanted == 0 {
            0
        } else if self.start < self.end {
            let count = wanted.min(self.end - self.start);
            buffer[..count].copy_from_slice(&self.buffer[self.start..self.start + count]);
            self.start += count;
            count
        } else {
            self.source.read(&mut buffer[..wanted])?
        };
        self.content -= count as u64;
        self.position += count as u64;
        Ok(count)
    }
}

/// A file of an archive that is used in place.
pub(crate) enum Listed {
    /// Where its content is in the archive, and its size, in bytes.
    File { offset: u64, size: u64 },
    /// The name of the file that a hard or symbolic link leads to.
    Link(String),
}

/// The files and links of an archive by their normalised names. Names that leave the root or are not UTF-8 are left out:
/// nothing asks for them.
pub(crate) fn list(
    source: impl Read,
    limits: &Limits,
) -> impl Iterator<Item = Result<(String, Listed), Error>> {
    let mut archive = Archive::new(source, *limits);
    std::iter::from_fn(move || {
        loop {
            let entry = match archive.next() {
                Ok(entry) => entry?,
                Err(error) => return Some(Err(error)),
            };
            let offset = archive.position;
            if let Some(found) = listed(&entry, offset) {
                return Some(Ok(found));
            }
        }
    })
}

fn listed(entry: &Entry, offset: u64) -> Option<(String, Listed)> {
    let name = normalise(&entry.name)?;
    let found = match &entry.kind {
        Kind::File { size } => Listed::File { offset, size: *size },
        Kind::HardLink(target) => Listed::Link(normalise(target)?),
        Kind::Symlink(target) if target.starts_with(b"/") => return None,
        Kind::Symlink(target) => {
            let parent = name.rsplit_once('/').map_or("", |(parent, _)| parent);
            Listed::Link(normalise(&[parent.as_bytes(), b"/", target].concat())?)
        }
        _ => return None,
    };
    Some((name, found))
}

fn normalise(name: &[u8]) -> Option<String> {
    String::from_utf8(components(name)?.join(&b'/')).ok()
}
