//! READ and WRITE, which the device does by itself.

use std::os::unix::fs::FileExt;

use super::super::DATA_MAX;
use super::*;

fn file(content: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

fn content(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// `fuse_flush_in`
fn flush_in(handle: u64) -> Vec<u8> {
    [&handle.to_le_bytes()[..], &[0; 16]].concat()
}

fn write_in(handle: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    [&data_in(handle, offset, u32::try_from(data.len()).unwrap())[..], data].concat()
}

#[test]
fn a_read_fills_scattered_memory_of_odd_sizes() {
    let bytes = pattern(300_000);
    let mut world = World::new();
    world.open(5, &file(&bytes));
    // The second piece goes across the border between two regions of memory.
    let room = [16, 0x1333, 1, 4095, 0, 77, 200_000];
    let size = room.iter().sum::<u32>() - 16;
    let request = request(op::READ, 9, &data_in(5, 13, size));
    assert!(world.put(REQUESTS, 0, &request, &[7, 33, 1, 30], &room));
    world.process(REQUESTS).unwrap();
    let answer = world.answer();
    assert_eq!(answer.unique(), 9);
    assert!(answer.body() == &bytes[13..13 + size as usize]);
    assert!(world.asked().is_none(), "the server has no part in it");
}

#[test]
fn a_read_at_the_end_of_a_file_is_short() {
    let mut world = World::new();
    world.open(5, &file(&pattern(5000)));
    for (offset, size, expected) in [(4990, 100, 10), (5000, 100, 0), (1 << 40, 4096, 0), (0, 0, 0)] {
        let answer = world.ask_device(op::READ, &data_in(5, offset, size), size);
        assert_eq!(answer.body().len(), expected, "{size} at {offset}");
    }
    let answer = world.ask_device(op::READ, &data_in(5, 4000, 4096), 5000);
    assert_eq!(answer.body(), &pattern(5000)[4000..]);
}

/// Has a READ of four bytes made, with only a vCPU at work. True when it is answered.
fn read_by_vcpu(world: &mut World, handle: u64) -> bool {
    world.put(REQUESTS, 0, &request(op::READ, 9, &data_in(handle, 0, 4)), &[], &[16, 4]);
    world.notify(REQUESTS).unwrap();
    match world.used(REQUESTS).as_slice() {
        [] => false,
        [answer] => {
            assert_eq!(answer.body(), b"text");
            true
        }
        more => panic!("{more:?}"),
    }
}

#[test]
fn a_read_that_fails_halfway_is_an_error_and_not_the_end_of_the_file() {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    let page = std::num::NonZero::new(4096).unwrap();
    let pages = std::num::NonZero::new(8192).unwrap();
    // A page of this process, and behind it none. It is there as long as the test reads it.
    // SAFETY: a new mapping that nothing else knows, and the second half of it.
    let address = unsafe {
        let address = mmap_anonymous(None, pages, ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE).unwrap();
        munmap(address.byte_add(page.get()), page.get()).unwrap();
        address.as_ptr() as u64
    };
    let mut world = World::new();
    world.open(5, &File::open("/proc/self/mem").unwrap());
    assert_eq!(world.ask_device(op::READ, &data_in(5, address, 4096), 4096).body().len(), 4096);
    assert_eq!(world.ask_device(op::READ, &data_in(5, address, 8192), 8192).error(), -libc::EIO);
}

#[test]
fn a_vcpu_reads_what_is_in_memory_without_the_devices_thread() {
    let mut world = World::new();
    world.open(5, &memory_file(b"text"));
    // A tmpfs without RWF_NOWAIT is found out by the first read.
    if !read_by_vcpu(&mut world, 5) {
        assert!(world.handed_over(REQUESTS));
        world.process_on_thread(REQUESTS).unwrap();
        assert_eq!(world.answer().body(), b"text");
    }
    for _ in 0..3 {
        assert!(read_by_vcpu(&mut world, 5));
        assert!(!world.handed_over(REQUESTS));
    }
}

#[test]
fn a_vcpu_leaves_what_may_wait_to_the_devices_thread() {
    // Neither RWF_NOWAIT nor a tmpfs.
    let made_up = File::open("/proc/self/comm").unwrap();
    let target = file(b"");
    let mut world = World::new();
    world.open(5, &made_up);
    world.open(6, &target);
    for _ in 0..2 {
        world.put(REQUESTS, 0, &request(op::READ, 9, &data_in(5, 0, 1)), &[], &[16, 1]);
        // What comes behind it waits with it.
        world.put(REQUESTS, 1, &request(op::WRITE, 10, &write_in(6, 0, b"text")), &[], &[16, 8]);
        world.notify(REQUESTS).unwrap();
        assert!(world.used(REQUESTS).is_empty());
        assert!(content(&target).is_empty());
        assert!(world.handed_over(REQUESTS));
        world.process_on_thread(REQUESTS).unwrap();
        let uniques: Vec<_> = world.used(REQUESTS).iter().map(Used::unique).collect();
        assert_eq!(uniques, [9, 10]);
        assert_eq!(content(&target), b"text");
        target.set_len(0).unwrap();
    }
    world.put(REQUESTS, 0, &request(op::FLUSH, 11, &flush_in(6)), &[], &[16]);
    world.notify(REQUESTS).unwrap();
    assert!(world.used(REQUESTS).is_empty() && world.handed_over(REQUESTS));
    world.process_on_thread(REQUESTS).unwrap();
    assert_eq!(world.answer().error(), 0);
    for (opcode, body) in [(op::RELEASE, &6u64.to_le_bytes()[..]), (op::DESTROY, &[])] {
        world.put(REQUESTS, 0, &request(opcode, 11, body), &[], &[16]);
        world.notify(REQUESTS).unwrap();
        assert!(world.asked().is_none());
        assert!(world.handed_over(REQUESTS));
        world.process_on_thread(REQUESTS).unwrap();
        assert_eq!(world.asked().unwrap().opcode(), opcode);
    }
}

#[test]
fn a_write_takes_scattered_memory_of_odd_sizes() {
    let target = file(&[1; 20]);
    let mut world = World::new();
    world.open(5, &target);
    let data = pattern(0x3001);
    let bytes = request(op::WRITE, 9, &write_in(5, 11, &data));
    assert!(world.put(REQUESTS, 0, &bytes, &[40, 40, 1, 0x1234, 3], &[16, 8]));
    world.process(REQUESTS).unwrap();
    let answer = world.answer();
    assert_eq!((answer.unique(), answer.body()), (9, &[1, 0x30, 0, 0, 0, 0, 0, 0][..]));
    assert!(content(&target) == [&[1; 11], &data[..]].concat());
    assert!(world.asked().is_none(), "the server has no part in it");
}

#[test]
fn the_largest_transfer_goes_through_whole() {
    let target = file(b"");
    let mut world = World::new();
    world.open(5, &target);
    let data = pattern(DATA_MAX);
    let answer = world.ask_device(op::WRITE, &write_in(5, 0, &data), 8);
    assert_eq!(answer.body()[..4], u32::try_from(DATA_MAX).unwrap().to_le_bytes());
    assert!(content(&target) == data);
    let size = u32::try_from(DATA_MAX).unwrap();
    assert!(world.ask_device(op::READ, &data_in(5, 0, size), size).body() == data);
    assert_eq!(world.ask_device(op::READ, &data_in(5, 0, size + 1), size + 1).error(), -libc::EINVAL);
}

#[test]
fn a_file_opened_for_appending_is_appended_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    std::fs::write(&path, "first\n").unwrap();
    let mut world = World::new();
    world.open(5, &std::fs::OpenOptions::new().append(true).open(&path).unwrap());
    std::fs::write(&path, "first, longer than the guest knows\n").unwrap();
    let write = |world: &mut World, offset, data: &[u8], write_flags: u32, flags: i32| {
        let mut body = write_in(5, offset, data);
        body[20..24].copy_from_slice(&write_flags.to_le_bytes());
        body[32..36].copy_from_slice(&flags.to_le_bytes());
        world.ask_device(op::WRITE, &body, 8).body().to_vec()
    };
    write(&mut world, 6, b"second\n", 0, libc::O_APPEND);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "first, longer than the guest knows\nsecond\n");
    // Pages of a mapping are written back by any descriptor (FUSE_WRITE_CACHE), and one may have stopped appending.
    write(&mut world, 0, b"F", 1, libc::O_APPEND);
    write(&mut world, 1, b"I", 0, libc::O_WRONLY);
    write(&mut world, 0, b"third\n", 0, libc::O_APPEND);
    assert_eq!(
        std::fs::read_to_string(&path).unwrap(),
        "FIrst, longer than the guest knows\nsecond\nthird\n"
    );
}

