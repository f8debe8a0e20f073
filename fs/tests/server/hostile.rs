//! A guest, or a VMM that was taken over, that tries to get out of its shares or to end the server. A canary lies beside the share.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use bulkhead_fs::wire::{Writer, fattr, opcode};
use libc::{
    EBADF, EINVAL, EISDIR, ENAMETOOLONG, ENOSYS, ENOTDIR, ESTALE, O_CREAT, O_RDONLY, O_RDWR, O_TRUNC,
};

use crate::client::{Server, text};

/// A directory with a share in it, and what must never change.
struct Host {
    directory: tempfile::TempDir,
    before: (u32, u64, i64, i64),
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("share/d")).unwrap();
        fs::create_dir(directory.path().join("outside")).unwrap();
        fs::write(directory.path().join("outside/canary"), "alive").unwrap();
        fs::write(directory.path().join("share/f"), "inside").unwrap();
        let before = look(&directory.path().join("outside/canary"));
        Self { directory, before }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn check(&self) {
        let canary = self.path("outside/canary");
        assert_eq!(look(&canary), self.before);
        assert_eq!(fs::read(&canary).unwrap(), b"alive");
        assert_eq!(fs::read_dir(self.path("outside")).unwrap().count(), 1);
        assert_eq!(fs::read_dir(self.directory.path()).unwrap().count(), 2);
    }
}

fn look(path: &Path) -> (u32, u64, i64, i64) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.mode(), metadata.nlink(), metadata.ctime(), metadata.ctime_nsec())
}

#[test]
fn names_that_lead_out_are_refused_by_every_request() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = Host::new();
    let root = server.share_root(&host.path("share"));
    let (d, f) = (server.walk(root, &["d"]), server.walk(root, &["f"]));
    let long = "x".repeat(256);
    let names = [
        "..",
        ".",
        "",
        "/etc/passwd",
        "../outside/canary",
        "a/b",
        "d/../../outside/canary",
        "/",
        "f/",
        &long,
    ];
    for name in names {
        let error = if name.len() > 255 { ENAMETOOLONG } else { EINVAL };
        for parent in [1, root, d] {
            assert_eq!(server.lookup(parent, name).err(), Some(error), "{name:?}");
        }
        for parent in [root, d] {
            let opened = server.create(opcode::CREATE, parent, name, O_RDWR | O_CREAT | O_TRUNC, 0o644, 0);
            assert_eq!(opened.err(), Some(error), "{name:?}");
            assert_eq!(server.make_directory(parent, name, 0o755, 0).err(), Some(error));
            assert_eq!(server.symlink(parent, name, "x").err(), Some(error));
            assert_eq!(server.link(f, parent, name).err(), Some(error));
            assert_eq!(server.unlink(parent, name), Err(error));
            assert_eq!(server.call(opcode::RMDIR, parent, &text(&[name])).err(), Some(error));
            assert_eq!(server.rename((parent, name), (root, "f"), 0), Err(error));
            assert_eq!(server.rename((root, "f"), (parent, name), libc::RENAME_EXCHANGE), Err(error));
            let old = [&parent.to_le_bytes()[..], &text(&["f", name])].concat();
            assert_eq!(server.call(opcode::RENAME, root, &old).err(), Some(error));
            let mut node = Writer::default();
            node.u32(libc::S_IFREG | 0o644).u32(0).u32(0).u32(0).bytes(&text(&[name]));
            assert_eq!(server.call(opcode::MKNOD, parent, &node.0).err(), Some(error));
        }
    }
    // No NUL at all, and one in the middle, which ends the name.
    assert_eq!(server.call(opcode::LOOKUP, root, b"f").err(), Some(EINVAL));
    assert_eq!(server.call(opcode::LOOKUP, root, b"").err(), Some(EINVAL));
    assert!(server.call(opcode::LOOKUP, root, b"f\0/../outside\0").is_ok());
    host.check();
}

