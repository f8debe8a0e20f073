//! Shares: kinds, single files, read-only ones, and their end.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use bulkhead_fs::control::{Fd, Request, ShareKind};
use bulkhead_fs::wire::{Reader, Writer, fattr, opcode};
use libc::{EACCES, EBADF, ENOENT, EROFS, ESTALE, O_APPEND, O_RDONLY, O_RDWR, O_TRUNC, O_WRONLY};

use rustix::fs::CWD;
use rustix::mount::{MountFlags, OpenTreeFlags, UnmountFlags, mount, open_tree, unmount};

use crate::client::{Server, text};

#[test]
fn what_the_guest_may_remember_depends_on_who_else_changes_it() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("a"), "").unwrap();
    for (name, kind, seconds, keep, cache) in
        [("root", ShareKind::Root, 3600, 2 | 32, 10), ("bind", ShareKind::Bind, 1, 32, 0)]
    {
        server.share(name, host.path(), kind, false);
        let share = server.lookup(1, name).unwrap();
        assert_eq!(share.timeout, 0, "another share may have the name at any time");
        assert_eq!(share.attributes.flags, 1, "a mount of its own");
        let entry = server.lookup(share.node, "a").unwrap();
        assert_eq!((entry.timeout, entry.attributes.flags), (seconds, 0));
        match server.lookup(share.node, "none") {
            Ok(none) => assert_eq!((kind, none.node, none.timeout), (ShareKind::Root, 0, 1)),
            Err(error) => assert_eq!((kind, error), (ShareKind::Bind, ENOENT)),
        }
        let reply = server.call(opcode::OPENDIR, share.node, &[0; 8]).unwrap();
        assert_eq!(Reader(&reply[8..]).u32(), Ok(cache));
        server.send(opcode::OPEN, entry.node, &[0; 8]);
        let (_, reply, file) = server.receive();
        assert_eq!((Reader(&reply.unwrap()[8..]).u32(), file.is_some()), (Ok(keep), true));
    }
}

#[test]
fn a_single_file_is_shared() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    let path = host.path().join("resolv.conf");
    fs::write(&path, "one").unwrap();
    server.share("file", &path, ShareKind::Bind, false);
    let file = server.lookup(1, "file").unwrap();
    assert_eq!((file.attributes.mode & libc::S_IFMT, file.attributes.size), (libc::S_IFREG, 3));
    let (_, open) = server.open(file.node, O_RDWR | O_APPEND).unwrap();
    rustix::io::write(&open, b" two").unwrap();
    server.set(file.node, fattr::MODE, [0, 0, 0o600, 0, 0]).unwrap();
    // It is the file that is shared, not its name.
    fs::rename(&path, host.path().join("moved")).unwrap();
    assert_eq!(server.attributes(file.node).unwrap().size, 7);
    server.open(file.node, O_RDONLY).unwrap();
    assert_eq!(server.lookup(file.node, "x").err(), Some(libc::ENOTDIR));
    let socket = host.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    server.share("socket", &socket, ShareKind::Bind, false);
    assert_eq!(server.lookup(1, "socket").unwrap().attributes.mode & libc::S_IFMT, libc::S_IFSOCK);
}

#[test]
fn a_share_that_was_removed_is_stale() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("a"), "").unwrap();
    let root = server.share_root(host.path());
    let node = server.walk(root, &["a"]);
    let (handle, _) = server.open(node, O_RDONLY).unwrap();
    let directory = server.open_directory(root).unwrap();
    server.owner(Request::RemoveShare { name: "share".to_owned() }, &[]).unwrap();
    for stale in [root, node] {
        assert_eq!(server.attributes(stale), Err(ESTALE));
    }
    assert_eq!(server.lookup(root, "a").err(), Some(ESTALE));
    assert_eq!(server.open(node, O_RDONLY).err(), Some(ESTALE));
    assert_eq!(server.list(opcode::READDIR, root, directory, 0, 4096).err(), Some(EBADF));
    assert_eq!(server.release(node, handle), Err(EBADF));
    assert_eq!(server.lookup(1, "share").err(), Some(ENOENT));
    let again = server.share_root(host.path());
    assert_ne!(again, root, "another share, another node");
    assert_ne!(server.walk(again, &["a"]), node);
    server.forget(node, 1);
    server.forget(root, 1);
    assert!(server.owner(Request::RemoveShare { name: "none".to_owned() }, &[]).is_err());
    // Nothing of the first one is held: it can be unmounted with the second.
    server.owner(Request::RemoveShare { name: "share".to_owned() }, &[]).unwrap();
    let open = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
    let inside = |path: &Path| path.to_string_lossy().contains("/a");
    assert_eq!(
        open.filter(|fd| fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|path| inside(&path))).count(),
        0
    );
}

