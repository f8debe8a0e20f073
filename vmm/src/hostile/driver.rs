//! One slot with a device in it, and the driver's side: registers, rings, and a driver that behaves.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
};
use vm_memory::{Bytes, GuestAddress};

use super::file_server::{self, FileServer};
use crate::console_ring::{self, ConsoleRing};
use crate::devices::balloon::Balloon;
use crate::devices::block::disk::Disk;
use crate::devices::block::{Block, SECTOR};
use crate::devices::console::Console;
use crate::devices::fs::Fs;
use crate::devices::rng::Rng;
use crate::devices::vsock::Vsock;
use crate::memory::Memory;
use crate::virtio::device::VirtioDevice;
use crate::virtio::registers::{RegisterPages, SlotRegisters};
use crate::virtio::slot::{Slot, regs};

/// Guest memory: two regions that meet, a hole, and a third.
pub(super) const REGIONS: [(u64, u64); 3] = [(0, 0x2_0000), (0x2_0000, 0x4_0000), (0x8_0000, 0xa_0000)];
/// Rings and indirect tables are below, buffers above.
pub(super) const BUFFERS: u64 = 0x8000;
/// Where a chain may have its indirect table: so many places of so many descriptors.
pub(super) const TABLES: u64 = 0x6000;
pub(super) const TABLE_ENTRIES: u16 = 64;
/// What is in memory where nobody has written.
pub(super) const PATTERN: u8 = 0x5a;
/// What is on a disk where nobody has written. As a descriptor it is nowhere in memory.
const DISK_PATTERN: u8 = 0xa5;
pub(super) const DISK_SECTORS: u64 = 16;

/// What is in the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Disk,
    ReadOnlyDisk,
    Rng,
    Console,
    Balloon,
    Vsock,
    Fs,
}

pub(super) const KINDS: [Kind; 7] =
    [Kind::Disk, Kind::ReadOnlyDisk, Kind::Rng, Kind::Console, Kind::Balloon, Kind::Vsock, Kind::Fs];

/// A descriptor, 2.7.5 of the standard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Desc {
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
pub(super) const INDIRECT: u16 = 4;

/// The slot, and what its driver remembers.
pub(super) struct Driver {
    pub(super) kind: Kind,
    pub(super) slot: Slot,
    pub(super) memory: Arc<Memory>,
    pub(super) pages: Arc<RegisterPages>,
    pub(super) disk: File,
    console: File,
    sizes: &'static [u16],
    available: [u16; 3],
    used: [u16; 3],
    vsock: tempfile::TempDir,
    server: FileServer,
}

impl Driver {
    pub(super) fn new(kind: Kind) -> Self {
        let disk = tempfile::tempfile().unwrap();
        disk.write_all_at(&vec![DISK_PATTERN; usize::try_from(DISK_SECTORS * SECTOR).unwrap()], 0).unwrap();
        let console = tempfile::tempfile().unwrap();
        console.set_len(console_ring::FILE_SIZE as u64).unwrap();
        let vsock = tempfile::tempdir().unwrap();
        let mut server = FileServer::default();
        let device = device(kind, &disk, &console, &vsock, &mut server);
        let sizes = device.queue_sizes();

        let ranges = REGIONS.map(|(start, end)| (GuestAddress(start), usize::try_from(end - start).unwrap()));
        let memory = Arc::new(Memory::from_ranges(&ranges).unwrap());
        for (start, end) in REGIONS {
            let content = vec![PATTERN; usize::try_from(end - start).unwrap()];
            memory.write_slice(&content, GuestAddress(start)).unwrap();
        }
        let pages = Arc::new(RegisterPages::new().unwrap());
        let slot = Slot::new(0, SlotRegisters::new(Arc::clone(&pages), 0), Arc::clone(&memory)).unwrap();
        slot.plug(device).unwrap();
        let (available, used) = ([0; 3], [0; 3]);
        Self { kind, slot, memory, pages, disk, console, sizes, available, used, vsock, server }
    }

    /// A fresh device of the same kind with the same host side.
    pub(super) fn twin(&self) -> Box<dyn VirtioDevice> {
        let _ = std::fs::remove_file(self.vsock.path().join("socket"));
        device(self.kind, &self.disk, &self.console, &self.vsock, &mut FileServer::default())
    }

    /// A host program that wants to talk to the guest. Only where there is vsock.
    pub(super) fn dial(&self) -> UnixStream {
        UnixStream::connect(self.vsock.path().join("socket")).unwrap()
    }

    pub(super) fn queues(&self) -> usize {
        self.sizes.len()
    }

    pub(super) fn size(&self, queue: usize) -> u16 {
        self.sizes[queue]
    }

    pub(super) fn table(queue: usize) -> u64 {
        0x2000 * queue as u64
    }

    fn avail(queue: usize) -> u64 {
        Self::table(queue) + 0x1000
    }

