//! Socket device, section 5.10: stream sockets between the guest and programs of the host.
//!
//! Host programs connect to a Unix socket, say `CONNECT <port>\n` and read `OK <local port>\n` once a program of the guest has accepted;
//! if none does, they read the end of the file. From there on bytes flow both ways, with ends of each direction of their own. A guest
//! cannot connect to the host. Host programs that come before the guest's driver are turned away.
//!
//! - [`packet`]: the header of a packet
//! - [`buffer`]: where a packet is in guest memory
//! - [`handshake`]: what a host program says first
//! - [`credit`]: flow control
//! - [`backlog`]: what a host program has still to read
//! - [`connection`]: one connection
//! - [`table`]: all of them, and their sockets
//!
//! Bounds: [`table::CONNECTIONS_MAX`] connections, [`credit::BUF_ALLOC`] bytes kept of each, [`table::RESETS_MAX`] pending RSTs.

mod backlog;
mod buffer;
mod connection;
mod credit;
mod handshake;
mod packet;
mod table;
#[cfg(test)]
mod tests;

use std::os::fd::{OwnedFd, RawFd};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use vm_memory::Bytes;

use self::buffer::Buffer;
use self::connection::{Next, Verdict};
use self::packet::{CID_HOST, HEADER_SIZE, Header, op};
use self::table::{Driver, Table, Work};
use super::DeviceState;
use crate::virtio::device::{DeviceError, VirtioDevice};
use crate::virtio::io::{Chain, DeviceIo};

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

/// Linux fills the receive queue with buffers of one page: 256 hold 1 MiB, which is more than a program's own socket buffer. It has 8
/// buffers for events.
const QUEUE_SIZES: [u16; 3] = [256, 256, 8];

