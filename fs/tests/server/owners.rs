//! Owners, permissions, extended attributes.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use bulkhead_fs::wire::{Writer, fattr, opcode};
use libc::{EINVAL, ENODATA, EOPNOTSUPP, ERANGE, O_RDWR};

use crate::client::Server;

#[test]
fn what_is_made_belongs_to_who_asked() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    let root = server.share_root(host.path());
    (server.uid, server.gid) = (1234, 5678);
    let file = server.create(opcode::CREATE, root, "f", O_RDWR, 0o100_666, 0o27).unwrap().0;
    let directory = server.make_directory(root, "d", 0o777, 0o77).unwrap();
    let link = server.symlink(root, "s", "x").unwrap();
    for (entry, mode) in [(file, 0o640), (directory, 0o700), (link, 0o777)] {
        let made = entry.attributes;
        assert_eq!((made.uid, made.gid, made.mode & 0o7777), (1234, 5678, mode));
    }
    // The host's directory is root's: it is the guest's kernel that decides who may do what.
    let on_host = fs::metadata(host.path().join("f")).unwrap();
    assert_eq!((on_host.uid(), on_host.gid()), (1234, 5678));
    // It found its way back to its own descriptors, too, which the kernel shows only to itself.
    server.set(file.node, fattr::MODE, [0, 0, 0o600, 0, 0]).unwrap();
    server.open(file.node, O_RDWR).unwrap();
    (server.uid, server.gid) = (0, 0);
    let file = server.create(opcode::CREATE, root, "root", O_RDWR, 0o100_666, 0).unwrap().0;
    assert_eq!((file.attributes.uid, file.attributes.gid, file.attributes.mode & 0o777), (0, 0, 0o666));
    server.uid = u32::MAX;
    assert_eq!(server.make_directory(root, "nobody", 0o777, 0).err(), Some(EINVAL));
    assert!(!host.path().join("nobody").exists());
}

#[test]
fn a_set_group_id_directory_gives_its_group() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    let root = server.share_root(host.path());
    let directory = server.make_directory(root, "d", 0o777, 0).unwrap().node;
    server.set(directory, fattr::UID | fattr::GID, [0, 0, 0, 1, 42]).unwrap();
    let set = server.set(directory, fattr::MODE, [0, 0, 0o2777, 0, 0]).unwrap();
    assert_eq!(set.mode & 0o7777, 0o2777);
    (server.uid, server.gid) = (7, 7);
    let file = server.create(opcode::CREATE, directory, "f", O_RDWR, 0o100_644, 0).unwrap().0.attributes;
    assert_eq!((file.uid, file.gid), (7, 42));
    let inner = server.make_directory(directory, "i", 0o755, 0).unwrap().attributes;
    assert_eq!((inner.gid, inner.mode & 0o7777), (42, 0o2755));
}

#[test]
fn attributes_are_set_as_asked() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    let root = server.share_root(host.path());
    let node = server.create(opcode::CREATE, root, "f", O_RDWR, 0o100_755, 0).unwrap().0.node;
    let all = fattr::MODE | fattr::UID | fattr::GID | fattr::SIZE | fattr::ATIME | fattr::MTIME;
    let set = server.set(node, all, [1000, 99, 0o6751, 3, 4]).unwrap();
    assert_eq!((set.size, set.mode & 0o7777, set.uid, set.gid), (1000, 0o6751, 3, 4));
    let on_host = fs::metadata(host.path().join("f")).unwrap();
    assert_eq!((on_host.mtime(), on_host.atime()), (99, 99));
    let set = server.set(node, fattr::SIZE | fattr::KILL_SUIDGID, [5, 0, 0, 0, 0]).unwrap();
    assert_eq!((set.size, set.mode & 0o7777), (5, 0o751));
    server.set(node, fattr::MODE, [0, 0, 0o6755, 0, 0]).unwrap();
    let set = server.set(node, fattr::UID, [0, 0, 0, 8, 0]).unwrap();
    assert_eq!((set.uid, set.gid, set.mode & 0o7777), (8, 4, 0o755), "the host takes set-id bits away");
    assert_eq!(server.set(node, fattr::UID, [0, 0, 0, u64::from(u32::MAX), 0]).err(), Some(EINVAL));
    let now = fattr::MTIME | fattr::MTIME_NOW;
    server.set(node, now, [0, 99, 0, 0, 0]).unwrap();
    assert!(fs::metadata(host.path().join("f")).unwrap().mtime() > 1_000_000_000);
    assert_eq!(server.set(root, fattr::SIZE, [0; 5]).err(), Some(libc::EISDIR));
}

