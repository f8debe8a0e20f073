//! The device under test between a fake server and a driver that behaves as Linux's does.

mod data;
mod flow;
mod hostile;
mod life;

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, recv, sendmsg, shutdown,
    socketpair,
};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Fs, QUEUE_SIZES};
use crate::memory::Memory;
use crate::virtio::device::{DeviceError, VirtioDevice};
use crate::virtio::io::{DeviceIo, Interrupt};
use crate::virtio::registers::{RegisterPages, SlotRegisters};

const HIPRIO: usize = 0;
const REQUESTS: usize = 1;

/// Opcodes of `include/uapi/linux/fuse.h`.
mod op {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const CREATE: u32 = 35;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const DESTROY: u32 = 38;
    pub(super) const BATCH_FORGET: u32 = 42;
    pub(super) const TMPFILE: u32 = 51;
}

/// Where things are in guest memory: rings, indirect tables, then a buffer for each request. A border between regions is in a buffer.
const TABLES: u64 = 0x4_0000;
const TABLE_STRIDE: u64 = 0x2000;
const BUFFERS: u64 = 0x80_0000;
const BUFFER_STRIDE: u64 = 0x18_0000;
const BUFFER_COUNT: u16 = 48;
const BORDER: u64 = BUFFERS + 0x1100;
const MEMORY_END: u64 = BUFFERS + BUFFER_COUNT as u64 * BUFFER_STRIDE;

/// A descriptor's address and length.
type Part = (u64, u32);

/// The driver's side of a ring.
struct Ring {
    size: u16,
    base: u64,
    available: u16,
    used: u16,
}

impl Ring {
    fn new(number: usize) -> Self {
        Self { size: QUEUE_SIZES[number], base: 0x1_0000 * (number as u64 + 1), available: 0, used: 0 }
    }

    fn avail(&self) -> u64 {
        self.base + 0x2000
    }

    fn used(&self) -> u64 {
        self.base + 0x4000
    }

    fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        let low = |address: u64| Some(u32::try_from(address).unwrap());
        queue.set_desc_table_address(low(self.base), Some(0));
        queue.set_avail_ring_address(low(self.avail()), Some(0));
        queue.set_used_ring_address(low(self.used()), Some(0));
        queue.set_event_idx(true);
        queue.set_ready(true);
        queue
    }
}

/// A used chain: its head, and what the device has written to it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Used {
    head: u16,
    bytes: Vec<u8>,
}

impl Used {
    fn error(&self) -> i32 {
        assert_eq!(u32::from_le_bytes(self.bytes[..4].try_into().unwrap()) as usize, self.bytes.len());
        i32::from_le_bytes(self.bytes[4..8].try_into().unwrap())
    }

    fn unique(&self) -> u64 {
        u64::from_le_bytes(self.bytes[8..16].try_into().unwrap())
    }

    fn body(&self) -> &[u8] {
        assert_eq!(self.error(), 0);
        &self.bytes[16..]
    }
}

/// A request as the server gets it.
#[derive(Clone, Debug)]
struct Asked(Vec<u8>);

impl Asked {
    fn opcode(&self) -> u32 {
        u32::from_le_bytes(self.0[4..8].try_into().unwrap())
    }

    fn tag(&self) -> u64 {
        u64::from_le_bytes(self.0[8..16].try_into().unwrap())
    }

    fn body(&self) -> &[u8] {
        &self.0[40..]
    }
}

fn request(opcode: u32, unique: u64, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(40 + body.len()).unwrap();
    [&len.to_le_bytes()[..], &opcode.to_le_bytes(), &unique.to_le_bytes(), &[7; 24], body].concat()
}

fn reply(tag: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(16 + body.len()).unwrap();
    [&len.to_le_bytes()[..], &error.to_le_bytes(), &tag.to_le_bytes(), body].concat()
}

/// `fuse_read_in` and the beginning of `fuse_write_in`.
fn data_in(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    [&handle.to_le_bytes()[..], &offset.to_le_bytes(), &size.to_le_bytes(), &[0; 20]].concat()
}

