//! The device under test between real sockets and a driver that behaves as Linux's does: it notifies only when the rings ask for it.

mod close;
mod data;
mod hostile;
mod life;
mod model;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use tempfile::TempDir;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::packet::{CID_HOST, HEADER_SIZE, Header, TYPE_STREAM, op};
use super::{EVENT, QUEUE_SIZES, RX, TX, Vsock};
use crate::memory::Memory;
use crate::virtio::device::{DeviceError, VirtioDevice};
use crate::virtio::io::{DeviceIo, Interrupt};
use crate::virtio::registers::{RegisterPages, SlotRegisters};

const CID: u64 = 3;
const PORT: u32 = 1024;

/// Where things are in guest memory. One border between regions is inside a receive buffer, one inside the header of a packet to send.
const BORDERS: [u64; 2] = [RX_BUFFERS + 9 * RX_STRIDE + 0x100, TX_BUFFERS + 16];
const MEMORY_END: u64 = 0x80_0000;
const RX_BUFFERS: u64 = 0x10_0000;
const RX_STRIDE: u64 = 0x4000;
const TX_BUFFERS: u64 = 0x50_0000;
const TX_STRIDE: u64 = 0x2_0000;
const TX_SLOTS: u16 = 16;

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

    /// Makes a chain available. True when the device wants to be notified.
    fn add(&mut self, memory: &Memory, first: u16, parts: &[Part], flags: u32) -> bool {
        for (index, (address, length)) in parts.iter().enumerate() {
            let number = first + u16::try_from(index).unwrap();
            let at = GuestAddress(self.base + 16 * u64::from(number));
            let last = index + 1 == parts.len();
            let flags = u16::try_from(if last { flags } else { flags | VRING_DESC_F_NEXT }).unwrap();
            memory.write_obj(*address, at).unwrap();
            memory
                .write_obj(
                    u64::from(*length) | u64::from(flags) << 32 | u64::from(number + 1) << 48,
                    GuestAddress(at.0 + 8),
                )
                .unwrap();
        }
        let entry = self.avail() + 4 + 2 * u64::from(self.available % self.size);
        memory.write_obj(first, GuestAddress(entry)).unwrap();
        self.available = self.available.wrapping_add(1);
        memory.write_obj(self.available, GuestAddress(self.avail() + 2)).unwrap();
        let event: u16 = memory.read_obj(GuestAddress(self.used() + 4 + 8 * u64::from(self.size))).unwrap();
        event == self.available.wrapping_sub(1)
    }

    /// The next chain that the device has used: its first descriptor, and the bytes written to it.
    fn take(&mut self, memory: &Memory) -> Option<(u16, u32)> {
        let index: u16 = memory.read_obj(GuestAddress(self.used() + 2)).unwrap();
        if index == self.used {
            return None;
        }
        let entry = self.used() + 4 + 8 * u64::from(self.used % self.size);
        let head: u32 = memory.read_obj(GuestAddress(entry)).unwrap();
        let length: u32 = memory.read_obj(GuestAddress(entry + 4)).unwrap();
        self.used = self.used.wrapping_add(1);
        let event = self.avail() + 4 + 2 * u64::from(self.size);
        memory.write_obj(self.used, GuestAddress(event)).unwrap();
        Some((u16::try_from(head).unwrap(), length))
    }
}

/// A packet as the guest got it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    header: Header,
    data: Vec<u8>,
}

/// The guest's driver, with the device.
struct Guest {
    device: Vsock,
    /// Waits for the device's host side as the VMM's thread does.
    watch: Epoll,
    memory: Memory,
    rings: [Ring; 3],
    queues: Vec<Queue>,
    kicks: Vec<EventFd>,
    interrupt: Interrupt,
    /// Bytes of a receive buffer, with the header.
    rx_size: u32,
    /// Used receive buffers go back at once.
    refill: bool,
    directory: TempDir,
}

