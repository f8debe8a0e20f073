//! A guest's kernel without a conscience: it drives the VMM's fs device by rings of its own, and behind that is the real server
//! in its jail. What the device writes beyond the room that it was given fails the test.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bulkhead_fs::control::{Fd, Request, ShareKind};
use bulkhead_fs::wire::{Reader, Writer, opcode};
use bulkhead_vmm::devices::fs::Fs;
use bulkhead_vmm::memory::Memory;
use bulkhead_vmm::virtio::registers::{RegisterPages, SlotRegisters};
use bulkhead_vmm::virtio::slot::{Plugged, Slot};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress};

use crate::client::{Result, Server, text};

/// Registers of virtio-mmio, table 4.1 of the standard.
const DRIVER_FEATURES: usize = 0x20;
const DRIVER_FEATURES_SEL: usize = 0x24;
const QUEUE_SEL: usize = 0x30;
const QUEUE_SIZE: usize = 0x38;
const QUEUE_READY: usize = 0x44;
const STATUS: usize = 0x70;
const QUEUE_ADDRESSES: [usize; 3] = [0x80, 0x90, 0xa0];
/// ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK
const STEPS: [u32; 4] = [1, 3, 11, 15];

/// The queues of 5.11.2, of so many entries each.
const FORGETS: usize = 0;
const REQUESTS: usize = 1;
const ENTRIES: u16 = 128;

/// Guest memory: rings, a request, and the room for its answer.
const MEMORY: usize = 8 << 20;
const RING: u64 = 0x1_0000;
const RING_PARTS: [u64; 3] = [0, 0x2000, 0x4000];
const REQUEST: u64 = 0x10_0000;
const ANSWER: u64 = 0x40_0000;
/// What is behind the room.
const GUARD: [u8; 64] = [0x5a; 64];

/// Longer than anything takes.
const PATIENCE_S: i64 = 60;

/// A guest, the VMM's device and the server behind it.
pub(crate) struct Guest {
    pub(crate) server: Server,
    slot: Slot,
    registers: SlotRegisters,
    memory: Arc<Memory>,
    available: [u16; 2],
    unique: u64,
}

impl Guest {
    /// A guest that has seen to it that its device works.
    pub(crate) fn start(arguments: &[&str]) -> Option<Self> {
        let server = Server::start(arguments)?;
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let registers = SlotRegisters::new(Arc::new(RegisterPages::new().unwrap()), 0);
        let slot = Slot::new(0, registers.clone(), Arc::clone(&memory)).unwrap();
        slot.plug(Box::new(Fs::new(server.requests(), "shares").unwrap())).unwrap();
        let guest = Self { server, slot, registers, memory, available: [0; 2], unique: 0 };
        guest.set_up();
        Some(guest)
    }

    fn write(&self, register: usize, word: u32) {
        self.slot.write(register, &word.to_le_bytes());
    }

    fn status(&self) -> u32 {
        u32::from_le(self.registers.word(STATUS).load(Ordering::SeqCst))
    }

    fn set_up(&self) {
        for step in STEPS {
            if step & 8 != 0 && step & 4 == 0 {
                // VIRTIO_F_VERSION_1 alone.
                self.write(DRIVER_FEATURES_SEL, 1);
                self.write(DRIVER_FEATURES, 1);
            }
            if step & 4 != 0 {
                self.set_queues();
            }
            self.write(STATUS, step);
            assert_eq!(self.status(), step);
        }
    }

    fn set_queues(&self) {
        for queue in [FORGETS, REQUESTS] {
            self.write(QUEUE_SEL, u32::try_from(queue).unwrap());
            self.write(QUEUE_SIZE, ENTRIES.into());
            for (register, part) in QUEUE_ADDRESSES.into_iter().zip(RING_PARTS) {
                self.write(register, u32::try_from(Self::ring(queue) + part).unwrap());
            }
            self.write(QUEUE_READY, 1);
        }
    }

    fn ring(queue: usize) -> u64 {
        RING * (queue as u64 + 1)
    }

    /// Makes available what is in the request's place, with so much room for an answer.
    fn offer(&mut self, queue: usize, length: usize, room: u32) {
        let ring = Self::ring(queue);
        let length = u32::try_from(length).unwrap();
        // Flags: NEXT of the first, WRITE of the second.
        let parts = [(REQUEST, length, u64::from(room > 0)), (ANSWER, room, 2)];
        for (index, (address, length, flags)) in (0_u64..).zip(parts) {
            let at = ring + 16 * index;
            self.memory.write_obj(address, GuestAddress(at)).unwrap();
            let word = u64::from(length) | flags << 32 | (index + 1) << 48;
            self.memory.write_obj(word, GuestAddress(at + 8)).unwrap();
        }
        let available = ring + RING_PARTS[1];
        let entry = available + 4 + 2 * u64::from(self.available[queue] % ENTRIES);
        self.memory.write_obj(0_u16, GuestAddress(entry)).unwrap();
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.memory.write_obj(self.available[queue], GuestAddress(available + 2)).unwrap();
        self.slot.process_queue(queue);
        assert_eq!(self.status(), STEPS[3], "the device goes on");
    }

    /// Waits until the device has used the last chain. Returns how much it says to have written.
    fn used(&self, queue: usize) -> usize {
        let ring = Self::ring(queue) + RING_PARTS[2];
        loop {
            let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
            if index == self.available[queue] {
                let entry = ring + 4 + 8 * u64::from(index.wrapping_sub(1) % ENTRIES);
                let length: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
                return length as usize;
            }
            self.wait();
        }
    }

