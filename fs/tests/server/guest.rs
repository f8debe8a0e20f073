//! A guest that has taken its kernel over, end to end: raw FUSE by way of the VMM's device to the jailed server, and canaries on
//! the host.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use bulkhead_fs::wire::{Writer, opcode};
use libc::{EBADF, EINVAL, ELOOP, EROFS, ESTALE, O_APPEND, O_RDONLY, O_RDWR, O_TRUNC, O_WRONLY};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::client::text;
use crate::ring::Guest;

/// Most memory that a server may take that a guest has only annoyed, in bytes.
const MEMORY_MAX: usize = 64 << 20;

const SECRET: &str = "the canary is alive";
const FIXED: &str = "not to be changed";

/// A directory with two shares, and beside them what no guest may reach.
struct Host {
    directory: tempfile::TempDir,
    before: Vec<Look>,
}

/// A file's path, content, owner, mode, links and time of its last change.
type Look = (PathBuf, Vec<u8>, u32, u32, u64, i64, i64);

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["share/d", "fixed", "outside/d"] {
            fs::create_dir_all(directory.path().join(name)).unwrap();
        }
        for (name, content) in [
            ("outside/canary", SECRET),
            ("outside/d/canary", SECRET),
            ("fixed/f", FIXED),
            ("share/f", "inside"),
            ("share/d/canary", "decoy"),
        ] {
            fs::write(directory.path().join(name), content).unwrap();
        }
        symlink("../outside", directory.path().join("share/way")).unwrap();
        symlink("../outside/canary", directory.path().join("share/link")).unwrap();
        let mut host = Self { directory, before: Vec::new() };
        host.before = host.look();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// All that no guest may change.
    fn look(&self) -> Vec<Look> {
        fn add(path: &Path, looks: &mut Vec<Look>) {
            let metadata = fs::symlink_metadata(path).unwrap();
            let content = if metadata.is_file() { fs::read(path).unwrap() } else { Vec::new() };
            let (mode, owner) = (metadata.mode(), metadata.uid());
            let time = (metadata.ctime(), metadata.ctime_nsec());
            looks.push((path.to_owned(), content, owner, mode, metadata.nlink(), time.0, time.1));
            if metadata.is_dir() {
                let mut inside: Vec<_> =
                    fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
                inside.sort();
                for path in &inside {
                    add(path, looks);
                }
            }
        }
        let mut looks = Vec::new();
        for name in ["outside", "fixed"] {
            add(&self.path(name), &mut looks);
        }
        looks
    }

    fn check(&self) {
        assert_eq!(self.look(), self.before);
        let mut names: Vec<_> =
            fs::read_dir(self.directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["fixed", "outside", "share"]);
    }
}

/// A guest with both shares.
fn start(host: &Host) -> Option<(Guest, u64, u64)> {
    let mut guest = Guest::start(&["--nofile", "512"])?;
    let share = guest.share("share", &host.path("share"), false);
    let fixed = guest.share("fixed", &host.path("fixed"), true);
    Some((guest, share, fixed))
}

#[test]
fn the_data_of_a_file_is_what_it_was_opened_for() {
    let host = Host::new();
    let Some((mut guest, share, fixed)) = start(&host) else { return };
    let f = guest.lookup(share, "f").unwrap();
    let handle = guest.open(f, O_RDWR).unwrap();
    assert_eq!(guest.read(f, handle, 0, 100, 100).unwrap(), b"inside");
    assert_eq!(guest.write_file(f, handle, 2, 4, b"sane"), Ok(4));
    assert_eq!(fs::read(host.path("share/f")).unwrap(), b"insane");

    // A file of a read-only share is not written to, by whatever handle.
    let g = guest.lookup(fixed, "f").unwrap();
    for flags in [O_RDWR, O_WRONLY, O_WRONLY | O_APPEND, O_RDONLY | O_TRUNC] {
        assert_eq!(guest.open(g, flags), Err(EROFS), "{flags:o}");
        assert_eq!(guest.create(fixed, "f", flags), Err(EROFS), "{flags:o}");
    }
    let read_only = guest.open(g, O_RDONLY).unwrap();
    assert_eq!(guest.read(g, read_only, 0, 100, 100).unwrap(), FIXED.as_bytes());
    for node in [g, f, 0, u64::MAX] {
        assert_eq!(guest.write_file(node, read_only, 0, 4, b"evil"), Err(EBADF));
    }
    let write_only = guest.open(f, O_WRONLY).unwrap();
    assert_eq!(guest.read(f, write_only, 0, 100, 100), Err(EBADF));

    // Handles that were made up, or given back.
    guest.release(f, handle).unwrap();
    for wrong in [handle, u64::MAX, 1 << 32, write_only + 1] {
        assert!(guest.read(f, wrong, 0, 100, 100).is_err(), "{wrong}");
        assert!(guest.write_file(f, wrong, 0, 4, b"evil").is_err(), "{wrong}");
        assert_eq!(guest.flush(f, wrong), Err(EBADF), "{wrong}");
    }
    assert_eq!(fs::read(host.path("share/f")).unwrap(), b"insane");
    host.check();
}

