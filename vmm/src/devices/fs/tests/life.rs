//! Requests and replies, resets, and the end of the server.

use std::os::fd::AsFd;

use super::*;
use crate::devices::DeviceState;
use crate::seccomp::Thread;
use crate::seccomp::tests::allows;

#[test]
fn a_request_goes_to_the_server_and_its_reply_comes_back() {
    let mut world = World::new();
    let unique = world.ask(3, op::LOOKUP, b"name\0", 128);
    let asked = world.asked().unwrap();
    assert_eq!((asked.opcode(), asked.body()), (op::LOOKUP, &b"name\0"[..]));
    let mut sent = asked.0.clone();
    sent[8..16].copy_from_slice(&unique.to_le_bytes());
    assert_eq!(sent, request(op::LOOKUP, unique, b"name\0"), "as the driver wrote it but for `unique`");
    assert!(world.used(REQUESTS).is_empty() && !world.interrupted());

    world.reply(&reply(asked.tag(), 0, &pattern(128)), &[]);
    assert!(world.interrupted());
    assert_eq!(world.answer(), Used { head: 3, bytes: reply(unique, 0, &pattern(128)) });

    let unique = world.ask(3, op::LOOKUP, b"nothing\0", 128);
    let tag = world.asked().unwrap().tag();
    assert_ne!(tag, asked.tag(), "tags do not repeat");
    world.reply(&reply(tag, -libc::ENOENT, &[]), &[]);
    assert_eq!(world.answer(), Used { head: 3, bytes: reply(unique, -libc::ENOENT, &[]) });
}

#[test]
fn replies_in_any_order_find_their_requests() {
    let mut world = World::new();
    let uniques: Vec<_> =
        (0..8u8).map(|head| world.ask(head.into(), op::GETATTR, &[head; 16], 104)).collect();
    let asked: Vec<_> = std::iter::from_fn(|| world.asked()).collect();
    assert_eq!(asked.len(), 8);
    for index in [5, 0, 7, 1, 6, 2, 4, 3] {
        world.post(&reply(asked[index].tag(), 0, &[asked[index].body()[0]; 104]), &[]);
    }
    world.settle();
    let mut used = world.used(REQUESTS);
    used.sort_by_key(|used| used.head);
    for ((used, unique), head) in used.iter().zip(uniques).zip(0u8..) {
        assert_eq!((used.head, used.unique(), used.body()), (head.into(), unique, &[head; 104][..]));
    }
    assert_eq!(used.len(), 8);
}

#[test]
fn requests_without_an_answer_go_back_at_once() {
    let mut world = World::new();
    for (queue, opcode) in [(HIPRIO, op::FORGET), (REQUESTS, op::BATCH_FORGET)] {
        let bytes = request(opcode, 4, &[1; 16]);
        world.put(queue, 0, &bytes, &[], &[]);
        world.process(queue).unwrap();
        assert_eq!(world.used(queue), [Used { head: 0, bytes: Vec::new() }]);
        assert_eq!(world.asked().unwrap().opcode(), opcode);
    }
    for (opcode, room) in
        [(op::INTERRUPT, &[16][..]), (op::INTERRUPT, &[]), (op::GETATTR, &[]), (op::GETATTR, &[15])]
    {
        world.put(REQUESTS, 0, &request(opcode, 4, &[1; 16]), &[], room);
        world.process(REQUESTS).unwrap();
        assert_eq!(world.answer().bytes, [], "{opcode}");
        assert!(world.asked().is_none(), "{opcode}");
    }
}

#[test]
fn a_destroy_is_answered_at_once_and_closes_all_files() {
    let file = tempfile::tempfile().unwrap();
    let mut world = World::new();
    world.open(5, &file);
    // A file that is on the way then comes too late.
    world.ask(1, op::OPEN, &[0; 8], 16);
    let open = world.asked().unwrap().tag();
    assert_eq!(world.ask_device(op::DESTROY, &[], 0).error(), 0);
    assert_eq!(world.asked().unwrap().opcode(), op::DESTROY);
    assert_eq!(open_files(&file), 1);
    world.reply(&reply(open, 0, &open_out(6)), &[file.as_fd()]);
    assert_eq!(world.answer().error(), -libc::EIO);
    assert_eq!(open_files(&file), 1);
}

#[test]
fn a_reset_forgets_requests_and_files_and_a_late_reply_writes_nothing() {
    let file = tempfile::tempfile().unwrap();
    let mut world = World::new();
    world.device.reset();
    assert!(world.asked().is_none(), "there is nothing to forget yet");
    world.open(5, &file);
    world.ask(1, op::OPEN, &[0; 8], 16);
    world.ask(2, op::GETATTR, &[0; 16], 104);
    let late = [world.asked().unwrap(), world.asked().unwrap()];
    world.device.reset();
    assert_eq!(world.asked().unwrap().opcode(), op::DESTROY);
    assert!(world.asked().is_none());
    assert_eq!(open_files(&file), 1);

    // The driver comes back with the same rings, chains and numbers.
    world.rings = [Ring::new(HIPRIO), Ring::new(REQUESTS)];
    world.memory.write_slice(&vec![0; 0x3_0000], GuestAddress(0x1_0000)).unwrap();
    world.queues = world.rings.iter().map(Ring::queue).collect();
    let unique = world.ask(2, op::GETATTR, &[0; 16], 104);
    let asked = world.asked().unwrap();
    let memory = |world: &World| {
        let mut bytes = vec![0; usize::try_from(2 * BUFFER_STRIDE).unwrap()];
        world.memory.read_slice(&mut bytes, GuestAddress(World::buffer(1))).unwrap();
        bytes
    };
    let before = memory(&world);
    world.post(&reply(late[0].tag(), 0, &open_out(6)), &[file.as_fd()]);
    world.reply(&reply(late[1].tag(), 0, &[0xee; 104]), &[]);
    assert!(world.used(REQUESTS).is_empty());
    assert!(memory(&world) == before);
    assert_eq!((world.device.handles.len(), open_files(&file)), (0, 1));

    world.reply(&reply(asked.tag(), 0, &[3; 104]), &[]);
    assert_eq!(world.answer(), Used { head: 2, bytes: reply(unique, 0, &[3; 104]) });
}