#[test]
fn a_write_beyond_what_the_host_takes_is_partial_and_then_fails() {
    // A memfd that must not grow takes what it has room for.
    let name = std::ffi::CString::new("full").unwrap();
    // SAFETY: makes a descriptor of a name that lives until the call returns.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_ALLOW_SEALING) };
    // SAFETY: the descriptor is new and nobody else's.
    let full = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    let full = File::from(full);
    full.set_len(4096 + 100).unwrap();
    // SAFETY: takes integers, touches no memory.
    assert_eq!(unsafe { libc::fcntl(full.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_GROW) }, 0);
    let mut world = World::new();
    world.open(5, &full);
    let answer = world.ask_device(op::WRITE, &write_in(5, 0, &pattern(8192)), 8);
    let written = u32::from_le_bytes(answer.body()[..4].try_into().unwrap()) as usize;
    assert!((1..8192).contains(&written), "{written}");
    assert_eq!(content(&full)[..written], pattern(8192)[..written]);
    let answer = world.ask_device(op::WRITE, &write_in(5, 8192, b"more"), 8);
    assert_eq!(answer.error(), -libc::EPERM);
}

#[test]
fn the_hosts_errors_are_passed_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, "text").unwrap();
    let mut world = World::new();
    world.open(5, &File::open(&path).unwrap());
    assert_eq!(world.ask_device(op::WRITE, &write_in(5, 0, b"x"), 8).error(), -libc::EBADF);
    world.open(6, &File::open(directory.path()).unwrap());
    assert_eq!(world.ask_device(op::READ, &data_in(6, 0, 10), 10).error(), -libc::EISDIR);
    assert_eq!(world.ask_device(op::READ, &data_in(7, 0, 10), 10).error(), -libc::EBADF, "no such handle");
}