    /// The used ring and the notification suppression behind it.
    pub(super) fn used_ring(&self, queue: usize) -> std::ops::Range<u64> {
        let start = Self::table(queue) + 0x1400;
        start..start + 4 + 8 * u64::from(self.size(queue)) + 2
    }

    pub(super) fn register(&self, offset: usize) -> u32 {
        let registers = SlotRegisters::new(Arc::clone(&self.pages), 0);
        u32::from_le(registers.word(offset).load(std::sync::atomic::Ordering::SeqCst))
    }

    fn write(&self, offset: usize, word: u32) {
        self.slot.write(offset, &word.to_le_bytes());
    }

    /// Resets the device and sets it up as a driver should, with empty rings.
    pub(super) fn set_up(&mut self) {
        self.write(regs::STATUS, 0);
        self.memory.write_slice(&vec![0; 0x6000], GuestAddress(0)).unwrap();
        (self.available, self.used) = ([0; 3], [0; 3]);
        let mut status = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
        self.write(regs::STATUS, status);
        for half in 0..2 {
            self.write(regs::DEVICE_FEATURES_SEL, half);
            self.write(regs::DRIVER_FEATURES_SEL, half);
            self.write(regs::DRIVER_FEATURES, self.register(regs::DEVICE_FEATURES));
        }
        status |= VIRTIO_CONFIG_S_FEATURES_OK;
        self.write(regs::STATUS, status);
        let low = |address: u64| u32::try_from(address).unwrap();
        for queue in 0..self.queues() {
            self.write(regs::QUEUE_SEL, u32::try_from(queue).unwrap());
            self.write(regs::QUEUE_SIZE, self.size(queue).into());
            for (register, address) in [
                (regs::QUEUE_DESC, Self::table(queue)),
                (regs::QUEUE_DRIVER, Self::avail(queue)),
                (regs::QUEUE_DEVICE, self.used_ring(queue).start),
            ] {
                self.write(register, low(address));
                self.write(register + 4, 0);
            }
            self.write(regs::QUEUE_READY, 1);
        }
        status |= VIRTIO_CONFIG_S_DRIVER_OK;
        self.write(regs::STATUS, status);
        assert_eq!(self.register(regs::STATUS), status, "a driver that behaves is let in");
    }

    pub(super) fn describe(&self, table: u64, index: u16, desc: Desc) {
        let at = table + 16 * u64::from(index);
        let word = u64::from(desc.length) | u64::from(desc.flags) << 32 | u64::from(desc.next) << 48;
        self.memory.write_obj(desc.address.to_le(), GuestAddress(at)).unwrap();
        self.memory.write_obj(word.to_le(), GuestAddress(at + 8)).unwrap();
    }

    pub(super) fn offer(&mut self, queue: usize, head: u16) {
        let entry = Self::avail(queue) + 4 + 2 * u64::from(self.available[queue] % self.size(queue));
        self.memory.write_obj(head.to_le(), GuestAddress(entry)).unwrap();
        self.available[queue] = self.available[queue].wrapping_add(1);
        self.memory.write_obj(self.available[queue].to_le(), GuestAddress(Self::avail(queue) + 2)).unwrap();
    }

    /// The chains that the device has used since the last call: heads and lengths. More than were offered fail the test.
    pub(super) fn take_used(&mut self, queue: usize) -> Vec<(u32, u32)> {
        let ring = self.used_ring(queue).start;
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        let count = index.wrapping_sub(self.used[queue]);
        assert!(
            count <= self.available[queue].wrapping_sub(self.used[queue]),
            "used {count} chains of queue {queue}, more than there were"
        );
        let entries = (0..count).map(|n| {
            let at = ring + 4 + 8 * u64::from(self.used[queue].wrapping_add(n) % self.size(queue));
            let read = |at| self.memory.read_obj::<u32>(GuestAddress(at)).unwrap();
            (read(at), read(at + 4))
        });
        let entries = entries.collect();
        self.used[queue] = index;
        entries
    }

    /// What the devices' thread does when all queues have been notified. A queue that asks for another turn gets a few more.
    pub(super) fn work(&self) {
        for _ in 0..4 {
            for queue in 0..self.queues() {
                self.slot.process_queue(queue);
            }
            self.server.reply();
            self.slot.process_host();
        }
    }

    /// All of guest memory.
    pub(super) fn content(&self) -> Vec<(u64, Vec<u8>)> {
        let read = |(start, end): (u64, u64)| {
            let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
            self.memory.read_slice(&mut bytes, GuestAddress(start)).unwrap();
            (start, bytes)
        };
        REGIONS.into_iter().map(read).collect()
    }

    /// Offers one buffer and returns what the device says it has written.
    fn ask(&mut self, queue: usize, parts: &[(u64, u32, u16)]) -> u32 {
        for (index, (address, length, flags)) in (0..).zip(parts) {
            let next = if usize::from(index) + 1 == parts.len() { 0 } else { NEXT };
            let desc = Desc { address: *address, length: *length, flags: flags | next, next: index + 1 };
            self.describe(Self::table(queue), index, desc);
        }
        self.offer(queue, 0);
        self.work();
        match self.take_used(queue)[..] {
            [(0, length)] => length,
            ref other => panic!("{:?} does not answer an orderly driver: {other:?}", self.kind),
        }
    }

