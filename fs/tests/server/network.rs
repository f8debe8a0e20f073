//! Shares on a network file system, which a FUSE server in the test plays: it tells only at close that there is no room, and takes root for
//! nobody.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;

use bulkhead_fs::control::{Fd, Request, ShareKind};
use bulkhead_fs::wire::{ENTRY_OUT, FOPEN_NOFLUSH, InHeader, Reader, Writer, fattr, opcode};
use libc::{EACCES, EBADF, EDQUOT, ENOENT, ENOSYS, EPERM, O_APPEND, O_CREAT, O_RDONLY, O_RDWR, O_WRONLY};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

use crate::client::Server;
use crate::ring::Guest;

/// Its root directory, its file `f`, and a directory `d` that may be made.
const ROOT: u64 = 1;
const FILE: u64 = 2;
const DIRECTORY: u64 = 3;

/// What it thinks of root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Root {
    Root,
    Nobody,
}

/// A detached mount of a new one, or nothing where there is no FUSE.
fn mount(root: Root) -> Option<OwnedFd> {
    let Ok(device) = OpenOptions::new().read(true).write(true).open("/dev/fuse") else {
        println!("skipped: no /dev/fuse");
        return None;
    };
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    let number = device.as_raw_fd().to_string();
    for (key, value) in [("fd", &number[..]), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")] {
        fsconfig_set_string(context.as_fd(), key, value).unwrap();
    }
    fsconfig_create(context.as_fd()).unwrap();
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).unwrap();
    // It ends with the last reference to the mount.
    thread::spawn(move || Network { device, root, has_directory: false }.serve());
    Some(mount)
}

struct Network {
    device: File,
    root: Root,
    has_directory: bool,
}

impl Network {
    fn serve(mut self) {
        let mut request = vec![0; 256 << 10];
        while let Ok(length) = self.device.read(&mut request) {
            let (header, body) = InHeader::parse(&request[..length]).unwrap();
            if [opcode::FORGET, opcode::BATCH_FORGET].contains(&header.opcode) {
                continue;
            }
            let mut reply = Writer::reply();
            let error = self.answer(&header, body, &mut reply).err().map(Errno::from_raw_os_error);
            // Who asked may have gone.
            let _ = self.device.write(&reply.finish(header.unique, error));
        }
    }

    fn answer(
        &mut self,
        header: &InHeader,
        mut body: Reader<'_>,
        to: &mut Writer,
    ) -> std::result::Result<(), i32> {
        let is_nobody = header.uid == 0 && self.root == Root::Nobody;
        match header.opcode {
            opcode::INIT => {
                to.u32(7).u32(31).zeros(8).u16(12).u16(9).u32(4096).u32(1).zeros(36);
            }
            opcode::STATFS => drop(to.zeros(80)),
            opcode::LOOKUP | opcode::MKDIR | opcode::UNLINK if is_nobody => return Err(EACCES),
            opcode::SETATTR if is_nobody => return Err(EPERM),
            opcode::OPEN if is_nobody && body.u32() != Ok(O_RDONLY.cast_unsigned()) => return Err(EACCES),
            opcode::LOOKUP => match body.text().unwrap().to_bytes() {
                b"f" => entry(FILE, to),
                b"d" if self.has_directory => entry(DIRECTORY, to),
                _ => return Err(ENOENT),
            },
            opcode::MKDIR => {
                self.has_directory = true;
                entry(DIRECTORY, to);
            }
            opcode::GETATTR | opcode::SETATTR => {
                to.zeros(16);
                attributes(header.node, to);
            }
            opcode::OPEN => drop(to.zeros(16)),
            opcode::CREATE => {
                entry(FILE, to);
                to.zeros(16);
            }
            opcode::WRITE => {
                body.skip(16).unwrap();
                to.u32(body.u32().unwrap()).u32(0);
            }
            opcode::FLUSH => return Err(EDQUOT),
            opcode::UNLINK | opcode::RELEASE => {}
            _ => return Err(ENOSYS),
        }
        Ok(())
    }
}

/// `fuse_entry_out`, of which nothing may be remembered.
fn entry(node: u64, to: &mut Writer) {
    to.u64(node).zeros(32);
    attributes(node, to);
}

/// `fuse_attr`
fn attributes(node: u64, to: &mut Writer) {
    let mode = if node == FILE { libc::S_IFREG | 0o600 } else { libc::S_IFDIR | 0o700 };
    to.u64(node).zeros(52).u32(mode).u32(1).u32(1000).u32(1000).u32(0).u32(4096).u32(0);
}

fn share(server: &mut Server, mount: &OwnedFd) {
    let (name, kind) = ("network".to_owned(), ShareKind::Bind);
    server.owner(Request::AddShare { name, share: Fd(0), kind, read_only: false }, &[mount.as_fd()]).unwrap();
}

