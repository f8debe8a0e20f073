//! The data area of an image: file content goes to it as it arrives, and what belongs beside the inodes to a scratch file.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use super::Error;
use super::format::{BLOCK, BLOCK_BYTES, FILE_MAX, HOLE, INODE_BYTES, Layout};

/// Longest array of chunk addresses, 1 MiB on disk. Files for which it does not suffice get larger chunks.
const MAX_CHUNKS: u64 = 1 << 18;
/// Zeros longer than this become a hole of the image file instead of being written.
const LONGEST_ZEROS: usize = 64 << 10;
const BUFFER_BYTES: usize = 256 << 10;

/// A run of data in a sparse file; what lies between two of them is zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts in the file, in bytes.
    pub offset: u64,
    /// How many bytes it has.
    pub length: u64,
}

/// Where the content of a file or symbolic link is.
#[derive(Clone, Debug)]
pub(super) struct Content {
    pub(super) size: u64,
    pub(super) layout: Layout,
    /// First block of a flat layout.
    pub(super) block: u32,
    /// What follows the inode, a tail or chunk addresses: offset in the scratch file, and length in bytes.
    pub(super) beside: (u64, u32),
}

/// The output while it grows block by block, with the scratch file.
pub(super) struct DataArea {
    output: BufWriter<File>,
    scratch: BufWriter<File>,
    /// Bytes of the output so far, holes included.
    written: u64,
    scratched: u64,
    limit: u64,
    buffer: Box<[u8]>,
}

impl DataArea {
    /// Starts after block 0, which is the superblock's. At most `limit` bytes, the content of both files together.
    pub(super) fn new(output: File, scratch: File, limit: u64) -> Result<Self, Error> {
        let mut area = Self {
            output: BufWriter::with_capacity(BUFFER_BYTES, output),
            scratch: BufWriter::with_capacity(BUFFER_BYTES, scratch),
            written: 0,
            scratched: 0,
            limit,
            buffer: vec![0; BUFFER_BYTES].into(),
        };
        area.zeros(BLOCK)?;
        Ok(area)
    }

    /// Stores `size` bytes of `data`, the tail beside the inode if the block of the inode has room for it.
    pub(super) fn store(
        &mut self,
        size: u64,
        xattr_bytes: usize,
        data: &mut dyn Read,
    ) -> Result<Content, Error> {
        let tail = usize::try_from(size % BLOCK).expect("less than a block");
        let inline = tail != 0 && INODE_BYTES + xattr_bytes + tail <= BLOCK_BYTES;
        self.reserve(size)?;
        let block = self.next_block()?;
        let whole = if inline { size - tail as u64 } else { size };
        self.copy(whole, data)?;
        if !inline {
            self.fill_block()?;
            return Ok(Content { size, layout: Layout::FlatPlain, block, beside: (0, 0) });
        }
        let mut bytes = [0; BLOCK_BYTES];
        read_exact(data, &mut bytes[..tail])?;
        Ok(Content { size, layout: Layout::FlatInline, block, beside: self.put_aside(&bytes[..tail])? })
    }

    /// Stores a sparse file of `size` bytes; `data` holds the extents one after the other.
    pub(super) fn store_sparse(
        &mut self,
        size: u64,
        extents: &[Extent],
        data: &mut dyn Read,
    ) -> Result<Content, Error> {
        check_extents(size, extents)?;
        let bits =
            (0..32u8).find(|bits| size.div_ceil(BLOCK << bits) <= MAX_CHUNKS).expect("size is bounded");
        let chunk = BLOCK << bits;
        let count = usize::try_from(size.div_ceil(chunk)).expect("at most MAX_CHUNKS");
        let mut addresses = vec![HOLE; count];
        let mut last = None;
        let mut end = self.written;
        for extent in extents.iter().filter(|extent| extent.length > 0) {
            let (mut at, stop) = (extent.offset, extent.offset + extent.length);
            while at < stop {
                let index = at / chunk;
                let start = index * chunk;
                let length = chunk.min(size - start);
                if last != Some(index) {
                    self.zeros(end - self.written)?;
                    self.reserve(length)?;
                    end = self.written + length.next_multiple_of(BLOCK);
                    addresses[usize::try_from(index).expect("at most MAX_CHUNKS")] = self.next_block()?;
                    last = Some(index);
                }
                let chunk_at = end - length.next_multiple_of(BLOCK);
                self.zeros(chunk_at + (at - start) - self.written)?;
                let piece = stop.min(start + length) - at;
                self.copy(piece, data)?;
                at += piece;
            }
        }
        self.zeros(end - self.written)?;
        let array: Vec<u8> = addresses.into_iter().flat_map(u32::to_le_bytes).collect();
        let beside = self.put_aside(&array)?;
        Ok(Content { size, layout: Layout::Chunked { bits }, block: 0, beside })
    }

