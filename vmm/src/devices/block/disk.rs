//! Files as one range of sectors, read and written straight from and to guest memory.

use std::collections::VecDeque;
use std::fs::File;
use std::io;

use vm_memory::VolatileSlice;

use super::{SECTOR, gpt};
use crate::devices::transfer::{Direction, take_front, transfer};

/// Why files do not make a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A descriptor that was meant to be a file or a block device says nothing of its size.
    #[error("cannot tell the size of a disk's file")]
    Size(#[source] io::Error),
    /// Nothing to read.
    #[error("a disk's file is empty")]
    Empty,
    /// Together the files are too many or too large.
    #[error("the disk's files do not fit behind one partition table")]
    Layout,
}

/// A piece of the disk: so many sectors from `start`.
#[derive(Debug)]
struct Extent {
    start: u64,
    sectors: u64,
    /// Size of the file in bytes; a last sector that the file does not fill reads as zeros.
    bytes: u64,
    file: File,
}

/// The disk.
#[derive(Debug)]
pub struct Disk {
    head: Vec<u8>,
    extents: Vec<Extent>,
    sectors: u64,
    read_only: bool,
}

impl Disk {
    /// One file is the whole disk.
    ///
    /// # Errors
    /// [`DiskError`] when it is empty, or no file.
    pub fn whole(file: File, read_only: bool) -> Result<Self, DiskError> {
        let extent = Extent::new(file)?;
        Ok(Self { head: Vec::new(), sectors: extent.sectors, extents: vec![extent], read_only })
    }

    /// Each file is a partition, in order; read-only.
    ///
    /// # Errors
    /// [`DiskError`] when one is empty or no file, or there are none or too many.
    pub fn partitions(files: Vec<File>) -> Result<Self, DiskError> {
        let mut extents = files.into_iter().map(Extent::new).collect::<Result<Vec<_>, _>>()?;
        let lengths: Vec<u64> = extents.iter().map(|extent| extent.sectors).collect();
        let table = gpt::lay_out(&lengths).ok_or(DiskError::Layout)?;
        for (extent, start) in extents.iter_mut().zip(&table.starts) {
            extent.start = *start;
        }
        Ok(Self { head: table.head, extents, sectors: table.sectors, read_only: true })
    }

    /// Size in sectors.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// True when writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Fills `memory` from the byte offset `at`. The range must be inside the disk. What no file holds is zero.
    ///
    /// # Errors
    /// Those of the files.
    pub fn read(&self, at: u64, memory: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.for_pieces(at, memory, |source, slices| match source {
            Source::Head(bytes) => {
                let mut rest = bytes;
                for slice in slices {
                    let (now, later) = rest.split_at(slice.len());
                    slice.copy_from(now);
                    rest = later;
                }
                Ok(())
            }
            Source::File(file, offset) => read(file, offset, slices),
            Source::Nothing => {
                slices.iter().for_each(zero);
                Ok(())
            }
        })
    }

    /// Writes `memory` at the byte offset `at`. The range must be inside the disk.
    ///
    /// # Errors
    /// Those of the file; [`PermissionDenied`](io::ErrorKind::PermissionDenied) on a read-only disk.
    pub fn write(&self, at: u64, memory: &[VolatileSlice<'_>]) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.for_pieces(at, memory, |source, slices| match source {
            Source::File(file, offset) => write(file, offset, slices),
            Source::Head(_) | Source::Nothing => Err(io::ErrorKind::PermissionDenied.into()),
        })
    }

    /// Returns when everything written is on stable storage.
    ///
    /// # Errors
    /// Those of the files.
    pub fn flush(&self) -> io::Result<()> {
        self.extents.iter().try_for_each(|extent| extent.file.sync_data())
    }

    /// Cuts a transfer where the disk's pieces meet.
    fn for_pieces(
        &self,
        mut at: u64,
        memory: &[VolatileSlice<'_>],
        mut piece: impl FnMut(Source<'_>, &[VolatileSlice<'_>]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut rest: VecDeque<VolatileSlice<'_>> =
            memory.iter().filter(|slice| !slice.is_empty()).copied().collect();
        while !rest.is_empty() {
            let (source, available) = self.source(at);
            let slices = take_front(&mut rest, available).map_err(io::Error::other)?;
            piece(source, &slices)?;
            at += slices.iter().map(|slice| slice.len() as u64).sum::<u64>();
        }
        Ok(())
    }

    /// What is at a byte offset, and for how many bytes.
    fn source(&self, position: u64) -> (Source<'_>, u64) {
        if let Some(rest) =
            usize::try_from(position).ok().and_then(|at| self.head.get(at..)).filter(|rest| !rest.is_empty())
        {
            return (Source::Head(rest), rest.len() as u64);
        }
        let after = self.extents.partition_point(|extent| extent.start * SECTOR <= position);
        let next_start = self.extents.get(after).map_or(u64::MAX, |extent| extent.start * SECTOR);
        if let Some(extent) = after.checked_sub(1).map(|index| &self.extents[index]) {
            let offset = position - extent.start * SECTOR;
            if offset < extent.bytes {
                return (Source::File(&extent.file, offset), extent.bytes - offset);
            }
        }
        (Source::Nothing, next_start - position)
    }
}

