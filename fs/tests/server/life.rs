//! The life of files: made, opened, renamed, linked, removed while open.

use std::fs;
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_fs::control::Request;
use bulkhead_fs::wire::{Writer, fattr, opcode};
use libc::{
    EEXIST, EINVAL, EISDIR, ELOOP, ENOENT, ENOTEMPTY, ESTALE, EXDEV, O_APPEND, O_EXCL, O_RDONLY, O_RDWR,
    O_TRUNC, O_WRONLY,
};

use rustix::mount::{UnmountFlags, unmount};

use crate::client::Server;

#[test]
fn a_file_is_made_written_read_and_removed() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    let root = server.share_root(host.path());
    let (entry, handle, mut file) =
        server.create(opcode::CREATE, root, "a", O_RDWR | O_EXCL, 0o100_640, 0).unwrap();
    file.write_all(b"written by the VMM").unwrap();
    assert_eq!(fs::read(host.path().join("a")).unwrap(), b"written by the VMM");
    assert_eq!(server.attributes(entry.node).unwrap().size, 18);
    assert_eq!(server.create(opcode::CREATE, root, "a", O_RDWR | O_EXCL, 0o644, 0).err(), Some(EEXIST));
    // Whether it may be opened is for the guest's kernel to decide, which is made to look it up.
    assert_eq!(server.create(opcode::CREATE, root, "a", O_RDONLY, 0o644, 0).err(), Some(ESTALE));
    let (_, other) = server.open(entry.node, O_RDONLY).unwrap();
    assert!(other.write_at(b"x", 0).is_err(), "opened for reading");
    server.release(entry.node, handle).unwrap();
    assert!(server.release(entry.node, handle).is_err());
    server.unlink(root, "a").unwrap();
    assert!(!host.path().join("a").exists());
    assert_eq!(server.unlink(root, "a"), Err(ENOENT));
}

#[test]
fn the_passed_file_appends_and_truncates() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("a"), "old").unwrap();
    let root = server.share_root(host.path());
    let node = server.walk(root, &["a"]);
    let (_, file) = server.open(node, O_WRONLY | O_APPEND | libc::O_DIRECT).unwrap();
    fs::write(host.path().join("a"), "from outside ").unwrap();
    file.write_at(b"appended", 0).unwrap();
    assert_eq!(fs::read(host.path().join("a")).unwrap(), b"from outside appended");
    let flags = rustix::fs::fcntl_getfl(&file).unwrap();
    assert!(!flags.contains(rustix::fs::OFlags::DIRECT));
    server.open(node, O_WRONLY | O_TRUNC).unwrap();
    assert_eq!(server.attributes(node).unwrap().size, 0);
    assert_eq!(server.open(node, 3).err(), Some(EINVAL));
}

#[test]
fn a_file_that_was_removed_lives_on_while_it_is_known() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("a"), "alive").unwrap();
    let root = server.share_root(host.path());
    let node = server.walk(root, &["a"]);
    let (handle, mut file) = server.open(node, O_RDONLY).unwrap();
    server.unlink(root, "a").unwrap();
    assert_eq!(server.attributes(node).unwrap().links, 0);
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "alive");
    // Even what is opened only now, by the descriptor that was kept.
    let (_, again) = server.open(node, O_RDWR).unwrap();
    again.write_at(b"A", 0).unwrap();
    assert_eq!(server.set(node, fattr::MODE, [0, 0, 0o600, 0, 0]).unwrap().mode & 0o777, 0o600);
    server.release(node, handle).unwrap();
    server.forget(node, 1);
    assert_eq!(server.attributes(node), Err(libc::ESTALE));
}

/// Has all descriptors go that are only kept.
fn crowd_out(server: &mut Server, root: u64, host: &Path) {
    for name in 0..100 {
        fs::write(host.join(format!("{name}")), "").unwrap();
        let node = server.walk(root, &[&format!("{name}")]);
        let (handle, _) = server.open(node, O_RDONLY).unwrap();
        server.release(node, handle).unwrap();
    }
}