#[test]
fn a_file_that_somebody_replaced_is_stale() {
    let Some(mut server) = Server::start(&["--nofile", "128"]) else { return };
    let host = tempfile::tempdir().unwrap();
    let root = server.share_root(host.path());
    fs::write(host.path().join("a"), "old").unwrap();
    let node = server.walk(root, &["a"]);
    fs::write(host.path().join("b"), "new!").unwrap();
    fs::rename(host.path().join("b"), host.path().join("a")).unwrap();
    assert_eq!(server.open(node, O_RDONLY).err(), Some(ESTALE));
    assert_eq!(server.attributes(node), Err(ESTALE));
    let new = server.lookup(root, "a").unwrap();
    assert_ne!(new.node, node);
    assert_eq!(new.attributes.size, 4);
    // What was moved is found where it was looked up last.
    fs::rename(host.path().join("a"), host.path().join("c")).unwrap();
    assert_eq!(server.lookup(root, "c").unwrap().node, new.node);
    server.open(new.node, O_RDONLY).unwrap();
}

#[test]
fn a_share_that_is_protected_refuses_changes_from_then_on() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("f"), "text").unwrap();
    let root = server.share_root(host.path());
    let f = server.walk(root, &["f"]);
    server.make_directory(root, "mnt", 0o755, 0).unwrap();
    server.owner(Request::Protect { name: "share".to_owned() }, &[]).unwrap();
    assert_eq!(server.make_directory(root, "new", 0o755, 0).err(), Some(EROFS));
    assert_eq!(server.open(f, O_RDWR).err(), Some(EROFS));
    server.open(f, O_RDONLY).unwrap();
    let missing = server.owner(Request::Protect { name: "none".to_owned() }, &[]).unwrap_err();
    assert!(missing.contains("none"), "{missing}");
}

#[test]
fn a_read_only_share_refuses_every_change() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    fs::create_dir(host.path().join("d")).unwrap();
    fs::write(host.path().join("f"), "text").unwrap();
    server.share("share", host.path(), ShareKind::Bind, true);
    server.share("other", host.path(), ShareKind::Bind, false);
    let (root, other) = (server.walk(1, &["share"]), server.walk(1, &["other"]));
    let (d, f) = (server.walk(root, &["d"]), server.walk(root, &["f"]));
    for flags in [O_WRONLY, O_RDWR, O_RDONLY | O_TRUNC] {
        assert_eq!(server.open(f, flags).err(), Some(EROFS), "{flags:o}");
    }
    let (handle, _) = server.open(f, O_RDONLY).unwrap();
    for parent in [root, d, 1] {
        assert_eq!(server.create(opcode::CREATE, parent, "f", O_RDONLY, 0o644, 0).err(), Some(EROFS));
        assert_eq!(server.create(opcode::TMPFILE, parent, "/", O_RDWR, 0o644, 0).err(), Some(EROFS));
        assert_eq!(server.make_directory(parent, "new", 0o755, 0).err(), Some(EROFS));
        assert_eq!(server.symlink(parent, "new", "x").err(), Some(EROFS));
        assert_eq!(server.link(f, parent, "new").err(), Some(EROFS));
        assert_eq!(server.unlink(parent, "f"), Err(EROFS));
        assert_eq!(server.call(opcode::RMDIR, parent, b"d\0").err(), Some(EROFS));
        assert_eq!(server.rename((parent, "f"), (other, "new"), 0), Err(EROFS));
        assert_eq!(server.rename((other, "f"), (parent, "new"), 0), Err(EROFS));
        let mut node = Writer::default();
        node.u32(libc::S_IFIFO | 0o644).u32(0).u32(0).u32(0).bytes(b"new\0");
        assert_eq!(server.call(opcode::MKNOD, parent, &node.0).err(), Some(EROFS));
    }
    for node in [f, root, 1] {
        for what in [fattr::MODE, fattr::UID, fattr::SIZE, fattr::MTIME] {
            assert_eq!(server.set(node, what, [0; 5]).err(), Some(EROFS));
        }
        assert_eq!(server.set_xattr(node, "user.a", b"x"), Err(EROFS));
        assert_eq!(server.call(opcode::REMOVEXATTR, node, &text(&["user.a"])).err(), Some(EROFS));
    }
    let mut allocate = Writer::default();
    allocate.u64(handle).u64(0).u64(100).u64(0);
    assert_eq!(server.call(opcode::FALLOCATE, f, &allocate.0).err(), Some(EROFS));
    assert_eq!(fs::read(host.path().join("f")).unwrap(), b"text");
    assert_eq!(fs::read_dir(host.path()).unwrap().count(), 2);
}