enum Source<'a> {
    Head(&'a [u8]),
    File(&'a File, u64),
    Nothing,
}

impl Extent {
    fn new(mut file: File) -> Result<Self, DiskError> {
        // A block device's size is where its end is.
        let bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0)).map_err(DiskError::Size)?;
        if bytes == 0 {
            return Err(DiskError::Empty);
        }
        Ok(Self { start: 0, sectors: bytes.div_ceil(SECTOR), bytes, file })
    }
}

fn zero(slice: &VolatileSlice<'_>) {
    let guard = slice.ptr_guard_mut();
    // SAFETY: the pointer is valid for the slice's length while the guard lives; the guest may see the bytes change.
    unsafe { std::ptr::write_bytes(guard.as_ptr(), 0, slice.len()) };
}

/// Fills memory from a file. What the file has lost since it was opened reads as zeros.
fn read(file: &File, offset: u64, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
    let mut rest = slices.iter().copied().collect();
    transfer(file, offset, &mut rest, Direction::Read)?;
    rest.iter().for_each(zero);
    Ok(())
}

fn write(file: &File, offset: u64, slices: &[VolatileSlice<'_>]) -> io::Result<()> {
    let mut rest = slices.iter().copied().collect();
    transfer(file, offset, &mut rest, Direction::Write)?;
    if rest.is_empty() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file
    }

    /// Reads through two slices that do not meet, as a driver's segments do.
    fn read(disk: &Disk, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0xaa; length];
        let (a, b) = bytes.split_at_mut(length / 3);
        disk.read(at, &[VolatileSlice::from(a), VolatileSlice::from(b)]).unwrap();
        bytes
    }

    #[test]
    fn partitions_hold_the_files_and_zeros_between_them() {
        let (first, second) = (vec![1; 700], vec![2; 5000]);
        let disk = Disk::partitions(vec![file(&first), file(&second)]).unwrap();
        let all = read(&disk, 0, usize::try_from(disk.sectors() * SECTOR).unwrap());
        let starts: Vec<usize> =
            disk.extents.iter().map(|extent| usize::try_from(extent.start * SECTOR).unwrap()).collect();
        assert_eq!(&all[512..520], b"EFI PART");
        assert_eq!(&all[starts[0]..starts[0] + 700], first);
        assert!(all[starts[0] + 700..starts[1]].iter().all(|&byte| byte == 0));
        assert_eq!(&all[starts[1]..starts[1] + 5000], second);
        assert!(all[starts[1] + 5000..].iter().all(|&byte| byte == 0));
        assert_eq!(read(&disk, starts[1] as u64 + 1000, 90), vec![2; 90]);
    }

    #[test]
    fn what_is_written_is_read_back_and_only_where_it_is_allowed() {
        let disk = Disk::whole(file(&[0; 4096]), false).unwrap();
        let mut data = [7; 1024];
        disk.write(512, &[VolatileSlice::from(&mut data[..])]).unwrap();
        assert_eq!(read(&disk, 0, 2048), [vec![0; 512], vec![7; 1024], vec![0; 512]].concat());
        let read_only = Disk::whole(file(&[0; 4096]), true).unwrap();
        assert!(read_only.write(0, &[VolatileSlice::from(&mut data[..])]).is_err());
    }

    #[test]
    fn a_file_that_shrinks_reads_as_zeros() {
        let source = file(&[5; 8192]);
        let disk = Disk::whole(source.try_clone().unwrap(), true).unwrap();
        source.set_len(4096).unwrap();
        assert_eq!(read(&disk, 4000, 200), [vec![5; 96], vec![0; 104]].concat());
    }

    #[test]
    fn empty_files_are_refused() {
        assert!(matches!(Disk::whole(file(&[]), true), Err(DiskError::Empty)));
        assert!(matches!(Disk::partitions(vec![]), Err(DiskError::Layout)));
    }
}
