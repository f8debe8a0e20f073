//! A driver and a server that break the rules.

use std::os::fd::AsFd;

use proptest::prelude::*;

use super::super::REQUEST_MAX;
use super::*;

/// What a server replies to a tag.
type Make = fn(u64) -> Vec<u8>;

/// The answer to a request, of which the server makes what it likes.
fn answered(room: u32, opcode: u32, make: impl FnOnce(u64) -> Vec<u8>, files: &[BorrowedFd<'_>]) -> Used {
    let mut world = World::new();
    let unique = world.ask(0, opcode, &[0; 16], room);
    let tag = world.asked().unwrap().tag();
    world.reply(&make(tag), files);
    let used = world.answer();
    assert_eq!(used.unique(), unique);
    used
}

#[test]
fn replies_that_are_malformed_or_do_not_fit_become_errors() {
    let cut = |tag| {
        let mut bytes = reply(tag, 0, &[1; 50]);
        bytes.truncate(40);
        bytes
    };
    let long = |tag| [reply(tag, 0, &[1; 50]), vec![0; 10]].concat();
    let makes: [(&str, Make); 7] = [
        ("cut short", cut),
        ("longer than it says", long),
        ("more than there is room for", |tag| reply(tag, 0, &[1; 105])),
        ("more than a packet may hold", |tag| reply(tag, 0, &vec![1; 140 << 10])),
        ("an error with a body", |tag| reply(tag, -libc::ENOENT, &[1; 10])),
        ("an error of the wrong sign", |tag| reply(tag, libc::ENOENT, &[])),
        ("no error of Linux's", |tag| reply(tag, i32::MIN, &[])),
    ];
    for (what, make) in makes {
        assert_eq!(answered(104, op::GETATTR, make, &[]).error(), -libc::EIO, "{what}");
    }
}

#[test]
fn files_that_come_without_need_are_closed() {
    let file = tempfile::tempfile().unwrap();
    let fd = file.as_fd();
    for (opcode, body, files, error) in [
        (op::GETATTR, vec![0; 16], vec![fd], 0),
        (op::OPEN, open_out(1), vec![], -libc::EIO),
        (op::OPEN, vec![0; 7], vec![fd], -libc::EIO),
        (op::OPEN, open_out(1), vec![fd, fd], 0),
        (op::OPEN, open_out(1), vec![fd; 200], 0),
        (op::OPEN, vec![0; 300], vec![fd], -libc::EIO),
        (op::OPEN, vec![0; 140 << 10], vec![fd], -libc::EIO),
    ] {
        let used = answered(104, opcode, |tag| reply(tag, 0, &body), &files);
        assert_eq!(used.error(), error, "{} files, {} bytes", files.len(), body.len());
        assert_eq!(open_files(&file), 1, "the device is gone, and with it what it had");
    }
    let used = answered(16, op::OPEN, |tag| reply(tag, -libc::EACCES, &[]), &[fd]);
    assert_eq!(used.error(), -libc::EACCES);

    let mut world = World::new();
    world.ask(0, op::OPEN, &[0; 8], 16);
    let tag = world.asked().unwrap().tag();
    for packet in [reply(tag ^ 1, 0, &open_out(1)), reply(0, 0, &[]), reply(u64::MAX, 0, &[]), vec![1; 15]] {
        world.reply(&packet, &[fd]);
    }
    assert!(world.used(REQUESTS).is_empty());
    world.reply(&reply(tag, 0, &open_out(1)), &[fd, fd]);
    world.reply(&reply(tag, 0, &open_out(2)), &[fd]);
    assert_eq!((world.answer().error(), world.device.handles.len(), open_files(&file)), (0, 1, 2));
}

#[test]
fn a_handle_that_the_server_gives_twice_is_the_last_file() {
    let (first, second) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let mut world = World::new();
    world.open(5, &first);
    world.open(5, &second);
    assert_eq!((open_files(&first), open_files(&second)), (1, 2));
}

#[test]
fn an_empty_packet_ends_the_connection() {
    let mut world = World::new();
    world.ask(0, op::GETATTR, &[0; 16], 104);
    world.reply(&[], &[]);
    assert_eq!(world.answer().error(), -libc::EIO);
}

#[test]
fn requests_whose_length_is_not_theirs_are_answered_with_an_error() {
    let mut world = World::new();
    for len in [0, 39, 40, 55, 57, u32::MAX] {
        let mut bytes = request(op::GETATTR, 4, &[0; 16]);
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        world.put(REQUESTS, 0, &bytes, &[40], &[16, 104]);
        world.process(REQUESTS).unwrap();
        let answer = world.answer();
        assert_eq!((answer.unique(), answer.error()), (4, -libc::EIO), "{len}");
    }
    world.put(REQUESTS, 0, &[0; 39], &[], &[16, 104]);
    world.process(REQUESTS).unwrap();
    assert!(world.answer().bytes.is_empty());
    assert_eq!(world.ask_device(op::OPEN, &[0; 8], 15).error(), -libc::EIO, "no room for a handle");
    for (length, accepted) in [(REQUEST_MAX - 40, true), (REQUEST_MAX - 39, false)] {
        world.ask(0, op::GETATTR, &vec![0; length], 104);
        assert_eq!(world.asked().is_some(), accepted);
    }
    assert_eq!(world.answer().error(), -libc::EIO);
}

#[test]
fn chains_that_no_request_can_have_stop_the_device() {
    let many = vec![(BUFFERS, 1); 513];
    let chains: [(&str, &[Part], &[Part]); 5] = [
        ("outside memory", &[(MEMORY_END, 40)], &[]),
        ("across the end of memory", &[(MEMORY_END - 39, 40)], &[]),
        ("an answer outside memory", &[(BUFFERS, 40)], &[(MEMORY_END - 1, 16)]),
        ("at the end of all addresses", &[(BUFFERS, 40)], &[(u64::MAX - 10, 16)]),
        ("too many pieces", &many, &[]),
    ];
    for (what, readable, writable) in chains {
        let mut world = World::new();
        world.memory.write_slice(&request(op::GETATTR, 4, &[]), GuestAddress(BUFFERS)).unwrap();
        world.add_at(REQUESTS, 0, readable, writable);
        assert!(world.process(REQUESTS).is_err(), "{what}");
        assert!(world.asked().is_none(), "{what}");
    }
}

#[test]
fn a_head_that_is_offered_twice_is_two_requests() {
    let mut world = World::new();
    world.ask(0, op::GETATTR, &[0; 16], 104);
    world.ask(0, op::GETATTR, &[0; 16], 50);
    let tags = [world.asked().unwrap().tag(), world.asked().unwrap().tag()];
    assert_ne!(tags[0], tags[1]);
    world.reply(&reply(tags[1], 0, &[2; 50]), &[]);
    world.reply(&reply(tags[0], -libc::EPERM, &[]), &[]);
    world.reply(&reply(tags[0], 0, &[1; 104]), &[]);
    let used = world.used(REQUESTS);
    assert_eq!(used.iter().map(|used| used.head).collect::<Vec<_>>(), [0, 0]);
}

/// What guest and server may do.
#[derive(Clone, Debug)]
enum Act {
    Ask {
        queue: usize,
        opcode: u32,
        body: Vec<u8>,
        len: Option<u32>,
        room: Vec<u32>,
    },
    Read {
        handle: u64,
        offset: u64,
        size: u32,
        room: u32,
    },
    Write {
        handle: u64,
        offset: u64,
        size: u32,
        data: Vec<u8>,
    },
    /// To the request that was asked so many ago, and with so many files.
    Reply {
        back: usize,
        error: i32,
        body: Vec<u8>,
        len: Option<u32>,
        files: usize,
        tag: Option<u64>,
    },
    Packet(Vec<u8>),
    Reset,
    End,
}

fn act() -> impl Strategy<Value = Act> {
    let opcode = prop_oneof![
        4 => prop::sample::select(vec![1, 2, 3, 14, 15, 16, 18, 25, 35, 36, 38, 42, 51]),
        1 => any::<u32>(),
    ];
    let bytes = |max| prop::collection::vec(any::<u8>(), 0..max);
    let len = || prop::option::weighted(0.1, any::<u32>());
    let room = prop::collection::vec(prop_oneof![Just(16), 0..200u32], 0..4);
    let offset = || prop_oneof![4 => 0..10_000u64, 1 => any::<u64>()];
    let size = || prop_oneof![6 => 0..9000u32, 1 => any::<u32>()];
    let error = prop_oneof![4 => Just(0), 2 => -40..1i32, 1 => any::<i32>()];
    prop_oneof![
        8 => (0..2usize, opcode, bytes(100), len(), room)
            .prop_map(|(queue, opcode, body, len, room)| Act::Ask { queue, opcode, body, len, room }),
        3 => (0..3u64, offset(), size(), 0..9000u32)
            .prop_map(|(handle, offset, size, room)| Act::Read { handle, offset, size, room }),
        3 => (0..3u64, offset(), size(), bytes(3000))
            .prop_map(|(handle, offset, size, data)| Act::Write { handle, offset, size, data }),
        8 => (0..3usize, error, bytes(200), len(), 0..4usize, prop::option::weighted(0.1, any::<u64>()))
            .prop_map(|(back, error, mut body, len, files, tag)| {
                // Handles that a read may name.
                if let Some(low) = body.first_chunk_mut::<8>() {
                    *low = [low[0] % 3, 0, 0, 0, 0, 0, 0, 0];
                }
                Act::Reply { back, error, body, len, files, tag }
            }),
        1 => bytes(60).prop_map(Act::Packet),
        1 => Just(Act::Reset),
        1 => prop::option::weighted(0.3, Just(Act::End)).prop_map(|end| end.unwrap_or(Act::Reset)),
    ]
}

/// A world in which both sides do as they like, in a memory where each chain has a place of its own.
fn play(acts: &[Act]) {
    let file = tempfile::tempfile().unwrap();
    let mut world = World::new();
    let mut tags = Vec::new();
    assert!(acts.len() <= usize::from(BUFFER_COUNT));
    for (head, act) in (0u16..).zip(acts) {
        match act {
            Act::Ask { queue, opcode, body, len, room } => {
                let mut bytes = request(*opcode, 4, body);
                if let Some(len) = len {
                    bytes[..4].copy_from_slice(&len.to_le_bytes());
                }
                let queue = *queue;
                world.put(queue, head, &bytes, &[40], room);
                world.process(queue).unwrap();
            }
            Act::Read { handle, offset, size, room } => {
                world.ask(head, op::READ, &data_in(*handle, *offset, *size), *room);
            }
            Act::Write { handle, offset, size, data } => {
                let body = [&data_in(*handle, *offset % (1 << 20), *size)[..], data].concat();
                world.ask(head, op::WRITE, &body, 8);
            }
            Act::Reply { back, error, body, len, files, tag } if world.server.is_some() => {
                tags.extend(std::iter::from_fn(|| world.asked()).map(|asked| asked.tag()));
                let known = tags.len().checked_sub(1 + back).map(|index| tags[index]);
                let mut bytes = reply(tag.or(known).unwrap_or(1), *error, body);
                if let Some(len) = len {
                    bytes[..4].copy_from_slice(&len.to_le_bytes());
                }
                if world.device.host_fd().is_some() {
                    world.reply(&bytes, &vec![file.as_fd(); *files]);
                }
            }
            Act::Packet(bytes) if world.server.is_some() => {
                if world.device.host_fd().is_some() {
                    world.reply(bytes, &[file.as_fd()]);
                }
            }
            Act::Reply { .. } | Act::Packet(_) => {}
            Act::Reset => {
                world.device.reset();
                world.rings = [Ring::new(HIPRIO), Ring::new(REQUESTS)];
                world.memory.write_slice(&vec![0; 0x3_0000], GuestAddress(0x1_0000)).unwrap();
                world.queues = world.rings.iter().map(Ring::queue).collect();
            }
            Act::End => world.end_server(),
        }
        world.settle();
        for queue in [HIPRIO, REQUESTS] {
            for used in world.used(queue) {
                // What is answered at all is answered in a form that the guest's kernel accepts.
                assert!(used.bytes.is_empty() || used.bytes.len() >= 16, "{used:?}");
                if !used.bytes.is_empty() {
                    assert!((-511..=0).contains(&used.error()), "{used:?}");
                }
            }
        }
        assert_eq!(open_files(&file), 1 + world.device.handles.len());
    }
    world.end_server();
    world.settle();
    for queue in [HIPRIO, REQUESTS] {
        world.used(queue);
        assert_eq!(world.rings[queue].used, world.rings[queue].available, "every chain comes back, once");
    }
    assert_eq!(open_files(&file), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_guest_and_server_do_every_chain_comes_back_and_every_file_is_closed(
        acts in prop::collection::vec(act(), 1..40),
    ) {
        play(&acts);
    }
}