#[test]
fn what_the_guest_has_open_it_may_look_at_and_change_whatever_others_do_to_its_name() {
    let Some(mut server) = Server::start(&["--nofile", "128"]) else { return };
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("old"), "1").unwrap();
    let root = server.share_root(host.path());
    let (made, made_handle, _) =
        server.create(opcode::CREATE, root, "log", O_WRONLY | O_APPEND, 0o600, 0).unwrap();
    let old = server.walk(root, &["old"]);
    let (old_handle, _) = server.open(old, O_WRONLY).unwrap();
    let (second_handle, _) = server.open(old, O_RDONLY).unwrap();
    crowd_out(&mut server, root, host.path());
    // One is rotated away, the other one removed.
    fs::rename(host.path().join("log"), host.path().join("log.1")).unwrap();
    fs::write(host.path().join("log"), "another").unwrap();
    fs::remove_file(host.path().join("old")).unwrap();
    for (node, links) in [(made.node, 1), (old, 0)] {
        assert_eq!(server.attributes(node).unwrap().links, links);
        let all = fattr::MODE | fattr::SIZE | fattr::ATIME | fattr::MTIME;
        let set = server.set(node, all, [5, 77, 0o640, 0, 0]).unwrap();
        assert_eq!((set.size, set.mode & 0o777), (5, 0o640));
        match server.set_xattr(node, "user.a", b"x") {
            Err(libc::EOPNOTSUPP) => {
                println!("skipped: no extended attributes on the file system of temporary files");
            }
            other => other.unwrap(),
        }
        // As by /proc/self/fd.
        let (again, file) = server.open(node, O_RDONLY).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 5);
        server.release(node, again).unwrap();
    }
    let rotated = fs::metadata(host.path().join("log.1")).unwrap();
    assert_eq!((rotated.len(), rotated.mtime(), rotated.mode() & 0o777), (5, 77, 0o640));
    assert_eq!(fs::read(host.path().join("log")).unwrap(), b"another");
    // As long as it is open, by whatever handle.
    server.release(old, old_handle).unwrap();
    crowd_out(&mut server, root, host.path());
    assert_eq!(server.attributes(old).unwrap().links, 0);
    for (node, handle) in [(made.node, made_handle), (old, second_handle)] {
        server.release(node, handle).unwrap();
        crowd_out(&mut server, root, host.path());
        assert_eq!(server.attributes(node), Err(ESTALE));
        assert_eq!(server.set(node, fattr::MODE, [0, 0, 0o600, 0, 0]).err(), Some(ESTALE));
    }
}

#[test]
fn a_directory_that_the_guest_has_open_is_used_whatever_others_do_to_its_name() {
    let Some(mut server) = Server::start(&["--nofile", "128"]) else { return };
    let host = tempfile::tempdir().unwrap();
    fs::create_dir_all(host.path().join("d/e")).unwrap();
    let root = server.share_root(host.path());
    let d = server.walk(root, &["d"]);
    let e = server.walk(d, &["e"]);
    let handle = server.open_directory(d).unwrap();
    crowd_out(&mut server, root, host.path());
    fs::rename(host.path().join("d"), host.path().join("moved")).unwrap();
    assert_eq!(server.attributes(d).unwrap().mode & libc::S_IFMT, libc::S_IFDIR);
    server.make_directory(d, "new", 0o700, 0).unwrap();
    server.attributes(e).unwrap();
    assert!(host.path().join("moved/new").is_dir());
    server.release(d, handle).unwrap();
    crowd_out(&mut server, root, host.path());
    assert_eq!(server.attributes(d), Err(ESTALE));
}

#[test]
fn what_is_renamed_or_exchanged_is_still_the_same() {
    let Some(mut server) = Server::start(&["--nofile", "128"]) else { return };
    let host = tempfile::tempdir().unwrap();
    let root = server.share_root(host.path());
    let d = server.make_directory(root, "d", 0o755, 0).unwrap().node;
    let e = server.make_directory(d, "e", 0o755, 0).unwrap().node;
    fs::write(host.path().join("d/e/f"), "f").unwrap();
    fs::write(host.path().join("g"), "other").unwrap();
    let (f, g) = (server.walk(e, &["f"]), server.walk(root, &["g"]));
    server.rename((root, "d"), (root, "moved"), 0).unwrap();
    server.rename((root, "g"), (e, "f"), libc::RENAME_EXCHANGE).unwrap();
    assert_eq!(server.rename((root, "g"), (e, "f"), libc::RENAME_NOREPLACE), Err(EEXIST));
    crowd_out(&mut server, root, host.path());
    for (node, size) in [(f, 1), (g, 5)] {
        assert_eq!(server.attributes(node).unwrap().size, size);
        server.open(node, O_RDONLY).unwrap();
    }
    assert_eq!(fs::read(host.path().join("moved/e/f")).unwrap(), b"other");
    // What was replaced lives on.
    server.rename((root, "g"), (e, "f"), 0).unwrap();
    assert_eq!(server.attributes(g).unwrap().links, 0);
    assert_eq!(server.call(opcode::RMDIR, root, b"moved\0").err(), Some(ENOTEMPTY));
}

