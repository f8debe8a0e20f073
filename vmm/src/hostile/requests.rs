//! Random descriptor chains: pieces anywhere and of any length, in any order and access, in loops and in indirect tables.

use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{
    BUFFERS, DISK_SECTORS, Desc, Driver, INDIRECT, KINDS, Kind, NEXT, REGIONS, TABLE_ENTRIES, TABLES, WRITE,
};
use super::{allocations, file_server};
use crate::devices::block::SECTOR;
use crate::virtio::slot::regs;

/// Bytes that the device may ask for while it works through its rings: vectors of slices, a packet's bytes. A length that the guest
/// claims may be 4 GiB.
const ALLOCATION_MAX: usize = 4 << 20;

/// One descriptor of a chain. Its `next` is the one behind it unless it says otherwise.
#[derive(Clone, Debug)]
struct Piece {
    address: u64,
    length: u32,
    flags: u16,
    next: Option<u16>,
}

#[derive(Clone, Debug)]
struct Chain {
    queue: usize,
    pieces: Vec<Piece>,
    /// What the readable pieces hold, one behind the other.
    payload: Vec<u8>,
    indirect: Option<Table>,
}

/// An indirect table: where it is said to be and how long.
#[derive(Clone, Debug)]
struct Table {
    elsewhere: Option<u64>,
    length: Option<u32>,
}

fn address() -> impl Strategy<Value = u64> {
    let around = |at: u64| at - 64..at + 64;
    prop_oneof![
        12 => BUFFERS..REGIONS[0].1 - 0x2000,
        2 => (BUFFERS / 4096..REGIONS[0].1 / 4096).prop_map(|page| page * 4096),
        3 => around(REGIONS[0].1),
        2 => around(REGIONS[1].1),
        1 => around(REGIONS[2].0),
        1 => around(REGIONS[2].1),
        1 => REGIONS[1].1..REGIONS[2].0,
        1 => 0..BUFFERS,
        1 => u64::MAX - 0x1000..=u64::MAX,
        1 => any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        1 => Just(0),
        6 => 1..64u32,
        4 => (1..9u32).prop_map(|n| 512 * n),
        2 => (1..3u32).prop_map(|n| 4096 * n),
        3 => 1..0x2000u32,
        1 => 0x2_0000..0x20_0000u32,
        1 => u32::MAX - 0x1000..=u32::MAX,
        1 => any::<u32>(),
    ]
}

fn piece() -> impl Strategy<Value = Piece> {
    let flags = prop_oneof![8 => Just(NEXT), 8 => Just(NEXT | WRITE), 1 => any::<u16>(), 1 => 0..8u16];
    let next = prop::option::weighted(0.05, prop_oneof![0..128u16, any::<u16>()]);
    (address(), length(), flags, next).prop_map(|(address, length, flags, next)| Piece {
        address,
        length,
        flags,
        next,
    })
}

/// What a device would take for the beginning of a request.
fn payload() -> impl Strategy<Value = Vec<u8>> {
    let sector = prop_oneof![8 => 0..DISK_SECTORS + 3, 1 => u64::MAX - 20..=u64::MAX, 1 => any::<u64>(), 1 => Just(1 << 55)];
    let kind = prop_oneof![4 => Just(0u32), 4 => Just(1), 2 => Just(4), 2 => Just(8), 1 => 0..20u32, 1 => any::<u32>()];
    let block = (kind, sector, prop::collection::vec(any::<u8>(), 0..64)).prop_map(|(kind, sector, data)| {
        [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), &data].concat()
    });
    let number = || prop_oneof![0..70u32, Just(1 << 18), any::<u32>()];
    let vsock = (0..10u16, 0..4u16, number(), number(), number(), number()).prop_map(
        |(op, kind, port, len, alloc, count)| {
            let mut packet = [[3, 0, 0, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0, 0]].concat();
            packet.extend([1024u32.to_le_bytes(), port.to_le_bytes(), len.to_le_bytes()].concat());
            packet.extend([kind.to_le_bytes(), op.to_le_bytes()].concat());
            packet.extend([0u32.to_le_bytes(), alloc.to_le_bytes(), count.to_le_bytes()].concat());
            packet
        },
    );
    prop_oneof![6 => block, 2 => vsock, 1 => prop::collection::vec(any::<u8>(), 0..5000)]
}

/// Chains that are nearly what a driver of a disk sends: a header, perhaps in two pieces, data, and a status.
fn disk_request() -> impl Strategy<Value = Vec<Piece>> {
    let data = prop::collection::vec(
        prop_oneof![4 => Just(512u32), 2 => Just(1024), 1 => Just(4096), 1 => 0..600u32],
        0..5,
    );
    let status = prop_oneof![8 => Just(1u32), 1 => 0..4u32];
    let flip = prop::option::weighted(0.1, 0..6usize);
    (BUFFERS..REGIONS[0].1 - 0x100, 0..17u32, any::<bool>(), data, address(), status, flip).prop_map(
        |(header, cut, reads, data, mut at, status, flip)| {
            let piece =
                |address: u64, length, flags| Piece { address, length, flags: flags | NEXT, next: None };
            let mut pieces = vec![piece(header, cut, 0), piece(header + u64::from(cut), 16 - cut, 0)];
            pieces.retain(|piece| piece.length > 0);
            for length in data {
                pieces.push(piece(at, length, if reads { WRITE } else { 0 }));
                at = at.wrapping_add(u64::from(length));
            }
            pieces.push(piece(at, status, WRITE));
            if let Some(flipped) = flip.and_then(|index| pieces.get_mut(index)) {
                flipped.flags ^= WRITE;
            }
            pieces
        },
    )
}