#[test]
fn lengths_and_offsets_that_lie_move_nothing() {
    let host = Host::new();
    let Some((mut guest, share, _)) = start(&host) else { return };
    let f = guest.lookup(share, "f").unwrap();
    let handle = guest.open(f, O_RDWR).unwrap();
    // More than there is room for: an error, or no more than the room.
    for (size, room) in [(100, 3), (u32::MAX, 3), (u32::MAX, 0), (2 << 20, 1 << 20), (100, 0)] {
        let read = guest.read(f, handle, 0, size, room);
        assert!(read.is_err() || read.unwrap().len() <= room as usize, "{size} into {room}");
    }
    // More than was given: nothing of the guest's own memory behind it, and nothing of anybody else's.
    for size in [5, 4096, 1 << 20, u32::MAX] {
        assert!(guest.write_file(f, handle, 0, size, b"evil").is_err(), "{size}");
    }
    for offset in [i64::MAX as u64, 1 << 63, u64::MAX] {
        assert!(guest.write_file(f, handle, offset, 4, b"evil").is_err(), "{offset}");
        let read = guest.read(f, handle, offset, 100, 100);
        assert!(read.is_err() || read.unwrap().is_empty(), "{offset}");
    }
    assert_eq!(fs::read(host.path("share/f")).unwrap(), b"inside");
    // A header that lies, and one that is not whole.
    for length in [0, 39, 41, 1 << 20, u32::MAX] {
        let mut request = guest.request(opcode::GETATTR, f, &[0; 16]);
        request[..4].copy_from_slice(&u32::to_le_bytes(length));
        assert!(guest.send_raw(&request, 4096).unwrap().is_err(), "{length}");
    }
    assert!(guest.send_raw(&[0xff; 39], 4096).is_none());
    // No room for an answer: nothing is written, wherever that would be.
    for room in [1, 15] {
        let request = guest.request(opcode::GETATTR, f, &[0; 16]);
        assert!(guest.send_raw(&request, room).is_none());
    }
    let request = guest.request(opcode::GETATTR, f, &[0; 16]);
    assert!(guest.send_raw(&request, 20).unwrap().is_err());
    // A name as long as a request may be, and a request that is longer.
    for length in [256, 4096, 79 << 10, 200 << 10] {
        assert!(
            guest.call(opcode::LOOKUP, share, &[vec![b'a'; length], vec![0]].concat()).is_err(),
            "{length}"
        );
    }
    assert!(guest.lookup(share, "f").is_ok());
    host.check();
}