    /// Opens the file server's file. Only where there is one.
    pub(super) fn open_file(&mut self) {
        let (request, reply) = (BUFFERS, BUFFERS + 0x1000);
        self.memory.write_slice(&file_server::open_request(), GuestAddress(request)).unwrap();
        assert_eq!(self.ask(1, &[(request, 48, 0), (reply, 32, WRITE)]), 32);
    }

    /// Whatever has happened: after a reset the device serves a driver that behaves.
    pub(super) fn assert_works(&mut self) {
        self.set_up();
        let (request, reply) = (BUFFERS, BUFFERS + 0x1000);
        let mut bytes = [0; 512];
        match self.kind {
            Kind::Disk | Kind::ReadOnlyDisk => {
                // The first usable sector of the read-only disk's partition table is its header.
                self.memory
                    .write_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], GuestAddress(request))
                    .unwrap();
                let parts = [(request, 16, 0), (reply, 512, WRITE), (reply + 512, 1, WRITE)];
                assert_eq!(self.ask(0, &parts), 513);
                self.memory.read_slice(&mut bytes, GuestAddress(reply)).unwrap();
                let mut expected = [0; 512];
                self.disk.read_exact_at(&mut expected, 512).unwrap();
                if self.kind == Kind::ReadOnlyDisk {
                    assert_eq!(&bytes[..8], b"EFI PART");
                } else {
                    assert_eq!(bytes, expected);
                }
            }
            Kind::Rng => assert_eq!(self.ask(0, &[(reply, 64, WRITE)]), 64),
            Kind::Console => {
                self.memory.write_slice(b"still here", GuestAddress(request)).unwrap();
                assert_eq!(self.ask(1, &[(request, 10, 0)]), 0);
                assert!(console_ring::read(&self.console).unwrap().ends_with(b"still here"));
            }
            Kind::Balloon => {
                self.memory.write_slice(&[1; 512], GuestAddress(reply)).unwrap();
                assert_eq!(self.ask(2, &[(reply, 4096, WRITE)]), 0);
                self.memory.read_slice(&mut bytes, GuestAddress(reply)).unwrap();
                assert_eq!(bytes, [0; 512]);
            }
            Kind::Vsock => {
                // A packet for nobody: cids 3 to 2, type stream, op RW.
                let mut packet = [0; 44];
                (packet[0], packet[8], packet[28], packet[30]) = (3, 2, 1, 5);
                self.memory.write_slice(&packet, GuestAddress(request)).unwrap();
                self.describe(
                    Self::table(0),
                    0,
                    Desc { address: reply, length: 4096, flags: WRITE, next: 0 },
                );
                self.offer(0, 0);
                assert_eq!(self.ask(1, &[(request, 44, 0)]), 0);
                assert_eq!(self.take_used(0), [(0, 44)]);
                self.memory.read_slice(&mut bytes, GuestAddress(reply)).unwrap();
                assert_eq!((bytes[8], bytes[30]), (3, 3), "an RST for this guest");
            }
            Kind::Fs => {
                self.open_file();
                self.memory.write_slice(&file_server::read_request(1, 9), GuestAddress(request)).unwrap();
                assert_eq!(self.ask(1, &[(request, 80, 0), (reply, 16, WRITE), (reply + 16, 9, WRITE)]), 25);
                self.memory.read_slice(&mut bytes, GuestAddress(reply)).unwrap();
                let mut expected = [0; 9];
                self.server.file().read_exact_at(&mut expected, 1).unwrap();
                assert_eq!(bytes[16..25], expected);
            }
        }
    }
}

fn device(
    kind: Kind,
    disk: &File,
    console: &File,
    vsock: &tempfile::TempDir,
    server: &mut FileServer,
) -> Box<dyn VirtioDevice> {
    let disk = || disk.try_clone().unwrap();
    match kind {
        Kind::Disk => Box::new(Block::new(Disk::whole(disk(), false).unwrap(), "serial")),
        Kind::ReadOnlyDisk => Box::new(Block::new(Disk::partitions(vec![disk()]).unwrap(), "serial")),
        Kind::Rng => Box::new(Rng),
        Kind::Console => Box::new(Console::new(Arc::new(Mutex::new(ConsoleRing::new(console).unwrap())))),
        Kind::Balloon => Box::new(Balloon::default()),
        Kind::Vsock => {
            let listener = UnixListener::bind(vsock.path().join("socket")).unwrap();
            Box::new(Vsock::new(listener.into(), 3).unwrap())
        }
        Kind::Fs => Box::new(Fs::new(server.connect(), "shares").unwrap()),
    }
}