/// What is mounted below a directory comes with it, but for what the host's kernel says of itself.
#[test]
fn the_kernels_file_systems_below_a_share_are_not_entered() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    let mounted = ["proc", "sysfs", "tmpfs"].map(|kind| {
        let place = host.path().join(kind);
        fs::create_dir(&place).unwrap();
        mount("none", &place, kind, MountFlags::empty(), None).unwrap();
        place
    });
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, host.path(), flags).unwrap();
    for place in mounted {
        unmount(&place, UnmountFlags::DETACH).unwrap();
    }
    let (name, kind) = ("share".to_owned(), ShareKind::Bind);
    server.owner(Request::AddShare { name, share: Fd(0), kind, read_only: false }, &[tree.as_fd()]).unwrap();
    let root = server.walk(1, &["share"]);
    for (name, inside) in [("proc", "version"), ("sysfs", "kernel")] {
        let closed = server.lookup(root, name).unwrap();
        assert_eq!((closed.attributes.mode & libc::S_IFMT, closed.attributes.flags), (libc::S_IFDIR, 1));
        server.attributes(closed.node).unwrap();
        assert_eq!(server.lookup(closed.node, inside).err(), Some(EACCES), "{name}");
        assert_eq!(server.open_directory(closed.node).err(), Some(EACCES), "{name}");
        assert_eq!(server.make_directory(closed.node, "d", 0o755, 0).err(), Some(EACCES), "{name}");
        assert_eq!(server.set(closed.node, fattr::MODE, [0; 5]).err(), Some(EACCES), "{name}");
        assert_eq!(server.link(closed.node, root, "l").err(), Some(EACCES), "{name}");
    }
    let tmpfs = server.walk(root, &["tmpfs"]);
    server.make_directory(tmpfs, "d", 0o755, 0).unwrap();
    let handle = server.open_directory(root).unwrap();
    let listed = server.list(opcode::READDIRPLUS, root, handle, 0, 4096).unwrap();
    assert_eq!(listed.len(), 5);
}

#[test]
fn the_owner_is_told_what_cannot_be_shared() {
    let Some(mut server) = Server::start(&["--nofile", "128"]) else { return };
    let (root, null) = (fs::File::open("/").unwrap(), fs::File::open("/dev/null").unwrap());
    let mut add = |name: &str, file: &fs::File, fd| {
        let request = Request::AddShare {
            name: name.to_owned(),
            share: Fd(fd),
            kind: ShareKind::Bind,
            read_only: true,
        };
        server.owner(request, &[file.as_fd()])
    };
    for name in ["..", "a/b", ""] {
        assert!(add(name, &root, 0).unwrap_err().contains("name"));
    }
    assert!(add("a", &null, 0).unwrap_err().contains("CharacterDevice"));
    assert!(add("a", &root, 1).unwrap_err().contains("missing"));
    for share in 0..16 {
        add(&format!("{share}"), &root, 0).unwrap();
    }
    assert!(add("0", &root, 0).unwrap_err().contains("already"));
    assert!(add("a", &root, 0).unwrap_err().contains("no room"));
}