    /// The address of the block that is written next; the area ends on a block boundary.
    pub(super) fn next_block(&self) -> Result<u32, Error> {
        u32::try_from(self.written / BLOCK).map_err(|_| Error::TooLarge { limit: FILE_MAX })
    }

    /// Appends bytes.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.reserve(bytes.len() as u64)?;
        self.output.write_all(bytes).map_err(Error::Write)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Appends zeros up to the next block boundary.
    pub(super) fn fill_block(&mut self) -> Result<(), Error> {
        self.zeros(self.written.next_multiple_of(BLOCK) - self.written)
    }

    /// Appends what was put aside for an inode.
    pub(super) fn append_beside(&mut self, (offset, length): (u64, u32)) -> Result<(), Error> {
        self.scratch.flush().map_err(Error::Scratch)?;
        let mut bytes = vec![0; length as usize];
        self.scratch.get_ref().read_exact_at(&mut bytes, offset).map_err(Error::Scratch)?;
        self.append(&bytes)
    }

    /// Appends `count` zeros.
    pub(super) fn zeros(&mut self, count: u64) -> Result<(), Error> {
        static ZEROS: [u8; LONGEST_ZEROS] = [0; LONGEST_ZEROS];
        match usize::try_from(count) {
            Ok(count) if count <= LONGEST_ZEROS => self.append(&ZEROS[..count]),
            _ => {
                self.reserve(count)?;
                let by = i64::try_from(count).map_err(|_| Error::TooLarge { limit: self.limit })?;
                self.output.seek(SeekFrom::Current(by)).map_err(Error::Write)?;
                self.written += count;
                Ok(())
            }
        }
    }

    /// Writes block 0 and gives back the output, whose length is a whole number of blocks.
    pub(super) fn finish(mut self, first_block: &[u8; BLOCK_BYTES]) -> Result<(File, u64), Error> {
        self.fill_block()?;
        let output = self.output.into_inner().map_err(|error| Error::Write(error.into_error()))?;
        output.set_len(self.written).map_err(Error::Write)?;
        output.write_all_at(first_block, 0).map_err(Error::Write)?;
        Ok((output, self.written))
    }

    fn copy(&mut self, mut count: u64, data: &mut dyn Read) -> Result<(), Error> {
        while count > 0 {
            let length = usize::try_from(count).unwrap_or(usize::MAX).min(self.buffer.len());
            let mut buffer = std::mem::take(&mut self.buffer);
            let read = read_exact(data, &mut buffer[..length]).and_then(|()| self.append(&buffer[..length]));
            self.buffer = buffer;
            read?;
            count -= length as u64;
        }
        Ok(())
    }

    fn put_aside(&mut self, bytes: &[u8]) -> Result<(u64, u32), Error> {
        self.reserve(bytes.len() as u64)?;
        self.scratch.write_all(bytes).map_err(Error::Scratch)?;
        let offset = self.scratched;
        self.scratched += bytes.len() as u64;
        Ok((offset, u32::try_from(bytes.len()).expect("at most 1 MiB")))
    }

    fn reserve(&self, count: u64) -> Result<(), Error> {
        let size = self.written.checked_add(self.scratched).and_then(|sum| sum.checked_add(count));
        if size.is_some_and(|size| size <= self.limit) {
            Ok(())
        } else {
            Err(Error::TooLarge { limit: self.limit })
        }
    }
}

fn read_exact(data: &mut dyn Read, buffer: &mut [u8]) -> Result<(), Error> {
    data.read_exact(buffer).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::ContentEnds,
        _ => Error::Read(error),
    })
}

fn check_extents(size: u64, extents: &[Extent]) -> Result<(), Error> {
    let mut end = 0u64;
    for extent in extents {
        let stop = extent.offset.checked_add(extent.length).filter(|stop| *stop <= size);
        match stop {
            Some(stop) if extent.offset >= end => end = stop,
            _ => return Err(Error::SparseMap { offset: extent.offset, length: extent.length, size }),
        }
    }
    Ok(())
}