/// An access control list, as in `system.posix_acl_*`: tag, permissions, id of each entry.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = Writer::default();
    bytes.u32(2);
    for (tag, permissions, id) in entries {
        bytes.u16(*tag).u16(*permissions).u32(*id);
    }
    bytes.0
}

#[test]
fn a_default_acl_decides_instead_of_the_mask() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    let root = server.share_root(host.path());
    let directory = server.make_directory(root, "d", 0o755, 0).unwrap().node;
    let list = acl(&[(1, 7, u32::MAX), (2, 6, 1000), (4, 5, u32::MAX), (16, 7, u32::MAX), (32, 0, u32::MAX)]);
    match server.set_xattr(directory, "system.posix_acl_default", &list) {
        Err(EOPNOTSUPP) => return println!("skipped: no lists on the file system of temporary files"),
        other => other.unwrap(),
    }
    assert_eq!(server.get_xattr(directory, "system.posix_acl_default", 4096).unwrap(), list);
    let file = server.create(opcode::CREATE, directory, "f", O_RDWR, 0o100_666, 0o777).unwrap().0;
    assert_eq!(file.attributes.mode & 0o777, 0o660, "the mask is of no account");
    let inherited = server.get_xattr(file.node, "system.posix_acl_access", 4096).unwrap();
    assert!(inherited.len() > 4);
    let without = server.create(opcode::CREATE, root, "f", O_RDWR, 0o100_666, 0o777).unwrap().0;
    assert_eq!(without.attributes.mode & 0o777, 0);
}

#[test]
fn extended_attributes_of_the_guests_are_kept_and_of_the_hosts_not_shown() {
    let Some(mut server) = Server::start(&[]) else { return };
    let host = tempfile::tempdir().unwrap();
    let path = host.path().join("f");
    fs::write(&path, "").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    if rustix::fs::setxattr(&path, "trusted.host", b"secret", rustix::fs::XattrFlags::empty()).is_err() {
        return println!("skipped: no extended attributes on the file system of temporary files");
    }
    let root = server.share_root(host.path());
    let node = server.walk(root, &["f"]);
    server.set_xattr(node, "user.a", b"value").unwrap();
    assert_eq!(server.get_xattr(node, "user.a", 100).unwrap(), b"value");
    assert_eq!(server.get_xattr(node, "user.a", 0).unwrap(), [5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(server.get_xattr(node, "user.a", 4), Err(ERANGE));
    assert_eq!(server.get_xattr(node, "user.b", 100), Err(ENODATA));
    let names = server.call(opcode::LISTXATTR, node, &[0, 1, 0, 0, 0, 0, 0, 0]).unwrap();
    assert_eq!(names, b"user.a\0");
    // CAP_SYS_ADMIN is what it takes, and the server has it not.
    assert_eq!(server.get_xattr(node, "trusted.host", 100), Err(ENODATA));
    assert_eq!(server.set_xattr(node, "trusted.guest", b"x"), Err(libc::EPERM));
    for name in ["security.selinux", "system.other", "nonsense", ""] {
        assert_eq!(server.set_xattr(node, name, b"x"), Err(EOPNOTSUPP), "{name}");
        assert_eq!(server.get_xattr(node, name, 100), Err(EOPNOTSUPP), "{name}");
    }
    // cap_net_raw+ep, which a change of owner takes away.
    let capability = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    server.set_xattr(node, "security.capability", &capability).unwrap();
    assert_eq!(server.get_xattr(node, "security.capability", 100).unwrap(), capability);
    server.set(node, fattr::UID, [0, 0, 0, 5, 0]).unwrap();
    assert_eq!(server.get_xattr(node, "security.capability", 100), Err(ENODATA));
    server.call(opcode::REMOVEXATTR, node, b"user.a\0").unwrap();
    assert_eq!(server.get_xattr(node, "user.a", 100), Err(ENODATA));
    // Whether the file system has room for it or not, the packet has.
    assert_ne!(server.set_xattr(node, "user.big", &vec![0; 64 << 10]), Err(EINVAL));
}