#[test]
fn no_name_leads_out() {
    let host = Host::new();
    let Some((mut guest, share, fixed)) = start(&host) else { return };
    let outside = host.path("outside/canary").display().to_string();
    let names = [
        "..",
        ".",
        "",
        "/",
        &outside,
        "../outside/canary",
        "way/canary",
        "d/../../outside/canary",
        "/proc/self/root",
    ];
    for name in names {
        for parent in [1, share, fixed] {
            assert_eq!(guest.lookup(parent, name), Err(EINVAL), "{name}");
        }
        assert_eq!(guest.create(share, name, O_RDWR | O_TRUNC), Err(EINVAL), "{name}");
        for (what, body) in [
            (opcode::UNLINK, text(&[name])),
            (opcode::RMDIR, text(&[name])),
            (opcode::SYMLINK, text(&[name, "x"])),
            (opcode::MKDIR, [vec![0; 8], text(&[name])].concat()),
            (opcode::MKNOD, [vec![0; 16], text(&[name])].concat()),
            (opcode::RENAME, [share.to_le_bytes().to_vec(), text(&["f", name])].concat()),
            (opcode::RENAME, [share.to_le_bytes().to_vec(), text(&[name, "f"])].concat()),
        ] {
            assert_eq!(guest.call(what, share, &body), Err(EINVAL), "{what} of {name}");
        }
    }
    // A NUL ends a name, and what is behind it is nobody's.
    assert!(guest.call(opcode::LOOKUP, share, b"f\0/../../outside/canary\0").is_ok());
    assert_eq!(guest.call(opcode::LOOKUP, share, b"..\0f\0"), Err(EINVAL));
    assert_eq!(guest.call(opcode::LOOKUP, share, b"f"), Err(EINVAL));
    // Links are the guest's to follow, and where they lead is in the guest.
    let (way, link) = (guest.lookup(share, "way").unwrap(), guest.lookup(share, "link").unwrap());
    assert!(guest.lookup(way, "canary").is_err());
    assert!(guest.create(way, "new", O_RDWR).is_err());
    for flags in [O_RDONLY, O_RDWR, O_WRONLY | O_TRUNC] {
        assert_eq!(guest.open(link, flags), Err(ELOOP));
        assert_eq!(guest.create(share, "link", flags), Err(ESTALE));
    }
    // From one share into the other, and into the root of all of them.
    for (from, to) in [(fixed, share), (share, fixed), (share, 1), (1, share)] {
        let body = [&to.to_le_bytes()[..], &text(&["f", "moved"])].concat();
        assert!(guest.call(opcode::RENAME, from, &body).is_err());
    }
    let f = guest.lookup(fixed, "f").unwrap();
    assert!(guest.call(opcode::LINK, share, &[&f.to_le_bytes()[..], &text(&["hard"])].concat()).is_err());
    host.check();
}

/// Somebody else who has the directory, another guest or a process of the host, has a directory and a link take turns.
#[test]
fn a_directory_that_takes_turns_with_a_link_leads_nowhere() {
    let host = Host::new();
    let Some((mut guest, share, _)) = start(&host) else { return };
    let done = Arc::new(AtomicBool::new(false));
    let (d, way) = (host.path("share/d"), host.path("share/way"));
    let (stop, first, second) = (Arc::clone(&done), d.clone(), way.clone());
    let swapping = thread::spawn(move || {
        let mut turns = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            turns += u64::from(renameat_with(CWD, &first, CWD, &second, RenameFlags::EXCHANGE).is_ok());
        }
        turns
    });
    let (mut opened, mut refused) = (0, 0);
    while opened < 200 || refused < 200 {
        let Ok(directory) = guest.lookup(share, "d") else { continue };
        // A name that is nowhere yet: were the link followed, it would be outside.
        if let Ok((node, handle)) = guest.create(directory, "made", O_RDWR) {
            guest.release(node, handle).unwrap();
            let _ = guest.call(opcode::UNLINK, directory, &text(&["made"]));
        }
        match guest.lookup(directory, "canary").and_then(|node| Ok((node, guest.open(node, O_RDWR)?))) {
            Ok((node, handle)) => {
                opened += 1;
                assert_eq!(guest.read(node, handle, 0, 100, 100).unwrap(), b"decoy");
                assert_eq!(guest.write_file(node, handle, 0, 5, b"decoy"), Ok(5));
                guest.release(node, handle).unwrap();
            }
            Err(_) => refused += 1,
        }
        let _ = guest.call(opcode::UNLINK, directory, &text(&["none"]));
        let _ = guest.call(opcode::MKDIR, directory, &[vec![0; 8], text(&["new"])].concat());
    }
    done.store(true, Ordering::Relaxed);
    assert!(swapping.join().unwrap() > 0);
    host.check();
}

