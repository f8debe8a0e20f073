//! File system device, section 5.11: the guest's FUSE requests, for a file server outside of the VMM.
//!
//! The server decides about names, metadata and access. When the guest opens a regular file, the server hands the file over, and the VMM
//! moves the data itself, straight into and out of guest memory. See `docs/adr/0005-file-sharing.md`.
//!
//! The server is at the other end of a SEQPACKET socket. One packet is one request as the driver wrote it, but for `unique`, or one
//! reply to it, with the same `unique`:
//! - READ, WRITE and FLUSH stay here, and so does INTERRUPT, which may be ignored.
//! - A reply to OPEN, CREATE or TMPFILE carries the file (`SCM_RIGHTS`). RELEASE closes it here and goes on to the server.
//! - FORGET, BATCH_FORGET and DESTROY are not replied to. A reset of the device is a DESTROY.
//!
//! A vCPU that notifies the device does what needs no waiting: it sends requests to the server, and reads what the host has in memory. So
//! neither costs a change of threads. The device's own thread does the rest.
//!
//! The VMM never waits for the server. What does not fit into the socket or into the table of pending requests stays in the ring: then
//! either the socket will have room, or a reply come ([`Wait`]). When the server is gone, every request is answered with EIO.
//!
//! - [`wire`]: what is read and written of FUSE's messages
//! - [`buffer`]: where a request is in guest memory
//! - [`pending`]: the requests that the server works on
//! - [`handles`]: the files that the guest has open
//! - [`data`]: READ, WRITE and FLUSH
//! - [`server`]: the socket
//! - [`replies`]: what comes back from it
//!
//! Bounds: [`REQUEST_MAX`] and [`DATA_MAX`] bytes of a request, [`pending::PENDING_MAX`] requests, [`HANDLES_MAX`] files.

mod buffer;
mod data;
mod handles;
mod pending;
mod replies;
mod server;
#[cfg(test)]
mod tests;
mod wire;

use std::os::fd::{OwnedFd, RawFd};

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vmm_sys_util::epoll::EventSet;

use self::buffer::Buffer;
pub use self::handles::HANDLES_MAX;
use self::handles::Handles;
use self::pending::{Expected, Pending, Request};
use self::server::{Sent, Server};
use self::wire::{IN_HEADER, InHeader, OUT_HEADER, Operation};
use super::DeviceState;
use crate::memory::Memory;
use crate::virtio::device::{DeviceError, VirtioDevice};
use crate::virtio::io::{Chain, DeviceIo, Fate};

/// Bytes of a tag, 5.11.4.
pub const TAG_LEN: usize = 36;

/// Longest request that goes to the server: the longest extended attribute, its name and its file's.
pub const REQUEST_MAX: usize = 80 << 10;

/// Most bytes that one READ or WRITE moves: the most that Linux asks for.
pub const DATA_MAX: usize = 1 << 20;

/// Requests that must not wait, then all others. The kernel's driver makes requests of at most as many pages as the second has entries.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The guest could not mount it.
    #[error("file system tag {0:?}: give 1 to {TAG_LEN} bytes, none of them NUL")]
    Tag(String),
}

/// What the chains wait for that were left in a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// There are none.
    Nothing,
    /// Replies, which will come: the table of requests without one is full.
    Replies,
    /// The device's own thread, which may wait for a disk. A vCPU was at work.
    Worker,
    /// Room in the socket. Replies need not come, since there are requests without: so it is the room itself that is watched for.
    Room,
}

/// The device.
pub struct Fs {
    tag: String,
    server: Server,
    pending: Pending,
    handles: Handles,
    /// A vCPU is at work, which does not wait.
    on_vcpu: bool,
    /// By queue.
    waits: [Wait; 2],
    /// The server has had requests since the last reset.
    in_use: bool,
    /// The server has to be told of a reset before it gets anything else.
    destroy_owed: bool,
    /// The request at hand: where it is in guest memory, and as much of it as is looked at.
    readable: Buffer,
    writable: Buffer,
    request: Vec<u8>,
}