#[test]
fn when_the_server_ends_everything_is_answered_with_an_error_and_nothing_spins() {
    let file = tempfile::tempfile().unwrap();
    let mut world = World::new();
    world.open(5, &file);
    world.interrupted();
    let unique = world.ask(1, op::GETATTR, &[0; 16], 104);
    world.asked().unwrap();
    world.end_server();
    world.settle();
    let answer = world.answer();
    assert_eq!((answer.unique(), answer.error()), (unique, -libc::EIO));
    assert!(world.interrupted());
    assert!(!world.host_ready(), "a dead socket would be ready for ever");
    assert_eq!((world.device.host_fd(), open_files(&file)), (None, 1));

    for (opcode, body) in [(op::GETATTR, vec![0; 16]), (op::READ, data_in(5, 0, 4)), (op::OPEN, vec![0; 8])] {
        assert_eq!(world.ask_device(opcode, &body, 16).error(), -libc::EIO);
    }
    world.put(HIPRIO, 0, &request(op::FORGET, 4, &[1; 8]), &[], &[]);
    world.process(HIPRIO).unwrap();
    assert_eq!(world.used(HIPRIO).len(), 1);
    world.device.reset();
}

#[test]
fn a_server_that_is_found_dead_by_sending_is_one() {
    let mut world = World::new();
    world.ask(1, op::GETATTR, &[0; 16], 104);
    world.end_server();
    world.ask(2, op::GETATTR, &[0; 16], 104);
    let used = world.used(REQUESTS);
    assert_eq!(used.len(), 2, "the one that was pending, too");
    assert!(used.iter().all(|used| used.error() == -libc::EIO));
    assert!(!world.host_ready());
}

#[test]
fn the_guest_reads_the_tag_and_the_number_of_queues() {
    let world = World::new();
    assert_eq!(world.device.config(), [&b"shares"[..], &[0; 30], &[1, 0, 0, 0]].concat());
    for tag in ["", "with\0nul", "a tag of more than thirty-six bytes !"] {
        let (socket, _) = nix::unistd::pipe().unwrap();
        assert!(Fs::new(socket, tag).is_err(), "{tag:?}");
    }
    let (socket, _) = nix::unistd::pipe().unwrap();
    assert!(Fs::new(socket, "a tag of exactly thirty-six bytes !!").is_ok());
}

#[test]
fn only_what_was_never_in_use_is_restored() {
    let mut world = World::new();
    let saved = world.device.save();
    assert_eq!(saved, DeviceState::Fs { tag: "shares".to_owned(), in_use: false });
    assert_eq!(World::new().device.restore(&saved), Ok(()));
    let other = DeviceState::Fs { tag: "other".to_owned(), in_use: false };
    assert!(world.device.restore(&other).is_err());
    assert!(world.device.restore(&DeviceState::Rng).is_err());
    world.ask(1, op::GETATTR, &[0; 16], 104);
    let error = World::new().device.restore(&world.device.save()).unwrap_err();
    assert!(error.contains("mounted"), "{error}");
    world.device.reset();
    assert_eq!(World::new().device.restore(&world.device.save()), Ok(()));
}

#[test]
fn the_devices_work_is_within_the_filters_of_the_threads_that_do_it() {
    let file = tempfile::tempfile().unwrap();
    let mut world = World::new();
    world.has_vcpus = false;
    assert!(allows(Thread::Files, || {
        world.open(5, &file);
        let mut body = [&data_in(5, 0, 4)[..], b"text"].concat();
        body[32..36].copy_from_slice(&libc::O_APPEND.to_le_bytes());
        assert_eq!(world.ask_device(op::WRITE, &body, 8).error(), 0);
        assert_eq!(world.ask_device(op::READ, &data_in(5, 0, 9), 9).body(), b"text");
        let flush = [&5u64.to_le_bytes()[..], &[0; 16]].concat();
        assert_eq!(world.ask_device(op::FLUSH, &flush, 0).error(), 0);
        world.ask(0, op::RELEASE, &5u64.to_le_bytes(), 0);
        world.hang_up();
        world.work(VirtioDevice::process_host).unwrap();
        assert_eq!(world.answer().error(), -libc::EIO);
    }));

    let mut world = World::new();
    world.open(5, &file);
    world.ask(0, op::GETATTR, &[0; 16], 104);
    world.asked().unwrap();
    let in_memory = memory_file(b"text");
    world.open(6, &in_memory);
    assert!(allows(Thread::Vcpu, || {
        for handle in [5, 6, 6] {
            let read = request(op::READ, 9, &data_in(handle, 0, 4));
            world.put(REQUESTS, 1, &read, &[], &[16, 4]);
            world.notify(REQUESTS).unwrap();
        }
        let write = request(op::WRITE, 10, &data_in(5, 0, 0));
        world.put(REQUESTS, 2, &write, &[], &[16, 8]);
        world.notify(REQUESTS).unwrap();
        world.device.reset();
        assert_eq!(world.asked().unwrap().opcode(), op::DESTROY);
        // The server is gone when the next reset comes.
        world.device.in_use = true;
        world.hang_up();
        world.device.reset();
        assert_eq!(world.device.host_fd(), None);
    }));
}