/// Chains that are nearly reports of free pages.
fn page_report() -> impl Strategy<Value = Vec<Piece>> {
    let pages = |(start, end): (u64, u64)| start / 4096..end / 4096;
    let page = prop_oneof![
        6 => pages((BUFFERS, REGIONS[0].1)),
        2 => pages(REGIONS[1]),
        2 => pages(REGIONS[2]),
        1 => 0..0x100u64,
    ];
    let length = prop_oneof![8 => (1..4u32).prop_map(|n| 4096 * n), 1 => length()];
    let piece = (page, length).prop_map(|(page, length)| Piece {
        address: page * 4096,
        length,
        flags: NEXT | WRITE,
        next: None,
    });
    prop::collection::vec(piece, 1..6)
}

/// Chains that are nearly what a driver of a file system sends, and what they hold.
fn file_request() -> impl Strategy<Value = (Vec<Piece>, Vec<u8>)> {
    let opcode = prop_oneof![
        2 => prop::sample::select(vec![1u32, 2, 3, 14, 18, 25, 35, 36, 38, 42]),
        1 => any::<u32>(),
    ];
    let body = prop_oneof![4 => Just(8usize), 2 => 0..200usize, 1 => 0..5000usize];
    let other = (opcode, body).prop_map(|(opcode, length)| file_server::request(opcode, &vec![0; length]));
    let offset = prop_oneof![4 => 0..50u64, 1 => any::<u64>()];
    let size = prop_oneof![4 => 0..100u32, 1 => any::<u32>()];
    let transfer = (any::<bool>(), 0..2u64, offset, size, prop::collection::vec(any::<u8>(), 0..100))
        .prop_map(|(reads, handle, offset, size, data)| {
            let data = if reads { Vec::new() } else { data };
            let size = if reads || size > 50 { size } else { u32::try_from(data.len()).unwrap() };
            file_server::request(
                16 - u32::from(reads),
                &[file_server::data_in(handle, offset, size), data].concat(),
            )
        });
    let len = prop::option::weighted(0.1, any::<u32>());
    let rooms = prop::collection::vec((address(), prop_oneof![Just(16u32), 0..200u32]), 0..4);
    (prop_oneof![transfer, other], len, BUFFERS..REGIONS[0].1 - 0x2000, 0..100u32, rooms).prop_map(
        |(mut bytes, len, address, cut, rooms)| {
            let length = u32::try_from(bytes.len()).unwrap();
            if let Some(len) = len {
                bytes[..4].copy_from_slice(&len.to_le_bytes());
            }
            let piece =
                |address: u64, length, flags| Piece { address, length, flags: flags | NEXT, next: None };
            let cut = cut.min(length);
            let mut pieces = vec![piece(address, cut, 0), piece(address + u64::from(cut), length - cut, 0)];
            pieces.retain(|piece| piece.length > 0);
            pieces.extend(rooms.into_iter().map(|(address, length)| piece(address, length, WRITE)));
            (pieces, bytes)
        },
    )
}

fn chain() -> impl Strategy<Value = Chain> {
    let pieces = prop_oneof![
        5 => disk_request(),
        3 => page_report(),
        4 => prop::collection::vec(piece(), 1..8),
        1 => prop::collection::vec(piece(), 1..usize::from(TABLE_ENTRIES)),
    ];
    let elsewhere = prop::option::weighted(0.1, address());
    let length = prop::option::weighted(0.2, length());
    let table = (elsewhere, length).prop_map(|(elsewhere, length)| Table { elsewhere, length });
    let request = prop_oneof![3 => (pieces, payload()), 1 => file_request()];
    (0..3usize, request, prop::option::weighted(0.3, table))
        .prop_map(|(queue, (pieces, payload), indirect)| Chain { queue, pieces, payload, indirect })
}

/// What the device may write, by what the driver has put into the rings.
#[derive(Default)]
struct Given {
    writable: Vec<Range<u64>>,
    /// The driver has given the rings themselves, or takes other memory for a table: then the rings may come to say anything.
    anything: bool,
}

impl Given {
    fn piece(&mut self, piece: &Piece) {
        if piece.flags & WRITE != 0 {
            let end = piece.address.saturating_add(piece.length.into());
            self.anything |= piece.address < BUFFERS && piece.length > 0;
            self.writable.push(piece.address..end);
        }
        // A table in a table is refused, a table that an ordinary piece happens to be is somewhere in memory.
        self.anything |= piece.flags & INDIRECT != 0;
    }

    fn allows(&self, address: u64) -> bool {
        self.writable.iter().any(|range| range.contains(&address))
    }
}