impl Fs {
    /// A device that the guest mounts by `tag`. `server` is a connected SEQPACKET socket.
    ///
    /// # Errors
    /// When the tag does not fit.
    pub fn new(server: OwnedFd, tag: &str) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_LEN || tag.contains('\0') {
            return Err(FsError::Tag(tag.to_owned()));
        }
        Ok(Self {
            tag: tag.to_owned(),
            server: Server::new(server),
            pending: Pending::default(),
            handles: Handles::default(),
            on_vcpu: false,
            waits: [Wait::Nothing; 2],
            in_use: false,
            destroy_owed: false,
            readable: Buffer::default(),
            writable: Buffer::default(),
            request: Vec::new(),
        })
    }

    /// Takes what there is in a queue.
    fn serve(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        self.waits[queue] = Wait::Nothing;
        io.take_turn_with(queue, |memory, chain| {
            let fate = self.handle(queue, memory, chain)?;
            debug_assert_eq!(fate == Fate::Left, self.waits[queue] != Wait::Nothing);
            Ok(fate)
        })
    }

    /// One request. What is wrong within it is answered with an error; what has no room for an answer is given back.
    fn handle(&mut self, queue: usize, memory: &Memory, chain: Chain<'_>) -> Result<Fate, DeviceError> {
        let head = chain.head_index();
        Buffer::gather(memory, chain, &mut self.readable, &mut self.writable)?;
        let length = self.readable.bytes();
        if length < IN_HEADER {
            return Ok(Fate::Used(0));
        }
        self.request.resize(IN_HEADER, 0);
        self.readable.read(memory, 0, &mut self.request)?;
        let header = InHeader::parse(self.request.first_chunk().expect("IN_HEADER bytes"));
        let well_formed = header.len == length;

        match header.operation {
            Operation::Forget if well_formed && length <= REQUEST_MAX => {
                self.load(memory, length)?;
                return Ok(if self.send_lone(queue) { Fate::Used(0) } else { Fate::Left });
            }
            Operation::Forget | Operation::Interrupt => return Ok(Fate::Used(0)),
            _ if self.writable.bytes() < OUT_HEADER => return Ok(Fate::Used(0)),
            _ if !well_formed || self.writable.bytes() < header.operation.answer_min() => {
                return self.answer(memory, header.unique, Err(libc::EIO));
            }
            _ if self.server.fd().is_none() => return self.answer(memory, header.unique, Err(libc::EIO)),
            // These may wait: for room among the pages to be written, for a file's end.
            Operation::Write | Operation::Flush | Operation::Release | Operation::Destroy if self.on_vcpu => {
                return Ok(self.leave(queue, Wait::Worker));
            }
            Operation::Read => return self.read(queue, memory, header.unique),
            Operation::Write => return self.write(memory, header.unique),
            Operation::Flush => return self.flush(memory, header.unique),
            _ if length > REQUEST_MAX => return self.answer(memory, header.unique, Err(libc::EIO)),
            Operation::Destroy => {
                // The guest has nothing to do but to wait for the answer, so it gets that now.
                self.load(memory, length)?;
                if !self.send_lone(queue) {
                    return Ok(Fate::Left);
                }
                self.pending.refuse_files();
                self.handles.clear();
                return self.answer(memory, header.unique, Ok(&[]));
            }
            // Before the server has opened or made a file that nobody could use.
            Operation::Open { .. } if self.handles.room() <= self.pending.files() => {
                return self.answer(memory, header.unique, Err(libc::EMFILE));
            }
            Operation::Open { .. } | Operation::Release | Operation::Other => {}
        }
        self.load(memory, length)?;
        self.forward(queue, head, memory, header)
    }

    /// Leaves the request at hand in the ring.
    fn leave(&mut self, queue: usize, wait: Wait) -> Fate {
        self.waits[queue] = wait;
        Fate::Left
    }

    /// Copies the request at hand out of guest memory, where the driver may go on to change it. Its header has been copied already.
    fn load(&mut self, memory: &Memory, length: usize) -> Result<(), DeviceError> {
        self.request.resize(length, 0);
        self.readable.read(memory, IN_HEADER, &mut self.request[IN_HEADER..])
    }

    /// Sends the request at hand, which the server is to answer.
    fn forward(
        &mut self,
        queue: usize,
        head: u16,
        memory: &Memory,
        header: InHeader,
    ) -> Result<Fate, DeviceError> {
        let Some(tag) = self.pending.next_tag() else {
            return Ok(self.leave(queue, Wait::Replies));
        };
        let sent = self.send(tag);
        if sent == Sent::Full {
            return Ok(self.leave(queue, Wait::Room));
        }
        // The guest does not ask again, so the file is closed even if the server does not hear of it. `fuse_release_in` begins with the handle.
        if header.operation == Operation::Release && self.request.len() >= IN_HEADER + size_of::<u64>() {
            self.handles.remove(wire::long(&self.request, IN_HEADER));
        }
        if sent != Sent::Done {
            return self.answer(memory, header.unique, Err(libc::EIO));
        }
        let expected = match header.operation {
            Operation::Open { handle_at } => Expected::File { handle_at },
            _ => Expected::Bytes,
        };
        let request = Request { queue, head, unique: header.unique, expected };
        self.pending.insert(tag, request, &mut self.writable);
        Ok(Fate::Kept)
    }

    /// Sends the request at hand, whose answer nobody waits for. False when it has to stay in the ring.
    fn send_lone(&mut self, queue: usize) -> bool {
        let tag = self.pending.lone_tag();
        // It may be lost with the server, or when the host has no memory: then the server keeps what it should forget.
        let sent = self.send(tag) != Sent::Full;
        if !sent {
            self.waits[queue] = Wait::Room;
        }
        sent
    }

    fn send(&mut self, tag: u64) -> Sent {
        if self.destroy_owed && !self.send_destroy() {
            return Sent::Full;
        }
        wire::set_unique(&mut self.request, tag);
        self.in_use = true;
        self.server.send(&self.request)
    }

    /// Tells the server of a reset. False when the socket is full.
    fn send_destroy(&mut self) -> bool {
        let destroy = wire::destroy(self.pending.lone_tag());
        let sent = self.server.send(&destroy);
        if sent == Sent::Refused {
            // The host is short of memory. The guest that comes next must not meet what the one before has left.
            self.server.end();
        }
        self.destroy_owed = sent == Sent::Full;
        !self.destroy_owed
    }

    /// Answers the request at hand. There must be room for a header; an answer that does not fit becomes an error.
    fn answer(&self, memory: &Memory, unique: u64, result: Result<&[u8], i32>) -> Result<Fate, DeviceError> {
        answer(memory, &self.writable, unique, result).map(Fate::Used)
    }

    /// Takes up what was left in the rings.
    fn go_on(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        for queue in 0..QUEUE_SIZES.len() {
            if self.waits[queue] != Wait::Nothing && io.is_ready(queue) {
                self.serve(queue, io)?;
            }
        }
        Ok(())
    }

    /// A device that cannot go on answers nothing any more.
    fn checked(&mut self, result: Result<(), DeviceError>) -> Result<(), DeviceError> {
        if result.is_err() {
            self.forget();
        }
        result
    }

    fn forget(&mut self) {
        self.pending.clear();
        self.waits = [Wait::Nothing; 2];
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.tag.as_bytes().to_vec();
        config.resize(TAG_LEN, 0);
        // num_request_queues
        config.extend(1u32.to_le_bytes());
        config
    }

    fn works_on_vcpus(&self) -> bool {
        true
    }

    fn notified(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        self.on_vcpu = true;
        let mut result = self.serve(queue, io).and_then(|()| self.settle(io));
        self.on_vcpu = false;
        if result.is_ok() && self.waits[queue] == Wait::Worker {
            result = io.hand_over(queue);
        }
        self.checked(result)
    }

    fn process_queue(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let result = self.serve(queue, io).and_then(|()| self.settle(io));
        self.checked(result)
    }

    fn host_fd(&self) -> Option<RawFd> {
        self.server.fd()
    }

    fn host_events(&self) -> EventSet {
        if self.waits.contains(&Wait::Room) { EventSet::IN | EventSet::OUT } else { EventSet::IN }
    }

    fn process_host(&mut self, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        let result = self.receive(io).and_then(|()| self.go_on(io)).and_then(|()| self.settle(io));
        self.checked(result)
    }

    fn reset(&mut self) {
        self.forget();
        self.handles.clear();
        if self.in_use {
            self.in_use = false;
            self.send_destroy();
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Fs { tag: self.tag.clone(), in_use: self.in_use }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), &'static str> {
        match state {
            DeviceState::Fs { in_use: true, .. } => Err(
                "the guest had mounted a file system, whose server does not know it any more: save before it is mounted",
            ),
            DeviceState::Fs { tag, .. } if *tag == self.tag => Ok(()),
            DeviceState::Fs { .. } => Err("the saved file system had another tag"),
            _ => Err("not the state of a file system"),
        }
    }
}

/// Writes an answer of the VMM's own into the room for it, in which a header must fit. Returns its length.
fn answer(
    memory: &Memory,
    room: &Buffer,
    unique: u64,
    result: Result<&[u8], i32>,
) -> Result<u32, DeviceError> {
    let bytes = match result {
        Ok(body) => wire::answer(unique, 0, body),
        Err(errno) => wire::answer(unique, errno, &[]),
    };
    room.write(memory, &bytes)?;
    Ok(u32::try_from(bytes.len()).expect("a header and a few bytes"))
}