    /// Lets the device's host side work as soon as there is something to do.
    fn wait(&self) {
        let fd = self.slot.lock().as_ref().and_then(Plugged::host_fd).expect("a server");
        // SAFETY: the device has the descriptor, and is not dropped meanwhile.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let patience = Timespec { tv_sec: PATIENCE_S, tv_nsec: 0 };
        // For room, too: a server that answers nothing may be all that is waited for.
        let ready =
            poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN | PollFlags::OUT)], Some(&patience));
        assert_eq!(ready, Ok(1), "the server does not answer");
        self.slot.process_host();
        assert_eq!(self.status(), STEPS[3], "the device goes on");
    }

    /// Sends bytes, whatever they are. Nothing when the device has not written an answer.
    pub(crate) fn send_raw(&mut self, request: &[u8], room: u32) -> Option<Result<Vec<u8>>> {
        self.memory.write_slice(request, GuestAddress(REQUEST)).unwrap();
        let guard = GuestAddress(ANSWER + u64::from(room));
        self.memory.write_slice(&GUARD, guard).unwrap();
        self.offer(REQUESTS, request.len(), room);
        let length = self.used(REQUESTS);
        assert!(length <= room as usize, "{length} bytes, more than {room}");
        let (mut answer, mut behind) = (vec![0; length], GUARD);
        self.memory.read_slice(&mut answer, GuestAddress(ANSWER)).unwrap();
        self.memory.read_slice(&mut behind, guard).unwrap();
        assert_eq!(behind, GUARD, "it writes beyond the room");
        if answer.is_empty() {
            return None;
        }
        let mut reader = Reader(&answer);
        assert_eq!(reader.u32().unwrap() as usize, length);
        let error = reader.u32().unwrap().cast_signed();
        reader.u64().unwrap();
        assert!((-511..=0).contains(&error), "{error} is no error of Linux's");
        Some(if error == 0 { Ok(reader.0.to_vec()) } else { Err(-error) })
    }

    /// A request of the right form.
    pub(crate) fn request(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 2;
        let mut header = Writer::default();
        header.u32(u32::try_from(40 + body.len()).unwrap()).u32(opcode).u64(self.unique).u64(node).zeros(16);
        [&header.0, body].concat()
    }

    /// A request and its answer.
    pub(crate) fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>> {
        let request = self.request(opcode, node, body);
        self.send_raw(&request, 4096).expect("an answer")
    }

    /// FORGET or BATCH_FORGET, by the queue for it. There is no answer.
    pub(crate) fn forget(&mut self, opcode: u32, node: u64, body: &[u8]) {
        let request = self.request(opcode, node, body);
        self.memory.write_slice(&request, GuestAddress(REQUEST)).unwrap();
        self.offer(FORGETS, request.len(), 0);
        self.used(FORGETS);
    }

    /// Shares a directory and looks it up. It is not the root of a mount, as an owner has it, so that nothing but the server
    /// keeps the guest inside.
    pub(crate) fn share(&mut self, name: &str, path: &std::path::Path, read_only: bool) -> u64 {
        let directory = std::fs::File::open(path).unwrap();
        let (share, kind) = (Fd(0), ShareKind::Bind);
        let request = Request::AddShare { name: name.to_owned(), share, kind, read_only };
        self.server.owner(request, &[directory.as_fd()]).unwrap();
        self.lookup(1, name).unwrap()
    }

    pub(crate) fn lookup(&mut self, parent: u64, name: &str) -> Result<u64> {
        self.call(opcode::LOOKUP, parent, &text(&[name])).map(|entry| Reader(&entry).u64().unwrap())
    }

    /// Opens a file. The VMM keeps it under the handle.
    pub(crate) fn open(&mut self, node: u64, flags: i32) -> Result<u64> {
        let body = [flags.to_le_bytes(), [0; 4]].concat();
        self.call(opcode::OPEN, node, &body).map(|opened| Reader(&opened).u64().unwrap())
    }

    /// Opens a file of this name, which is made if it is not there: its node and its handle.
    pub(crate) fn create(&mut self, parent: u64, name: &str, flags: i32) -> Result<(u64, u64)> {
        let mut body = Writer::default();
        body.u32((flags | libc::O_CREAT).cast_unsigned()).u32(0o600).u32(0).u32(0).bytes(&text(&[name]));
        let made = self.call(opcode::CREATE, parent, &body.0)?;
        Ok((Reader(&made).u64().unwrap(), Reader(&made[128..]).u64().unwrap()))
    }

    /// READ of so many bytes, with so much room for them.
    pub(crate) fn read(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        size: u32,
        room: u32,
    ) -> Result<Vec<u8>> {
        let request = self.request(opcode::READ, node, &data(handle, offset, size));
        self.send_raw(&request, 16 + room).expect("an answer")
    }

    /// WRITE of so many bytes, whatever there are. Returns how many it was.
    pub(crate) fn write_file(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        size: u32,
        bytes: &[u8],
    ) -> Result<u32> {
        let body = [&data(handle, offset, size)[..], bytes].concat();
        self.call(opcode::WRITE, node, &body).map(|written| Reader(&written).u32().unwrap())
    }

    /// FLUSH, as for a close(2) of the guest's.
    pub(crate) fn flush(&mut self, node: u64, handle: u64) -> Result<()> {
        self.call(opcode::FLUSH, node, &[&handle.to_le_bytes()[..], &[0; 16]].concat()).map(drop)
    }

    pub(crate) fn release(&mut self, node: u64, handle: u64) -> Result<()> {
        self.call(opcode::RELEASE, node, &[&handle.to_le_bytes()[..], &[0; 16]].concat()).map(drop)
    }
}

/// `fuse_read_in`, and the beginning of WRITE.
fn data(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    [&handle.to_le_bytes()[..], &offset.to_le_bytes(), &size.to_le_bytes(), &[0; 20]].concat()
}
