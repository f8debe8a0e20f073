//! READ, WRITE and FLUSH, which the server does not see: data between files and guest memory, and whether it has arrived.

use std::fs::File;

use super::buffer::Buffer;
use super::wire::{self, DATA_IN, DataIn, FLUSH_IN, IN_HEADER, OUT_HEADER};
use super::{DATA_MAX, Fs, Wait};
use crate::devices::transfer::{Direction, transfer};
use crate::memory::Memory;
use crate::virtio::device::DeviceError;
use crate::virtio::io::Fate;

impl Fs {
    /// READ: fills the room for the answer from a file. A vCPU leaves it in the ring when the file's disk may have to be waited for.
    ///
    /// # Errors
    /// None, since memory is there as long as the machine.
    pub(super) fn read(&mut self, queue: usize, memory: &Memory, unique: u64) -> Result<Fate, DeviceError> {
        let Some(asked) = self.data_in(memory)? else {
            return self.answer(memory, unique, Err(libc::EINVAL));
        };
        if asked.size > self.writable.bytes() - OUT_HEADER {
            return self.answer(memory, unique, Err(libc::EINVAL));
        }
        let Some(open) = self.handles.get(asked.handle) else {
            return self.answer(memory, unique, Err(libc::EBADF));
        };
        let direction = match open.at_once {
            _ if !self.on_vcpu => Direction::Read,
            Some(flags) => Direction::ReadAtOnce(flags),
            None => return Ok(self.leave(queue, Wait::Worker)),
        };
        match move_data(memory, &open.file, asked, (&self.writable, OUT_HEADER), direction)? {
            Ok(moved) => {
                let mut header = wire::answer(unique, 0, &[]);
                let length = u32::try_from(OUT_HEADER + moved).expect("at most DATA_MAX and a header");
                header[..4].copy_from_slice(&length.to_le_bytes());
                self.writable.write(memory, &header)?;
                Ok(Fate::Used(length))
            }
            Err(errno @ (libc::EAGAIN | libc::EOPNOTSUPP)) if self.on_vcpu => {
                if errno == libc::EOPNOTSUPP {
                    open.without_nowait();
                }
                Ok(self.leave(queue, Wait::Worker))
            }
            Err(errno) => self.answer(memory, unique, Err(errno)),
        }
    }

    /// WRITE: puts the rest of the request into a file.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(super) fn write(&mut self, memory: &Memory, unique: u64) -> Result<Fate, DeviceError> {
        let Some(asked) = self.data_in(memory)? else {
            return self.answer(memory, unique, Err(libc::EINVAL));
        };
        let after = IN_HEADER + DATA_IN;
        // `fuse_write_out`: how much was written, and padding.
        let mut body = [0; 8];
        if asked.size != self.readable.bytes() - after || self.writable.bytes() < OUT_HEADER + body.len() {
            return self.answer(memory, unique, Err(libc::EINVAL));
        }
        let Some(open) = self.handles.get(asked.handle) else {
            return self.answer(memory, unique, Err(libc::EBADF));
        };
        if let Err(errno) = open.set_append(asked.appends) {
            return self.answer(memory, unique, Err(errno as i32));
        }
        match move_data(memory, &open.file, asked, (&self.readable, after), Direction::Write)? {
            Ok(moved) => {
                let moved = u32::try_from(moved).expect("at most DATA_MAX");
                body[..4].copy_from_slice(&moved.to_le_bytes());
                self.answer(memory, unique, Ok(&body))
            }
            Err(errno) => self.answer(memory, unique, Err(errno)),
        }
    }

    /// FLUSH: says what close(2) says of a file, which stays open. The guest's kernel asks when a program closes one that the server did not
    /// give FOPEN_NOFLUSH.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub(super) fn flush(&mut self, memory: &Memory, unique: u64) -> Result<Fate, DeviceError> {
        if self.readable.bytes() < IN_HEADER + FLUSH_IN {
            return self.answer(memory, unique, Err(libc::EINVAL));
        }
        let mut asked = [0; FLUSH_IN];
        self.readable.read(memory, IN_HEADER, &mut asked)?;
        let result = match self.handles.get(wire::long(&asked, 0)) {
            Some(open) => open.flush().map_err(|error| error.raw_os_error().unwrap_or(libc::EIO)),
            None => Err(libc::EBADF),
        };
        self.answer(memory, unique, result.map(|()| &[][..]))
    }

    /// What READ or WRITE at hand asks for, if it is within bounds.
    fn data_in(&self, memory: &Memory) -> Result<Option<DataIn>, DeviceError> {
        if self.readable.bytes() < IN_HEADER + DATA_IN {
            return Ok(None);
        }
        let mut bytes = [0; DATA_IN];
        self.readable.read(memory, IN_HEADER, &mut bytes)?;
        let asked = DataIn::parse(&bytes);
        let end = asked.offset.checked_add(asked.size as u64);
        let in_bounds = asked.size <= DATA_MAX && end.is_some_and(|end| i64::try_from(end).is_ok());
        Ok(in_bounds.then_some(asked))
    }
}

/// Moves the data of a READ or WRITE, and says how much that was. A READ moves less than was asked for at the end of the file and nowhere
/// else, for that is what the guest would take it for. A WRITE does so when the host has no room or fails halfway. The error is an errno.
fn move_data(
    memory: &Memory,
    file: &File,
    asked: DataIn,
    (buffer, after): (&Buffer, usize),
    direction: Direction,
) -> Result<Result<usize, i32>, DeviceError> {
    let mut rest = buffer.slices(memory, after, asked.size)?;
    let result = transfer(file, asked.offset, &mut rest, direction);
    let moved = asked.size - rest.iter().map(vm_memory::VolatileSlice::len).sum::<usize>();
    Ok(match result {
        Err(error) if moved == 0 || direction != Direction::Write => {
            Err(error.raw_os_error().unwrap_or(libc::EIO))
        }
        _ => Ok(moved),
    })
}