fn open_out(handle: u64) -> Vec<u8> {
    [&handle.to_le_bytes()[..], &[0; 8]].concat()
}

/// The guest's driver and the server, with the device between them.
struct World {
    device: Fs,
    /// Waits for the device's host side as its thread does.
    watch: Epoll,
    watched: Option<vmm_sys_util::epoll::EventSet>,
    memory: Memory,
    rings: [Ring; 2],
    queues: Vec<Queue>,
    kicks: Vec<EventFd>,
    interrupt: Interrupt,
    /// Otherwise the device's thread hears of notifications.
    has_vcpus: bool,
    server: Option<OwnedFd>,
    /// Where each chain's writable pieces are.
    rooms: [Vec<Vec<Part>>; 2],
    unique: u64,
}

impl World {
    fn new() -> Self {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, server) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let device = Fs::new(ours, "shares").unwrap();
        let rings = [Ring::new(HIPRIO), Ring::new(REQUESTS)];
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        let registers = SlotRegisters::new(Arc::new(RegisterPages::new().unwrap()), 0);
        let range = |start: u64, end: u64| (GuestAddress(start), usize::try_from(end - start).unwrap());
        let mut world = Self {
            device,
            watch: Epoll::new().unwrap(),
            watched: None,
            memory: Memory::from_ranges(&[range(0, BORDER), range(BORDER, MEMORY_END)]).unwrap(),
            queues: rings.iter().map(Ring::queue).collect(),
            rooms: QUEUE_SIZES.map(|size| vec![Vec::new(); size.into()]),
            rings,
            kicks: vec![eventfd(), eventfd()],
            interrupt: Interrupt::new(registers, eventfd()),
            has_vcpus: true,
            server: Some(server),
            unique: 1000,
        };
        world.follow();
        world
    }

    fn work<R>(&mut self, work: impl FnOnce(&mut Fs, &mut DeviceIo<'_>) -> R) -> R {
        let mut io = DeviceIo::new(&self.memory, &mut self.queues, &self.kicks, &self.interrupt);
        let result = work(&mut self.device, &mut io);
        self.follow();
        result
    }

    /// What the slot does after each piece of work.
    fn follow(&mut self) {
        let wanted = self.device.host_events();
        if self.watched == Some(wanted) {
            return;
        }
        let Some(fd) = self.device.host_fd() else { return };
        let operation = if self.watched.is_none() { ControlOperation::Add } else { ControlOperation::Modify };
        self.watch.ctl(operation, fd, EpollEvent::new(wanted, 0)).unwrap();
        self.watched = Some(wanted);
    }

    fn host_ready(&self) -> bool {
        self.watch.wait(0, &mut [EpollEvent::default()]).unwrap() > 0
    }

    /// Lets the device work on its host's side until that has nothing for it. A device that spins fails the test.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            let kicked: Vec<_> = (0..2).filter(|queue| self.kicks[*queue].read().is_ok()).collect();
            for &queue in &kicked {
                self.work(|device, io| device.process_queue(queue, io)).unwrap();
            }
            if self.host_ready() {
                self.work(VirtioDevice::process_host).unwrap();
            } else if kicked.is_empty() {
                return;
            }
        }
        panic!("the device does not come to rest");
    }

    fn buffer(number: u16) -> u64 {
        BUFFERS + u64::from(number % BUFFER_COUNT) * BUFFER_STRIDE
    }

    fn describe(&self, at: u64, address: u64, length: u32, flags: u32, next: u16) {
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        let word = u64::from(length) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.memory.write_obj(word, GuestAddress(at + 8)).unwrap();
    }

    /// Makes a chain available, as one indirect table. True when the device wants to be notified.
    fn add_at(&mut self, queue: usize, head: u16, readable: &[Part], writable: &[Part]) -> bool {
        let table = TABLES + TABLE_STRIDE * (u64::from(head) + 128 * queue as u64);
        let parts = readable.iter().map(|part| (part, 0));
        let parts: Vec<_> = parts.chain(writable.iter().map(|part| (part, VRING_DESC_F_WRITE))).collect();
        for (number, ((address, length), flags)) in (0u16..).zip(&parts) {
            let next = if usize::from(number) + 1 == parts.len() { 0 } else { VRING_DESC_F_NEXT };
            self.describe(table + 16 * u64::from(number), *address, *length, flags | next, number + 1);
        }
        let ring = &self.rings[queue];
        let length = u32::try_from(16 * parts.len()).unwrap();
        self.describe(ring.base + 16 * u64::from(head), table, length, VRING_DESC_F_INDIRECT, 0);
        self.rooms[queue][usize::from(head)] = writable.to_vec();

        let ring = &mut self.rings[queue];
        let entry = ring.avail() + 4 + 2 * u64::from(ring.available % ring.size);
        self.memory.write_obj(head, GuestAddress(entry)).unwrap();
        ring.available = ring.available.wrapping_add(1);
        self.memory.write_obj(ring.available, GuestAddress(ring.avail() + 2)).unwrap();
        let event: u16 =
            self.memory.read_obj(GuestAddress(ring.used() + 4 + 8 * u64::from(ring.size))).unwrap();
        event == ring.available.wrapping_sub(1)
    }

    /// The driver notifies a queue: the vCPU works, and then the device's thread, if anything has been handed over to it.
    fn process(&mut self, queue: usize) -> Result<(), DeviceError> {
        if self.has_vcpus {
            self.notify(queue)?;
        }
        if !self.has_vcpus || self.handed_over(queue) { self.process_on_thread(queue) } else { Ok(()) }
    }

    fn notify(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.work(|device, io| device.notified(queue, io))
    }

    fn handed_over(&self, queue: usize) -> bool {
        self.kicks[queue].read().is_ok()
    }

    fn process_on_thread(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.work(|device, io| device.process_queue(queue, io))
    }

    /// Puts a request into guest memory in pieces of these sizes, the rest in one, and with so much room for the answer. Returns whether
    /// the device wants to be notified.
    fn put(&mut self, queue: usize, head: u16, bytes: &[u8], cuts: &[u32], room: &[u32]) -> bool {
        let mut at = Self::buffer(head);
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        let (mut readable, mut left) = (Vec::new(), u32::try_from(bytes.len()).unwrap());
        for cut in cuts.iter().copied().chain([u32::MAX]) {
            let part = left.min(cut);
            readable.push((at, part));
            at += u64::from(part);
            left -= part;
        }
        readable.retain(|(_, length)| *length > 0);
        // Pieces of the answer do not meet.
        let mut writable = Vec::new();
        for length in room {
            at += 3;
            writable.push((at, *length));
            at += u64::from(*length);
        }
        self.add_at(queue, head, &readable, &writable)
    }

    fn next_unique(&mut self) -> u64 {
        self.unique += 2;
        self.unique
    }

    /// Sends a request as Linux does: the header, the rest; room for a header, and for the rest. Returns its `unique`.
    fn ask(&mut self, head: u16, opcode: u32, body: &[u8], room: u32) -> u64 {
        let unique = self.next_unique();
        let bytes = request(opcode, unique, body);
        if self.put(REQUESTS, head, &bytes, &[40], &[16, room]) {
            self.process(REQUESTS).unwrap();
        }
        unique
    }

    /// The chains that the device has used since the last call.
    fn used(&mut self, queue: usize) -> Vec<Used> {
        let mut all = Vec::new();
        loop {
            let ring = &mut self.rings[queue];
            let index: u16 = self.memory.read_obj(GuestAddress(ring.used() + 2)).unwrap();
            if index == ring.used {
                return all;
            }
            let entry = ring.used() + 4 + 8 * u64::from(ring.used % ring.size);
            let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
            let length: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
            ring.used = ring.used.wrapping_add(1);
            let event = ring.avail() + 4 + 2 * u64::from(ring.size);
            self.memory.write_obj(ring.used, GuestAddress(event)).unwrap();
            let head = u16::try_from(head).unwrap();
            let mut bytes = Vec::new();
            for (address, room) in &self.rooms[queue][usize::from(head)] {
                let part = (*room as usize).min(length as usize - bytes.len());
                let mut piece = vec![0; part];
                self.memory.read_slice(&mut piece, GuestAddress(*address)).unwrap();
                bytes.extend(piece);
            }
            assert_eq!(bytes.len(), length as usize, "more than there is room for");
            all.push(Used { head, bytes });
        }
    }

    /// The only answer that there is by now.
    fn answer(&mut self) -> Used {
        let mut used = self.used(REQUESTS);
        assert_eq!(used.len(), 1, "{used:?}");
        used.remove(0)
    }

    /// What the server has been sent, if anything.
    fn asked(&self) -> Option<Asked> {
        let mut bytes = vec![0; 1 << 20];
        let fd = self.server.as_ref().unwrap().as_raw_fd();
        match recv(fd, &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(0) | Err(Errno::EAGAIN) => None,
            Ok(length) => {
                bytes.truncate(length);
                Some(Asked(bytes))
            }
            Err(errno) => panic!("{errno}"),
        }
    }

    /// The server sends a packet, perhaps with descriptors, and the device takes it.
    fn reply(&mut self, packet: &[u8], files: &[BorrowedFd<'_>]) {
        self.post(packet, files);
        self.settle();
    }

    fn post(&self, packet: &[u8], files: &[BorrowedFd<'_>]) {
        let raw: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let fd = self.server.as_ref().unwrap().as_raw_fd();
        sendmsg::<()>(fd, &[IoSlice::new(packet)], control, MsgFlags::MSG_DONTWAIT, None).unwrap();
    }

    /// The server ends the connection, whoever else has its end open.
    fn hang_up(&self) {
        let fd = self.server.as_ref().unwrap().as_raw_fd();
        shutdown(fd, Shutdown::Both).unwrap();
    }

    /// The server goes away. That it closes its end is not enough: a child that another test forks meanwhile has it open, too.
    fn end_server(&mut self) {
        if self.server.is_some() {
            self.hang_up();
            self.server = None;
        }
    }

    /// The guest opens a file, which the server calls `handle`.
    fn open(&mut self, handle: u64, file: &File) {
        use std::os::fd::AsFd;

        self.ask(0, op::OPEN, &[0; 8], 16);
        let tag = self.asked().unwrap().tag();
        self.reply(&reply(tag, 0, &open_out(handle)), &[file.as_fd()]);
        assert_eq!(self.answer().body(), open_out(handle));
    }

    /// Asks for something that the device answers by itself.
    fn ask_device(&mut self, opcode: u32, body: &[u8], room: u32) -> Used {
        let unique = self.ask(0, opcode, body, room);
        let used = self.answer();
        assert_eq!(used.unique(), unique);
        used
    }

    /// True when the device has interrupted the guest since the last call.
    fn interrupted(&self) -> bool {
        self.interrupt.line().read().is_ok()
    }
}

/// Descriptors of this process that are the file. Descriptors are counted by what they are, since tests run side by side.
fn open_files(file: &File) -> usize {
    use std::os::unix::fs::MetadataExt;

    let own = file.metadata().unwrap();
    let same = |entry: std::io::Result<std::fs::DirEntry>| {
        let metadata = std::fs::metadata(entry.ok()?.path()).ok()?;
        ((metadata.dev(), metadata.ino()) == (own.dev(), own.ino())).then_some(())
    };
    std::fs::read_dir("/proc/self/fd").unwrap().filter_map(same).count()
}

/// A file of the kernel's own tmpfs.
fn memory_file(content: &[u8]) -> File {
    let file =
        File::from(nix::sys::memfd::memfd_create("test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap());
    std::os::unix::fs::FileExt::write_all_at(&file, content, 0).unwrap();
    file
}

/// Bytes in which a lost or repeated piece shows.
fn pattern(length: usize) -> Vec<u8> {
    (0..=250u8).cycle().take(length).collect()
}
