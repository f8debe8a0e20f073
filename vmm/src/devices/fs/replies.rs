//! The server's replies, and what takes their place when there is no server.

use super::handles::Handles;
use super::pending::{Expected, PENDING_MAX, Pending};
use super::server::Packet;
use super::wire::{self, OutHeader};
use super::{Fs, answer};
use crate::virtio::device::DeviceError;
use crate::virtio::io::DeviceIo;

/// Replies that are taken in one turn, lest a server that never stops keeps the thread.
const REPLIES_MAX: usize = PENDING_MAX;

impl Fs {
    /// Takes a reply to where it belongs. `touched` are the queues whose chains have been used.
    fn deliver(
        pending: &mut Pending,
        handles: &mut Handles,
        packet: Packet<'_>,
        io: &mut DeviceIo<'_>,
        touched: &mut [bool; 2],
    ) -> Result<(), DeviceError> {
        // To nothing: from before a reset, or never asked for. What came with it is closed.
        let Some(header) = OutHeader::parse(packet.bytes) else { return Ok(()) };
        let Some((request, room)) = pending.take(header.unique) else { return Ok(()) };
        let length = packet.bytes.len();
        let well_formed = !packet.too_long && header.fits(length) && length <= room.bytes();
        let accepted = match (request.expected, packet.file) {
            (Expected::Bytes, _) => well_formed,
            (Expected::File { .. }, _) if !header.is_success() => well_formed,
            (Expected::File { handle_at }, Some(file)) => {
                let accepted = well_formed && length >= handle_at + size_of::<u64>();
                if accepted {
                    // Before the guest sees the answer and uses the file.
                    handles.insert(wire::long(packet.bytes, handle_at), file);
                }
                accepted
            }
            (Expected::File { .. }, None) | (Expected::Nothing, _) => false,
        };
        let written = if accepted {
            wire::set_unique(packet.bytes, request.unique);
            room.write(io.memory(), packet.bytes)?;
            u32::try_from(length).expect("at most REPLY_MAX")
        } else {
            answer(io.memory(), room, request.unique, Err(libc::EIO))?
        };
        touched[request.queue] = true;
        io.push(request.queue, request.head, written)
    }

    /// Takes the server's replies. It is asked for more only as long as it owes any: most often it owes one, and a call that finds nothing
    /// costs as much as one that does.
    ///
    /// # Errors
    /// When the used ring is malformed.
    pub(super) fn receive(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let mut touched = [false; 2];
        for _ in 0..REPLIES_MAX {
            let Some(packet) = self.server.receive() else { break };
            Self::deliver(&mut self.pending, &mut self.handles, packet, io, &mut touched)?;
            if self.pending.is_empty() {
                break;
            }
        }
        notify(io, touched)
    }

    /// When the server is gone, what it owed is answered for it.
    ///
    /// # Errors
    /// When the used ring is malformed.
    pub(super) fn settle(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        if self.server.fd().is_some() {
            return Ok(());
        }
        self.handles.clear();
        let mut touched = [false; 2];
        while let Some((request, room)) = self.pending.take_any() {
            let written = answer(io.memory(), room, request.unique, Err(libc::EIO))?;
            touched[request.queue] = true;
            io.push(request.queue, request.head, written)?;
        }
        notify(io, touched)
    }
}

/// Interrupts the driver for the queues whose chains have been used.
fn notify(io: &mut DeviceIo<'_>, touched: [bool; 2]) -> Result<(), DeviceError> {
    for (queue, _) in touched.iter().enumerate().filter(|(_, touched)| **touched) {
        io.notify(queue)?;
    }
    Ok(())
}