impl Guest {
    /// A guest with no receive buffers yet.
    fn empty() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        let rings = [Ring::new(RX), Ring::new(TX), Ring::new(EVENT)];
        let eventfd = || EventFd::new(EFD_NONBLOCK).unwrap();
        let registers = SlotRegisters::new(Arc::new(RegisterPages::new().unwrap()), 0);
        let range = |start: u64, end: u64| (GuestAddress(start), usize::try_from(end - start).unwrap());
        let ranges = [range(0, BORDERS[0]), range(BORDERS[0], BORDERS[1]), range(BORDERS[1], MEMORY_END)];
        let device = Vsock::new(listener.into(), CID).unwrap();
        let watch = Epoll::new().unwrap();
        watch
            .ctl(ControlOperation::Add, device.host_fd().unwrap(), EpollEvent::new(EventSet::IN, 0))
            .unwrap();
        Self {
            device,
            watch,
            memory: Memory::from_ranges(&ranges).unwrap(),
            queues: rings.iter().map(Ring::queue).collect(),
            rings,
            kicks: vec![eventfd(), eventfd(), eventfd()],
            interrupt: Interrupt::new(registers, eventfd()),
            rx_size: 4096,
            refill: true,
            directory,
        }
    }

    /// A guest as Linux is: all receive buffers are there.
    fn new() -> Self {
        let mut guest = Self::empty();
        guest.give_all();
        guest
    }

    fn work<R>(&mut self, work: impl FnOnce(&mut Vsock, &mut DeviceIo<'_>) -> R) -> R {
        let mut io = DeviceIo::new(&self.memory, &mut self.queues, &self.kicks, &self.interrupt);
        work(&mut self.device, &mut io)
    }

    fn process(&mut self, queue: usize) -> Result<(), DeviceError> {
        self.work(|device, io| device.process_queue(queue, io))
    }

    fn give_all(&mut self) {
        for number in 0..QUEUE_SIZES[RX] {
            self.give(number);
        }
    }

    /// Gives the device one receive buffer.
    fn give(&mut self, number: u16) {
        let part = (RX_BUFFERS + u64::from(number) * RX_STRIDE, self.rx_size);
        if self.rings[RX].add(&self.memory, number, &[part], VRING_DESC_F_WRITE) {
            self.process(RX).unwrap();
        }
    }

    fn host_ready(&self) -> bool {
        self.watch.wait(0, &mut [EpollEvent::default()]).unwrap() > 0
    }

    /// Lets the device work until it waits. A device that never does fails the test.
    fn settle(&mut self) -> Result<(), DeviceError> {
        for _ in 0..10_000 {
            let kicked = self.kicks.iter().position(|kick| kick.read().is_ok());
            if let Some(queue) = kicked {
                self.process(queue)?;
            } else if self.host_ready() {
                self.work(VirtioDevice::process_host)?;
            } else {
                return Ok(());
            }
        }
        panic!("the device is never idle");
    }

    /// The next packet in the guest's buffers, with the number of its buffer.
    fn take(&mut self) -> Option<(u16, Packet)> {
        let (head, length) = self.rings[RX].take(&self.memory)?;
        let mut bytes = vec![0; length as usize];
        let at = RX_BUFFERS + u64::from(head) * RX_STRIDE;
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        let header = Header::from_bytes(&bytes[..HEADER_SIZE].try_into().unwrap());
        assert_eq!(header.len as usize, bytes.len() - HEADER_SIZE);
        assert_eq!(header.dst_cid, CID);
        Some((head, Packet { header, data: bytes.split_off(HEADER_SIZE) }))
    }

    /// What the device has for the guest by now.
    fn packets(&mut self) -> Vec<Packet> {
        self.settle().unwrap();
        let mut packets = Vec::new();
        while let Some((head, packet)) = self.take() {
            packets.push(packet);
            if self.refill {
                self.give(head);
                self.settle().unwrap();
            }
        }
        assert_eq!(self.queues[RX].next_avail(), self.rings[RX].used, "the device keeps a buffer");
        packets
    }

    /// The only packet that there is by now.
    fn packet(&mut self) -> Packet {
        let mut packets = self.packets();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    /// Sends bytes cut into descriptors of these lengths.
    fn send_cut(&mut self, bytes: &[u8], cuts: &[u32]) -> Result<(), DeviceError> {
        let slot = self.rings[TX].available % TX_SLOTS;
        let mut at = TX_BUFFERS + u64::from(slot) * TX_STRIDE;
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        let mut parts = Vec::new();
        for &cut in cuts {
            parts.push((at, cut));
            at += u64::from(cut);
        }
        let notify = self.rings[TX].add(&self.memory, slot * TX_SLOTS, &parts, 0);
        if notify {
            self.process(TX)?;
        }
        while self.rings[TX].take(&self.memory).is_some() {}
        Ok(())
    }

    fn try_send(&mut self, header: Header, data: &[u8]) -> Result<(), DeviceError> {
        let bytes = [&header.to_bytes()[..], data].concat();
        let cuts = [u32::try_from(HEADER_SIZE).unwrap(), u32::try_from(data.len()).unwrap()];
        self.send_cut(&bytes, if data.is_empty() { &cuts[..1] } else { &cuts })
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        self.try_send(header, data).unwrap();
    }

    /// A host program that has connected to the device's socket.
    fn dial(&self) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("vsock")).unwrap();
        // A test that would wait for ever fails instead.
        stream.set_read_timeout(Some(std::time::Duration::from_mins(1))).unwrap();
        stream
    }

    /// An open connection whose guest side has room for so many bytes.
    fn connect(&mut self, buf_alloc: u32) -> (UnixStream, Socket) {
        let mut host = self.dial();
        writeln!(host, "CONNECT {PORT}").unwrap();
        let request = self.packet().header;
        assert_eq!((request.op, request.dst_port, request.src_cid), (op::REQUEST, PORT, CID_HOST));
        let mut socket = Socket { local_port: request.src_port, buf_alloc, ..Socket::default() };
        socket.hear(&request);
        self.send(socket.header(op::RESPONSE), &[]);
        let mut line = String::new();
        BufReader::with_capacity(1, &host).read_line(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", socket.local_port));
        assert_eq!(self.packets(), []);
        (host, socket)
    }

    /// Sends until the device keeps something because the host's socket is full. Returns what was sent.
    fn stuff(&mut self, socket: &mut Socket) -> Vec<u8> {
        let mut sent = Vec::new();
        while socket.room() > 0 {
            let data = pattern(socket.room());
            socket.send(self, &data);
            sent.extend(data);
            self.packets().iter().for_each(|packet| socket.hear(&packet.header));
        }
        sent
    }

    /// Reads to the end of what the device has for the host program.
    fn drain(&mut self, mut host: &UnixStream) -> Vec<u8> {
        let mut received = Vec::new();
        let mut part = vec![0; 1 << 20];
        loop {
            self.settle().unwrap();
            match host.read(&mut part).unwrap() {
                0 => return received,
                count => received.extend_from_slice(&part[..count]),
            }
        }
    }

    /// True when the device has interrupted the guest since the last call.
    fn interrupted(&self) -> bool {
        self.interrupt.line().read().is_ok()
    }
}

