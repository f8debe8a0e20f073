//! Directories: listing them, whole and in parts, with few descriptors.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use bulkhead_fs::wire::opcode::{READDIR, READDIRPLUS};
use libc::{EBADF, EINVAL, EMFILE, ENOTDIR, ESTALE, O_RDONLY};

use crate::client::Server;

/// Many more than there are descriptors.
const FILES: usize = 20_000;

/// All names, read by so many bytes, and the nodes that came with them.
fn read_all(server: &mut Server, what: u32, node: u64, size: u32) -> (BTreeSet<String>, Vec<u64>) {
    let handle = server.open_directory(node).unwrap();
    let (mut names, mut nodes, mut offset) = (BTreeSet::new(), Vec::new(), 0);
    loop {
        let entries = server.list(what, node, handle, offset, size).unwrap();
        if entries.is_empty() {
            break;
        }
        for (node, next, name) in entries {
            let dots = matches!(&name[..], "." | "..");
            assert_eq!(node != 0, what == READDIRPLUS && !dots, "{name}");
            nodes.extend((!dots).then_some(node));
            assert!(names.insert(name), "no name comes twice");
            offset = next;
        }
    }
    server.release(node, handle).unwrap();
    (names, nodes)
}

#[test]
fn twenty_thousand_files_are_listed_and_opened_with_few_descriptors() {
    let Some(mut server) = Server::start(&["--nofile", "256"]) else { return };
    let host = tempfile::tempdir().unwrap();
    for file in 0..FILES {
        fs::write(host.path().join(format!("file-{file}")), "x").unwrap();
    }
    let root = server.share_root(host.path());
    let (plain, _) = read_all(&mut server, READDIR, root, 4096);
    let (plus, nodes) = read_all(&mut server, READDIRPLUS, root, 128 << 10);
    assert_eq!(plain.len(), FILES + 2);
    assert_eq!(plain, plus);
    assert_eq!(nodes.iter().collect::<BTreeSet<_>>().len(), FILES);
    for node in &nodes {
        assert_eq!(server.attributes(*node).unwrap().size, 1);
    }
    for node in nodes.iter().step_by(7) {
        let (handle, _) = server.open(*node, O_RDONLY).unwrap();
        server.release(*node, handle).unwrap();
        server.forget(*node, 1);
        assert_eq!(server.attributes(*node), Err(ESTALE));
    }
}

#[test]
fn a_directory_is_read_from_any_offset_again() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    for file in 0..500 {
        fs::write(host.path().join(format!("{file}")), "").unwrap();
    }
    let root = server.share_root(host.path());
    let handle = server.open_directory(root).unwrap();
    let mut read = |what, offset, size| server.list(what, root, handle, offset, size).unwrap();
    let whole = read(READDIR, 0, 64 << 10);
    assert_eq!(whole.len(), 502);
    for at in [0, 1, 17, 250, 500] {
        let some = read(READDIR, whole[at].1, 200);
        assert!(!some.is_empty());
        assert_eq!(some[..], whole[at + 1..][..some.len()], "behind the entry {at}");
        let plus = read(READDIRPLUS, whole[at].1, 400);
        assert_eq!(plus[0].2, whole[at + 1].2);
    }
    assert!(read(READDIR, whole[501].1, 4096).is_empty());
    assert_eq!(server.list(READDIR, root, handle, 0, 8).err(), Some(EINVAL), "that would look like the end");
    assert_eq!(server.list(READDIR, root, handle, u64::MAX, 4096).err(), Some(EINVAL));
    assert_eq!(server.list(READDIR, 1, handle, 0, 4096).err(), Some(EBADF));
}

#[test]
fn a_directory_that_is_gone_is_known_and_empty() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    let root = server.share_root(host.path());
    let d = server.make_directory(root, "d", 0o755, 0).unwrap().node;
    let handle = server.open_directory(d).unwrap();
    server.call(bulkhead_fs::wire::opcode::RMDIR, root, b"d\0").unwrap();
    assert_eq!(server.attributes(d).unwrap().links, 0);
    // As on the host.
    assert_eq!(server.list(READDIR, d, handle, 0, 4096), Err(libc::ENOENT));
    server.release(d, handle).unwrap();
    assert_eq!(server.make_directory(d, "x", 0o755, 0).err(), Some(libc::ENOENT));
}

#[test]
fn the_root_directory_lists_the_shares() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("file"), "text").unwrap();
    for (name, path) in [("b", host.path()), ("a", Path::new("/")), ("c", &host.path().join("file"))] {
        server.share(name, path, bulkhead_fs::control::ShareKind::Bind, true);
    }
    let (names, nodes) = read_all(&mut server, READDIRPLUS, 1, 4096);
    assert_eq!(names, [".", "..", "a", "b", "c"].map(str::to_owned).into());
    assert_eq!(nodes.len(), 3);
    let (names, _) = read_all(&mut server, READDIR, 1, 40);
    assert_eq!(names.len(), 5, "one at a time");
    let root = server.attributes(1).unwrap();
    assert_eq!((root.inode, root.mode), (1, libc::S_IFDIR | 0o555));
    let file = server.walk(1, &["c"]);
    assert_eq!(server.open_directory(file).err(), Some(ENOTDIR));
}

#[test]
fn what_is_open_is_bounded() {
    let Some(mut server) = Server::start(&["--nofile", "128"]) else { return };
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("a"), "").unwrap();
    let root = server.share_root(host.path());
    let node = server.walk(root, &["a"]);
    let mut open = Vec::new();
    let error = loop {
        match server.open(node, O_RDONLY) {
            Ok(file) => open.push(file),
            Err(error) => break error,
        }
    };
    assert_eq!((error, open.len()), (EMFILE, 64));
    assert_eq!(server.open_directory(root), Err(EMFILE));
    assert!(server.lookup(root, "a").is_ok());
    server.release(node, open.pop().unwrap().0).unwrap();
    server.open(node, O_RDONLY).unwrap();
    // DESTROY closes all.
    server.send(bulkhead_fs::wire::opcode::DESTROY, 0, &[]);
    let root = server.walk(1, &["share"]);
    let node = server.walk(root, &["a"]);
    for _ in 0..64 {
        server.open(node, O_RDONLY).unwrap();
    }
}