#[test]
fn what_is_forgotten_in_a_flood_costs_nothing() {
    let host = Host::new();
    let Some((mut guest, share, _)) = start(&host) else { return };
    for number in 0..50_000_u64 {
        let node = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        guest.forget(opcode::FORGET, node, &u64::MAX.to_le_bytes());
        if number % 16 == 0 {
            // More than there are, and some.
            let many =
                [&u32::MAX.to_le_bytes()[..], &[0; 4], &node.to_le_bytes(), &number.to_le_bytes()].concat();
            guest.forget(opcode::BATCH_FORGET, 0, &many);
        }
        if number % 1000 == 0 {
            // The root of all shares is not forgotten; the others are, and are looked up again.
            guest.forget(opcode::FORGET, 1, &u64::MAX.to_le_bytes());
            guest.lookup(1, "share").unwrap();
        }
    }
    guest.forget(opcode::FORGET, share, &u64::MAX.to_le_bytes());
    assert_eq!(guest.lookup(share, "f"), Err(ESTALE));
    let again = guest.lookup(1, "share").unwrap();
    assert!(guest.lookup(again, "f").is_ok());
    let resident = guest.server.resident();
    assert!(resident < MEMORY_MAX, "{resident} bytes");
    host.check();
}

/// Numbers that are the same each time (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.next() % from.len() as u64).unwrap()]
    }
}

#[test]
fn whatever_a_guest_sends_is_answered_and_stays_in_its_shares() {
    let host = Host::new();
    let Some((mut guest, share, fixed)) = start(&host) else { return };
    let mut numbers = Numbers(0x2545_f491_4f6c_dd1d);
    let mut nodes = vec![0, 1, 2, u64::MAX, share, fixed];
    for (parent, names) in [(share, &["f", "d", "way", "link"][..]), (fixed, &["f"][..])] {
        nodes.extend(names.iter().map(|name| guest.lookup(parent, name).unwrap()));
    }
    let names: [&[u8]; 12] = [
        b"f",
        b"d",
        b"way",
        b"link",
        b"canary",
        b"new",
        b"..",
        b"../outside/canary",
        b"/etc/passwd",
        b"",
        b"user.a",
        b"system.posix_acl_access",
    ];
    // Not FALLOCATE: what it takes of the disk is the guest's good right.
    let opcodes: Vec<u32> =
        (0..64).filter(|opcode| *opcode != opcode::FALLOCATE).chain([4096, u32::MAX]).collect();
    for _ in 0..30_000 {
        let mut body = Writer::default();
        for _ in 0..numbers.next() % 8 {
            match numbers.next() % 5 {
                0 => body.u32(numbers.pick(&[0, 1, 2, 7, 0x4000, 0o100_777, 0o120_777, u32::MAX])),
                1 => body.u64(numbers.pick(&[0, 1, 3, 4096, 1 << 20, 1 << 63, u64::MAX])),
                2 => body.u64(numbers.pick(&nodes)),
                3 => body.bytes(numbers.pick(&names)).bytes(&[0]),
                _ => body.zeros(usize::try_from(numbers.next() % 40).unwrap()),
            };
        }
        let (opcode, node) = (numbers.pick(&opcodes), numbers.pick(&nodes));
        let request = guest.request(opcode, node, &body.0);
        let room = numbers.pick(&[0, 8, 16, 24, 104, 144, 160, 4096, 1 << 20]);
        let answer = guest.send_raw(&request, room);
        let silent = [opcode::FORGET, opcode::BATCH_FORGET, 36].contains(&opcode) || room < 16;
        assert_eq!(answer.is_none(), silent, "opcode {opcode}, room {room}");
    }
    let resident = guest.server.resident();
    assert!(resident < MEMORY_MAX, "{resident} bytes");
    // DESTROY was among them: begun anew, it works.
    let again = guest.lookup(1, "fixed").unwrap();
    let f = guest.lookup(again, "f").unwrap();
    let handle = guest.open(f, O_RDONLY).unwrap();
    assert_eq!(guest.read(f, handle, 0, 100, 100).unwrap(), FIXED.as_bytes());
    host.check();
}