/// The guest's side of a connection.
#[derive(Clone, Debug, Default)]
struct Socket {
    local_port: u32,
    buf_alloc: u32,
    consumed: u32,
    sent: u32,
    peer_alloc: u32,
    peer_forwarded: u32,
}

impl Socket {
    fn header(&self, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: CID_HOST,
            src_port: PORT,
            dst_port: self.local_port,
            kind: TYPE_STREAM,
            op,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.consumed,
            ..Header::default()
        }
    }

    fn shutdown(&self, flags: u32) -> Header {
        Header { flags, ..self.header(op::SHUTDOWN) }
    }

    fn hear(&mut self, header: &Header) {
        (self.peer_alloc, self.peer_forwarded) = (header.buf_alloc, header.fwd_cnt);
    }

    /// Bytes that may be sent.
    fn room(&self) -> usize {
        (self.peer_alloc - self.sent.wrapping_sub(self.peer_forwarded)) as usize
    }

    /// Sends data, which there must be room for.
    fn send(&mut self, guest: &mut Guest, data: &[u8]) {
        assert!(data.len() <= self.room());
        let len = u32::try_from(data.len()).unwrap();
        self.sent = self.sent.wrapping_add(len);
        guest.send(Header { len, ..self.header(op::RW) }, data);
    }
}

/// Bytes in which a lost or repeated piece shows.
fn pattern(length: usize) -> Vec<u8> {
    (0..=250u8).cycle().take(length).collect()
}

/// True when the host program reads the end of the file.
fn at_end(mut host: &UnixStream) -> bool {
    host.read(&mut [0]).unwrap() == 0
}

/// True when the host program can write no more.
fn is_broken(mut host: &UnixStream) -> bool {
    host.write(&[0]).is_err_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}