#[test]
fn offsets_and_sizes_out_of_bounds_are_refused_and_nothing_is_written() {
    let target = file(b"text");
    let mut world = World::new();
    world.open(5, &target);
    let max = i64::MAX.cast_unsigned();
    for (offset, size, room) in
        [(max, 1, 1), (u64::MAX, 1, 1), (u64::MAX - 1, 10, 10), (0, u32::MAX, 100), (0, 11, 10)]
    {
        let answer = world.ask_device(op::READ, &data_in(5, offset, size), room);
        assert_eq!(answer.error(), -libc::EINVAL, "{size} at {offset}");
        let body = [&data_in(5, offset, size)[..], b"x"].concat();
        assert_ne!(world.ask_device(op::WRITE, &body, 8).error(), 0, "{size} at {offset}");
    }
    // Shorter and longer than the data is, no room for the answer, and not even a whole header.
    for (body, room) in [
        ([&data_in(5, 0, 2)[..], b"x"].concat(), 8),
        ([&data_in(5, 0, 1)[..], b"xy"].concat(), 8),
        (write_in(5, 0, b"x"), 7),
        (data_in(5, 0, 0)[..39].to_vec(), 8),
    ] {
        assert_eq!(world.ask_device(op::WRITE, &body, room).error(), -libc::EINVAL);
    }
    assert_eq!(content(&target), b"text");
}