/// `VIRTIO_VSOCK_F_STREAM`, 5.10.3
const F_STREAM: u64 = 1 << 0;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, little-endian: all connections are gone, and the context id may be another.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// 0 to 2 mean hypervisor, local and host; the last is "any".
    #[error("vsock context id {0}: give one from 3 to {max}", max = u32::MAX - 1)]
    Cid(u64),
    /// Not a descriptor that can be made non-blocking.
    #[error("cannot use the vsock listener")]
    Listener(#[source] std::io::Error),
    /// The host is out of descriptors or memory.
    #[error("cannot watch the vsock listener")]
    Epoll(#[source] std::io::Error),
}

/// The device.
pub struct Vsock {
    table: Table,
    /// The guest must be told that its connections are gone.
    transport_reset: bool,
}

impl Vsock {
    /// A device whose guest has this context id. `listener` is a listening Unix stream socket.
    ///
    /// # Errors
    /// When the context id is reserved, or the host refuses.
    pub fn new(listener: OwnedFd, cid: u64) -> Result<Self, VsockError> {
        if !is_guest_cid(cid) {
            return Err(VsockError::Cid(cid));
        }
        Ok(Self { table: Table::new(listener, cid)?, transport_reset: false })
    }

    /// A device that cannot go on has lost its connections: host programs must not wait for them.
    fn checked(&mut self, result: Result<(), DeviceError>) -> Result<(), DeviceError> {
        if result.is_err() {
            self.reset();
        }
        result
    }

    /// What follows from anything that has happened: packets for the guest, and room for more host programs.
    fn serve(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        self.fill_rx(io)?;
        self.table.accept(if io.is_ready(RX) && io.is_ready(TX) { Driver::Ready } else { Driver::Absent });
        Ok(())
    }

    /// Gives the guest what there is for it, as far as it has buffers. One turn fills as many as the queue can have.
    fn fill_rx(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        if !io.is_ready(RX) {
            return Ok(());
        }
        let turn = usize::from(QUEUE_SIZES[RX]);
        let mut used = 0;
        while let Some(work) = self.table.first() {
            if used >= turn {
                self.table.come_again();
                break;
            }
            let Some(chain) = pop_or_watch(io, RX)? else { break };
            let buffer = Buffer::writable(io.memory(), chain)?;
            used += match work {
                Work::Reset(header) => {
                    self.table.reset_sent();
                    put(io, &buffer, header)?;
                    1
                }
                Work::Connection(port, next) => self.take_turn(io, port, next, buffer)?,
            };
        }
        if used > 0 { io.notify(RX) } else { Ok(()) }
    }

    /// One connection's turn, with at least one buffer. Returns how many it used.
    fn take_turn<'m>(
        &mut self,
        io: &mut DeviceIo<'m>,
        port: u32,
        next: Next,
        first: Buffer<'m>,
    ) -> Result<usize, DeviceError> {
        let cid = self.table.cid;
        let Some(connection) = self.table.connection(port) else { return Ok(0) };
        match next {
            Next::Control { op, flags } => {
                put(io, &first, connection.header(cid, op, flags, 0))?;
                let verdict = connection.told(op, flags);
                self.table.turn_over(port, verdict);
                Ok(1)
            }
            Next::Data { buffers, credit } => {
                let credit = credit as usize;
                let mut room = first.room();
                let mut batch = vec![first];
                while batch.len() < buffers && room < credit {
                    let Some(chain) = io.pop(RX)? else { break };
                    let buffer = Buffer::writable(io.memory(), chain)?;
                    room += buffer.room();
                    batch.push(buffer);
                }
                let offered = room.min(credit);
                let mut left = offered;
                let parts = batch.iter().flat_map(|buffer| {
                    let part = left.min(buffer.room());
                    left -= part;
                    buffer.data(0, part)
                });
                let mut left = connection.receive(parts, offered);
                let mut used = 0;
                for buffer in &batch {
                    if left == 0 {
                        io.unpop(RX);
                        continue;
                    }
                    let part = left.min(buffer.room());
                    left -= part;
                    used += 1;
                    let length = u32::try_from(part).expect("no more than the credit");
                    put(io, buffer, connection.header(cid, op::RW, 0, length))?;
                }
                self.table.turn_over(port, Verdict::Keep);
                Ok(used)
            }
        }
    }

    /// Takes what the guest has sent.
    fn empty_tx(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        io.take_turn(TX, |memory, chain| {
            self.table.on_guest(&Buffer::readable(memory, chain)?)?;
            Ok(0)
        })
    }

    fn send_event(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        if !self.transport_reset || !io.is_ready(EVENT) {
            return Ok(());
        }
        let Some(chain) = pop_or_watch(io, EVENT)? else { return Ok(()) };
        let head = chain.head_index();
        let length = u32::try_from(TRANSPORT_RESET.len()).expect("four");
        let buffer = chain.writable().next().filter(|buffer| buffer.len() >= length);
        let buffer = buffer.ok_or(DeviceError::Driver("a vsock event buffer that cannot hold an event"))?;
        io.memory().write_slice(&TRANSPORT_RESET, buffer.addr())?;
        self.transport_reset = false;
        io.push(EVENT, head, length)?;
        io.notify(EVENT)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        self.table.cid.to_le_bytes().to_vec()
    }

    fn process_queue(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let result = match queue {
            RX => self.serve(io),
            TX => self.empty_tx(io).and_then(|()| self.serve(io)),
            _ => self.send_event(io),
        };
        self.checked(result)
    }

    fn host_fd(&self) -> Option<RawFd> {
        Some(self.table.fd())
    }

    fn process_host(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        self.table.poll();
        let result = self.serve(io);
        self.checked(result)
    }

    fn reset(&mut self) {
        self.table.abandon();
        self.transport_reset = false;
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock { cid: self.table.cid }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), &'static str> {
        match state {
            DeviceState::Vsock { cid } if is_guest_cid(*cid) => self.table.cid = *cid,
            DeviceState::Vsock { .. } => return Err("a reserved vsock context id"),
            _ => return Err("not the state of a vsock device"),
        }
        Ok(())
    }

    fn resumed(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        self.transport_reset = true;
        let result = self.send_event(io);
        self.checked(result)
    }
}

/// Linux has context ids of 32 bits (5.10.4); 0 to 2 and the last have meanings of their own.
fn is_guest_cid(cid: u64) -> bool {
    (CID_HOST + 1..u64::from(u32::MAX)).contains(&cid)
}

/// The next buffer, or else a notification when there is one.
fn pop_or_watch<'m>(io: &mut DeviceIo<'m>, queue: usize) -> Result<Option<Chain<'m>>, DeviceError> {
    match io.pop(queue)? {
        None if io.watch(queue)? => io.pop(queue),
        chain => Ok(chain),
    }
}

/// Gives a packet, whose data is in place, to the guest.
fn put(io: &mut DeviceIo<'_>, buffer: &Buffer<'_>, header: Header) -> Result<(), DeviceError> {
    buffer.set_header(header);
    let header_size = u32::try_from(HEADER_SIZE).expect("44");
    io.push(RX, buffer.head(), header_size + header.len)
}