#[test]
fn a_directory_that_became_a_link_leads_nowhere() {
    let Some(mut server) = Server::start(&["--nofile", "128"]) else { return };
    let host = Host::new();
    let root = server.share_root(&host.path("share"));
    fs::write(host.path("share/d/canary"), "decoy").unwrap();
    let d = server.walk(root, &["d"]);
    let canary = server.walk(d, &["canary"]);
    fs::rename(host.path("share/d"), host.path("share/old")).unwrap();
    symlink("../outside", host.path("share/d")).unwrap();
    // Whatever was kept of it goes.
    for name in 0..100 {
        fs::write(host.path(&format!("share/{name}")), "").unwrap();
        let node = server.walk(root, &[&format!("{name}")]);
        let (handle, _) = server.open(node, O_RDONLY).unwrap();
        server.release(node, handle).unwrap();
    }
    for node in [d, canary] {
        assert_eq!(server.attributes(node), Err(ESTALE));
        assert_eq!(server.open(node, O_RDWR | O_TRUNC).err(), Some(if node == d { EISDIR } else { ESTALE }));
        assert_eq!(server.set(node, fattr::MODE, [0; 5]).err(), Some(ESTALE));
    }
    assert_eq!(server.lookup(d, "canary").err(), Some(ESTALE));
    assert_eq!(server.create(opcode::CREATE, d, "new", O_RDWR, 0o644, 0).err(), Some(ESTALE));
    assert_eq!(server.unlink(d, "canary"), Err(ESTALE));
    // By its new name it is a link, and no directory.
    let link = server.walk(root, &["d"]);
    assert_eq!(server.lookup(link, "canary").err(), Some(ENOTDIR));
    assert_eq!(server.make_directory(link, "new", 0o755, 0).err(), Some(ENOTDIR));
    assert_eq!(server.unlink(link, "canary"), Err(ENOTDIR));
    assert_eq!(server.open_directory(link).err(), Some(ENOTDIR));
    assert_eq!(fs::read(host.path("share/old/canary")).unwrap(), b"decoy");
    host.check();
}

#[test]
fn ids_that_are_not_the_guests_are_refused() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = Host::new();
    let root = server.share_root(&host.path("share"));
    let f = server.walk(root, &["f"]);
    let (handle, _) = server.open(f, O_RDWR).unwrap();
    for node in [0, f + 1, 1 << 40, u64::MAX] {
        assert_eq!(server.attributes(node), Err(ESTALE));
        assert_eq!(server.open(node, O_RDONLY).err(), Some(ESTALE));
        assert_eq!(server.lookup(node, "f").err(), Some(ESTALE));
        assert_eq!(server.rename((root, "f"), (node, "g"), 0), Err(ESTALE));
        assert_eq!(server.link(node, root, "g").err(), Some(ESTALE));
        assert_eq!(server.release(node, handle), Err(EBADF));
        server.forget(node, u64::MAX);
    }
    for wrong in [0, handle + 1, u64::MAX] {
        assert_eq!(server.release(f, wrong), Err(EBADF));
        assert_eq!(server.list(opcode::READDIR, root, wrong, 0, 4096).err(), Some(EBADF));
        let mut copy = Writer::default();
        copy.u64(handle).u64(0).u64(f).u64(wrong).u64(0).u64(1).u64(0);
        assert_eq!(server.call(opcode::COPY_FILE_RANGE, f, &copy.0).err(), Some(EBADF));
    }
    // A file as a directory, and the other way round.
    assert_eq!(server.list(opcode::READDIR, f, handle, 0, 4096).err(), Some(ENOTDIR));
    assert_eq!(server.lookup(f, "x").err(), Some(ENOTDIR));
    assert_eq!(server.open_directory(f), Err(ENOTDIR));
    assert_eq!(server.create(opcode::TMPFILE, f, "/", O_RDWR, 0o600, 0).err(), Some(ENOTDIR));
    assert_eq!(server.open(root, O_RDWR).err(), Some(EISDIR));
    assert_eq!(server.call(opcode::READLINK, f, &[]).err(), Some(EINVAL));
    let directory = server.open_directory(root).unwrap();
    let mut sync = Writer::default();
    sync.u64(directory).u64(0);
    assert_eq!(server.call(opcode::FSYNC, root, &sync.0).err(), Some(EBADF));
    // A lookup too many forgotten: the node is gone, and the rest works.
    server.forget(f, u64::MAX);
    server.forget(1, u64::MAX);
    assert_eq!(server.attributes(f), Err(ESTALE));
    assert!(server.lookup(root, "f").is_ok());
    host.check();
}