#[test]
fn a_released_file_is_closed_and_the_server_is_told() {
    let source = file(b"text");
    let mut world = World::new();
    world.open(5, &source);
    world.open(6, &source);
    assert_eq!((world.device.handles.len(), open_files(&source)), (2, 3));
    let body = [&5u64.to_le_bytes()[..], &[0; 16]].concat();
    world.ask(0, op::RELEASE, &body, 0);
    assert_eq!(open_files(&source), 2);
    let asked = world.asked().unwrap();
    assert_eq!((asked.opcode(), asked.body()), (op::RELEASE, &body[..]));
    world.reply(&reply(asked.tag(), 0, &[]), &[]);
    assert_eq!(world.answer().error(), 0);
    assert_eq!(world.ask_device(op::READ, &data_in(5, 0, 4), 4).error(), -libc::EBADF);
    assert_eq!(world.ask_device(op::READ, &data_in(6, 0, 4), 4).body(), b"text");
}

/// For close(2) to fail takes a file system that does so: see `fs/tests/server/network.rs`.
#[test]
fn a_flush_closes_a_second_descriptor_and_leaves_the_file_open() {
    let target = file(b"text");
    let mut world = World::new();
    world.open(5, &target);
    for _ in 0..3 {
        assert_eq!(world.ask_device(op::FLUSH, &flush_in(5), 0).body(), b"");
    }
    assert_eq!(open_files(&target), 2);
    assert_eq!(world.ask_device(op::READ, &data_in(5, 0, 4), 4).body(), b"text");
    for handle in [0, 6, u64::MAX] {
        assert_eq!(world.ask_device(op::FLUSH, &flush_in(handle), 0).error(), -libc::EBADF);
    }
    for length in [0, 8, 23] {
        assert_eq!(world.ask_device(op::FLUSH, &flush_in(5)[..length], 0).error(), -libc::EINVAL);
    }
    assert!(world.asked().is_none(), "the server has no part in it");
}

#[test]
fn files_are_made_with_their_handle_behind_the_entry() {
    use std::os::fd::AsFd;

    for opcode in [op::CREATE, op::TMPFILE] {
        let target = file(b"");
        let mut world = World::new();
        world.ask(0, opcode, b"0123456789abcdefname\0", 144);
        let tag = world.asked().unwrap().tag();
        let body = [&[9; 128][..], &open_out(77)].concat();
        world.reply(&reply(tag, 0, &body), &[target.as_fd()]);
        assert_eq!(world.answer().body(), body);
        world.ask_device(op::WRITE, &write_in(77, 0, b"data"), 8).body();
        assert_eq!(content(&target), b"data");
    }
}

#[test]
fn a_guest_cannot_open_more_files_than_the_table_holds() {
    let mut world = World::new();
    let one = file(b"one");
    world.open(0, &one);
    // One place is left, and one OPEN is on the way to it.
    world.device.handles.limit(2);
    let unique = world.ask(1, op::OPEN, &[0; 8], 16);
    assert_eq!(world.ask_device(op::OPEN, &[0; 8], 16).error(), -libc::EMFILE);
    let tag = world.asked().unwrap().tag();
    assert!(world.asked().is_none(), "the server has not opened what nobody can use");
    world.reply(&reply(tag, -libc::ENOENT, &[]), &[]);
    let answer = world.answer();
    assert_eq!((answer.unique(), answer.error()), (unique, -libc::ENOENT));
    world.ask(0, op::OPEN, &[0; 8], 16);
    assert!(world.asked().is_some(), "the place is free again");
}