#[test]
fn names_of_one_file_are_one_node() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("a"), "a").unwrap();
    let root = server.share_root(host.path());
    let a = server.walk(root, &["a"]);
    let linked = server.link(a, root, "b").unwrap();
    assert_eq!((linked.node, linked.attributes.links), (a, 2));
    server.unlink(root, "a").unwrap();
    assert_eq!(server.attributes(a).unwrap().links, 1);
    server.share("other", host.path(), bulkhead_fs::control::ShareKind::Bind, false);
    let other = server.walk(1, &["other"]);
    assert_eq!(server.link(a, other, "c").err(), Some(EXDEV));
    assert_eq!(server.rename((root, "b"), (other, "c"), 0), Err(EXDEV));
}

#[test]
fn a_file_without_a_name_is_given_one() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    let root = server.share_root(host.path());
    let (entry, _, mut file) = server.create(opcode::TMPFILE, root, "/", O_RDWR, 0o100_600, 0).unwrap();
    file.write_all(b"text").unwrap();
    assert_eq!(fs::read_dir(host.path()).unwrap().count(), 0);
    assert_eq!(server.attributes(entry.node).unwrap().links, 0);
    assert_eq!(server.link(entry.node, root, "named").unwrap().node, entry.node);
    assert_eq!(fs::read(host.path().join("named")).unwrap(), b"text");
}

#[test]
fn symbolic_links_are_read_and_never_followed() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    let root = server.share_root(host.path());
    let link = server.symlink(root, "s", "/etc/passwd").unwrap();
    assert_eq!(link.attributes.mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(server.call(opcode::READLINK, link.node, &[]).unwrap(), b"/etc/passwd");
    assert_eq!(server.open(link.node, O_RDONLY).err(), Some(ELOOP));
    assert_eq!(server.create(opcode::CREATE, root, "s", O_RDONLY, 0o644, 0).err(), Some(ESTALE));
    let before = fs::metadata("/etc/passwd").unwrap();
    server.set(link.node, fattr::UID | fattr::GID | fattr::MTIME, [0, 77, 0, 5, 6]).unwrap();
    assert!(server.set(link.node, fattr::SIZE, [0; 5]).is_err());
    let changed = fs::symlink_metadata(host.path().join("s")).unwrap();
    assert_eq!((changed.uid(), changed.gid(), changed.mtime()), (5, 6, 77));
    let after = fs::metadata("/etc/passwd").unwrap();
    assert_eq!((before.ctime(), before.ctime_nsec()), (after.ctime(), after.ctime_nsec()));
}

#[test]
fn only_regular_files_are_opened() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    let root = server.share_root(host.path());
    assert_eq!(server.open(root, O_RDONLY).err(), Some(EISDIR));
    for (name, mode, device) in [("fifo", libc::S_IFIFO, 0), ("null", libc::S_IFCHR, 0x103)] {
        let mut body = Writer::default();
        body.u32(mode | 0o666).u32(device).u32(0o22).u32(0).bytes(name.as_bytes()).bytes(&[0]);
        server.call(opcode::MKNOD, root, &body.0).unwrap();
        let node = server.walk(root, &[name]);
        assert_eq!(server.open(node, O_WRONLY).err(), Some(EINVAL), "{name}");
        assert_eq!(server.create(opcode::CREATE, root, name, O_WRONLY, 0o644, 0).err(), Some(ESTALE));
    }
    let null = fs::metadata(host.path().join("null")).unwrap();
    assert_eq!((null.rdev(), null.mode() & 0o777), (rustix::fs::makedev(1, 3), 0o644));
}