#[test]
fn lengths_that_lie_are_refused() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = Host::new();
    let root = server.share_root(&host.path("share"));
    let f = server.walk(root, &["f"]);
    let directory = server.open_directory(root).unwrap();
    let mut xattr = Writer::default();
    xattr.u32(u32::MAX).u32(0).u64(0).bytes(b"user.a\0value");
    assert_eq!(server.call(opcode::SETXATTR, f, &xattr.0).err(), Some(EINVAL));
    assert!(server.get_xattr(f, "user.none", u32::MAX).is_err());
    let listed = server.list(opcode::READDIRPLUS, root, directory, 0, u32::MAX).unwrap();
    assert_eq!(listed.len(), 4);
    // Many more to forget than there are.
    server.send(opcode::BATCH_FORGET, 0, &[u32::MAX.to_le_bytes(), [0; 4]].concat());
    // Every request, without all that belongs to it.
    for opcode in (1..60).filter(|opcode| ![2, 38, 42].contains(opcode)) {
        for length in [0, 1, 7] {
            let result = server.call(opcode, f, &vec![0; length]);
            let bodiless =
                [opcode::STATFS, opcode::SYNCFS, opcode::READLINK, opcode::OPENDIR].contains(&opcode);
            assert!(result.is_err() || bodiless, "{opcode} with {length} bytes");
        }
    }
    assert_eq!(server.call(4096, f, &[]).err(), Some(ENOSYS));
    for vmms in [opcode::READ, opcode::WRITE, opcode::FLUSH] {
        assert_eq!(server.call(vmms, f, &[0; 40]).err(), Some(EBADF));
    }
    // Packets that are no requests: no header, another length, too long. Those with a header are answered.
    for length in [1, 15, 39] {
        server.send_raw(&vec![0xff; length]);
    }
    for packet in [vec![0; 40], vec![0xff; 41], vec![1; 80 << 10], vec![2; 100 << 10]] {
        server.send_raw(&packet);
        let (unique, result, _) = server.receive();
        assert_eq!((unique.to_le_bytes(), result.err()), ([packet[0]; 8], Some(EINVAL)));
    }
    assert!(server.attributes(root).is_ok());
    host.check();
}

#[test]
fn a_vmm_that_does_not_read_does_not_hold_up_the_owner() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = Host::new();
    for file in 0..1000 {
        fs::write(host.path(&format!("share/{file}")), "").unwrap();
    }
    let root = server.share_root(&host.path("share"));
    let directory = server.open_directory(root).unwrap();
    let mut list = Writer::default();
    list.u64(directory).u64(0).u32(128 << 10).u32(0).zeros(16);
    for _ in 0..20 {
        server.send(opcode::READDIRPLUS, root, &list.0);
    }
    server.share("other", &host.path("share"), bulkhead_fs::control::ShareKind::Bind, false);
    for _ in 0..20 {
        let (_, reply, _) = server.receive();
        assert!(reply.unwrap().len() > 100 << 10, "none was lost");
    }
    assert!(server.lookup(1, "other").is_ok());
    host.check();
}

#[test]
fn the_server_has_little_left_to_lose() {
    let Some(server) = Server::start(&["--nofile", "500"]) else { return };
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').trim().to_owned()
    };
    // CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(field(set), "00000000880000df", "{set}");
    }
    assert_eq!((field("CapInh"), field("CapAmb")), ("0".repeat(16), "0".repeat(16)));
    assert_eq!(
        (field("NoNewPrivs"), field("Seccomp"), field("Threads")),
        ("1".into(), "2".into(), "2".into())
    );
    // The other thread, too, and it is there before anything is asked.
    for thread in fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let confined =
            status.lines().filter(|line| ["CapEff:\t00000000880000df", "Seccomp:\t2"].contains(line));
        assert_eq!(confined.count(), 2, "{status}");
    }
    let process = PathBuf::from(format!("/proc/{}", server.pid()));
    assert_eq!(fs::read_dir(process.join("root")).unwrap().count(), 0);
    assert!(
        fs::read_to_string(process.join("limits"))
            .unwrap()
            .lines()
            .any(|line| { line.starts_with("Max open files") && line.contains(" 500 ") })
    );
    for namespace in ["mnt", "ipc", "uts", "cgroup"] {
        let of = |process: &Path| fs::read_link(process.join("ns").join(namespace)).unwrap();
        assert_ne!(of(&process), of(Path::new("/proc/self")), "{namespace}");
    }
    // No way up from the working directory to the rest of proc.
    let above = fs::read_dir(process.join("cwd/../..")).unwrap();
    assert!(above.map(|entry| entry.unwrap().file_name()).all(|name| name != "status" && name != "sys"));
}