/// Puts chains into the rings. The descriptors of a queue go on where those of the chain before ended.
fn offer(driver: &mut Driver, chains: &[Chain]) -> Given {
    let mut given = Given::default();
    let mut free = [0u16; 3];
    for (number, chain) in (0u16..).zip(chains) {
        let queue = chain.queue % driver.queues();
        let count = u16::try_from(chain.pieces.len()).unwrap();
        let needed = if chain.indirect.is_some() { 1 } else { count };
        if free[queue] + needed > driver.size(queue) {
            continue;
        }
        let head = free[queue];
        free[queue] += needed;
        let own_table = TABLES + 16 * u64::from(TABLE_ENTRIES) * u64::from(number);
        let (table, first) = match &chain.indirect {
            None => (Driver::table(queue), head),
            Some(indirect) => {
                given.anything |= indirect.elsewhere.is_some();
                let length = indirect.length.unwrap_or(16 * u32::from(count));
                let address = indirect.elsewhere.unwrap_or(own_table);
                let desc = Desc { address, length, flags: INDIRECT, next: 0 };
                driver.describe(Driver::table(queue), head, desc);
                (own_table, 0)
            }
        };
        let mut payload = &chain.payload[..];
        for (index, piece) in (0u16..).zip(&chain.pieces) {
            let last = index + 1 == count;
            let flags = if last && piece.next.is_none() { piece.flags & !NEXT } else { piece.flags };
            let next = piece.next.unwrap_or(first + index + 1);
            let (address, length) = (piece.address, piece.length);
            driver.describe(table, first + index, Desc { address, length, flags, next });
            given.piece(piece);
            if piece.flags & WRITE == 0 && (BUFFERS..u64::MAX / 2).contains(&address) {
                let (now, later) = payload.split_at(payload.len().min(length as usize));
                // What does not fit into memory is not there to be read.
                let _ = driver.memory.write(now, GuestAddress(address));
                payload = later;
            }
        }
        driver.offer(queue, head);
    }
    given
}

fn attack(kind: Kind, chains: &[Chain]) {
    let mut driver = Driver::new(kind);
    driver.set_up();
    if kind == Kind::Fs {
        driver.open_file();
    }
    let given = offer(&mut driver, chains);
    let host = (kind == Kind::Vsock).then(|| driver.dial());
    if let Some(mut host) = host.as_ref() {
        host.write_all(b"CONNECT 1024\n").unwrap();
    }
    let before = driver.content();
    let ((), allocated) = allocations::during(|| driver.work());
    assert!(allocated < ALLOCATION_MAX, "{allocated} bytes for {chains:?}");
    drop(host);

    if !given.anything {
        let rings: Vec<_> = (0..driver.queues()).map(|queue| driver.used_ring(queue)).collect();
        for ((start, before), (_, after)) in before.iter().zip(driver.content()) {
            let changed =
                before.iter().zip(&after).enumerate().filter(|(_, (before, after))| before != after);
            for address in changed.map(|(offset, _)| start + offset as u64) {
                assert!(
                    given.allows(address) || rings.iter().any(|ring| ring.contains(&address)),
                    "{address:#x} was written, which is in no buffer"
                );
            }
        }
        for queue in 0..driver.queues() {
            let room: u64 = given.writable.iter().map(|range| range.end - range.start).sum();
            for (head, length) in driver.take_used(queue) {
                assert!(head < u32::from(driver.size(queue)) && u64::from(length) <= room);
            }
        }
    }
    if kind == Kind::ReadOnlyDisk {
        let mut content = vec![0; 4096];
        driver.disk.read_exact_at(&mut content, 0).unwrap();
        assert!(content.iter().all(|&byte| byte == 0xa5), "a read-only disk was written");
    }
    assert_eq!(driver.disk.metadata().unwrap().len(), DISK_SECTORS * SECTOR, "the disk has another size");

    // A device that has stopped does nothing until it is reset.
    if driver.register(regs::STATUS) & 0x40 != 0 && !given.anything {
        let before = driver.content();
        driver.work();
        assert!(before == driver.content(), "a device that needs a reset has gone on");
    }
    driver.assert_works();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn no_chain_reaches_beyond_what_it_gives(chains in prop::collection::vec(chain(), 1..8)) {
        for kind in KINDS {
            attack(kind, &chains);
        }
    }
}

/// Chains of one queue entry each that go round for ever, or would take the device long.
#[test]
fn loops_and_endless_tables_end() {
    for kind in KINDS {
        for flags in [NEXT, NEXT | WRITE] {
            let mut driver = Driver::new(kind);
            driver.set_up();
            for queue in 0..driver.queues() {
                let size = driver.size(queue);
                for index in 0..size {
                    let desc = Desc { address: BUFFERS, length: 1, flags, next: index };
                    driver.describe(Driver::table(queue), index, desc);
                    driver.offer(queue, index);
                }
            }
            let ((), allocated) = allocations::during(|| driver.work());
            assert!(allocated < ALLOCATION_MAX, "{kind:?}: {allocated}");
            driver.assert_works();
        }
    }
}