#[test]
fn open_files_are_sought_allocated_copied_and_synced() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    let root = server.share_root(host.path());
    let (entry, handle, file) = server.create(opcode::CREATE, root, "a", O_RDWR, 0o6777, 0).unwrap();
    file.write_at(b"data", 1 << 20).unwrap();
    let mut body = Writer::default();
    body.u64(handle).u64(0).u32(libc::SEEK_DATA.cast_unsigned()).u32(0);
    let found = server.call(opcode::LSEEK, entry.node, &body.0).unwrap();
    assert_eq!(found, (1_u64 << 20).to_le_bytes());
    let (to, to_handle, _) = server.create(opcode::CREATE, root, "b", O_RDWR, 0o6777, 0).unwrap();
    let mut body = Writer::default();
    body.u64(handle).u64(1 << 20).u64(to.node).u64(to_handle).u64(0).u64(u64::MAX).u64(0);
    let copied = server.call(opcode::COPY_FILE_RANGE, entry.node, &body.0).unwrap();
    assert_eq!(copied, [4, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fs::read(host.path().join("b")).unwrap(), b"data");
    assert_eq!(server.attributes(to.node).unwrap().mode & 0o7777, 0o777, "set-id bits go");
    let mut body = Writer::default();
    body.u64(to_handle).u64(0).u64(4096).u32(0).u32(0);
    server.call(opcode::FALLOCATE, to.node, &body.0).unwrap();
    assert_eq!(server.attributes(to.node).unwrap().size, 4096);
    for (what, node, body) in [
        (opcode::FSYNC, to.node, [to_handle.to_le_bytes(), [1, 0, 0, 0, 0, 0, 0, 0]].concat()),
        (opcode::SYNCFS, root, vec![0; 8]),
        (opcode::SYNCFS, 1, vec![0; 8]),
    ] {
        server.call(what, node, &body).unwrap();
    }
    let stat = server.call(opcode::STATFS, root, &[]).unwrap();
    assert_eq!((stat.len(), server.call(opcode::STATFS, 1, &[]).unwrap().len()), (80, 80));
}

/// A file system in a file, on a loop device, on which every change waits as long as it is frozen.
struct Frozen {
    directory: tempfile::TempDir,
    root: fs::File,
}

impl Frozen {
    /// None where there are no loop devices.
    fn new() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let (image, root) = (directory.path().join("image"), directory.path().join("root"));
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        fs::create_dir(&root).unwrap();
        let run = |program: &str, arguments: &[&Path]| {
            Command::new(program).args(arguments).output().is_ok_and(|output| output.status.success())
        };
        if !run("mkfs.ext4", &[Path::new("-q"), &image])
            || !run("mount", &[Path::new("-o"), Path::new("loop"), &image, &root])
        {
            println!("skipped: no loop devices, or no mkfs.ext4");
            return None;
        }
        let root = fs::File::open(root).unwrap();
        Some(Self { directory, root })
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("root")
    }

    /// FIFREEZE or FITHAW
    fn set(&self, request: libc::Ioctl) -> bool {
        // SAFETY: takes integers, touches no memory.
        unsafe { libc::ioctl(self.root.as_raw_fd(), request, 0) == 0 }
    }
}

const FIFREEZE: libc::Ioctl = 0xc004_5877;
const FITHAW: libc::Ioctl = 0xc004_5878;

impl Drop for Frozen {
    fn drop(&mut self) {
        self.set(FITHAW);
        unmount(self.path(), UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn what_waits_for_a_disk_holds_back_nothing_else() {
    let Some(mut server) = Server::start(&[]) else { return };
    let Some(frozen) = Frozen::new() else { return };
    fs::write(frozen.path().join("a"), "text").unwrap();
    let host = tempfile::tempdir().unwrap();
    let root = server.share_root(host.path());
    server.share("frozen", &frozen.path(), bulkhead_fs::control::ShareKind::Bind, false);
    let inside = server.walk(1, &["frozen"]);
    let a = server.walk(inside, &["a"]);
    let (handle, _) = server.open(a, O_RDWR).unwrap();
    assert!(frozen.set(FIFREEZE));
    let mut body = Writer::default();
    body.u64(handle).u64(0).u64(8192).u32(0).u32(0);
    server.send(opcode::FALLOCATE, a, &body.0);
    let waits = server.unique();
    // Of the other file system and of this one: whatever changes nothing.
    server.make_directory(root, "d", 0o755, 0).unwrap();
    assert_eq!(server.attributes(a).unwrap().size, 4);
    server.lookup(inside, "a").unwrap();
    server.open(a, O_RDONLY).unwrap();
    assert!(frozen.set(FITHAW));
    let (unique, result, _) = server.receive();
    assert_eq!((unique, result.map(|body| body.len())), (waits, Ok(0)));
    assert_eq!(server.attributes(a).unwrap().size, 8192);
    server.owner(Request::RemoveShare { name: "frozen".to_owned() }, &[]).unwrap();
}