/// OPEN: the handle, and whether the guest need not ask what close says.
fn open(guest: &mut Guest, node: u64, flags: i32) -> (u64, bool) {
    let opened = guest.call(opcode::OPEN, node, &[flags.to_le_bytes(), [0; 4]].concat()).unwrap();
    let mut opened = Reader(&opened);
    (opened.u64().unwrap(), opened.u32().unwrap() & FOPEN_NOFLUSH != 0)
}

#[test]
fn what_only_close_tells_is_told_to_the_guest() {
    let Some(mut guest) = Guest::start(&[]) else { return };
    let Some(mount) = mount(Root::Root) else { return };
    share(&mut guest.server, &mount);
    let network = guest.lookup(1, "network").unwrap();
    let f = guest.lookup(network, "f").unwrap();
    for flags in [O_WRONLY, O_RDWR] {
        let (handle, no_flush) = open(&mut guest, f, flags);
        assert!(!no_flush);
        assert_eq!(guest.write_file(f, handle, 0, 4, b"lost"), Ok(4));
        for _ in 0..2 {
            assert_eq!(guest.flush(f, handle), Err(EDQUOT));
        }
        assert_eq!(guest.write_file(f, handle, 0, 4, b"more"), Ok(4), "it is still open");
        guest.release(f, handle).unwrap();
        assert_eq!(guest.flush(f, handle), Err(EBADF));
    }
    assert!(open(&mut guest, f, O_RDONLY).1, "nothing is lost of what is only read");
    let mut body = Writer::default();
    body.u32((O_WRONLY | O_CREAT).cast_unsigned()).u32(0o600).zeros(8).bytes(b"new\0");
    let made = guest.call(opcode::CREATE, network, &body.0).unwrap();
    assert_eq!(Reader(&made[ENTRY_OUT + 8..]).u32().unwrap() & FOPEN_NOFLUSH, 0);

    let host = tempfile::tempdir().unwrap();
    std::fs::write(host.path().join("f"), "").unwrap();
    let local = guest.share("local", host.path(), false);
    let f = guest.lookup(local, "f").unwrap();
    assert!(open(&mut guest, f, O_WRONLY).1);
    let (handle, no_flush) = open(&mut guest, f, O_RDWR);
    assert!(!no_flush, "it may be mapped");
    assert_eq!(guest.flush(f, handle), Ok(()));
}

#[test]
fn what_is_mounted_below_a_share_is_known_for_what_it_is() {
    use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};

    let Some(mut guest) = Guest::start(&[]) else { return };
    let Some(mounted) = mount(Root::Root) else { return };
    let host = tempfile::tempdir().unwrap();
    let place = host.path().join("place");
    std::fs::create_dir(&place).unwrap();
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(mounted.as_fd(), "", rustix::fs::CWD, &place, flags).unwrap();
    let root = guest.share("share", host.path(), false);
    let place_node = guest.lookup(root, "place").unwrap();
    let f = guest.lookup(place_node, "f").unwrap();
    let (_, inside) = open(&mut guest, f, O_WRONLY);
    let (made, _) = guest.create(root, "beside", O_RDWR).unwrap();
    let (_, beside) = open(&mut guest, made, O_WRONLY);
    unmount(&place, UnmountFlags::DETACH).unwrap();
    assert_eq!((inside, beside), (false, true));
}

#[test]
fn what_is_refused_to_root_is_done_as_who_asks() {
    let Some(mut server) = Server::start(&[]) else { return };
    let Some(mount) = mount(Root::Nobody) else { return };
    share(&mut server, &mount);
    let root = server.walk(1, &["network"]);
    assert_eq!(server.lookup(root, "f").err(), Some(EACCES), "root has nothing but its name there");
    (server.uid, server.gid) = (1000, 1000);
    let f = server.walk(root, &["f"]);
    server.open(f, O_WRONLY | O_APPEND).unwrap();
    server.set(f, fattr::MODE, [0, 0, 0o644, 0, 0]).unwrap();
    let made = server.make_directory(root, "d", 0o700, 0).unwrap();
    assert_eq!(made.attributes.inode, DIRECTORY);
    (server.uid, server.gid) = (0, 0);
    assert_eq!(server.open(f, O_WRONLY).err(), Some(EACCES));
    assert_eq!(server.set(f, fattr::MODE, [0, 0, 0o644, 0, 0]).err(), Some(EPERM));
    assert_eq!(server.unlink(root, "f"), Err(EACCES));
    (server.uid, server.gid) = (1000, 1000);
    server.unlink(root, "f").unwrap();
    assert_eq!(server.attributes(root).unwrap().inode, ROOT);
}
