//! Requests of any kind: each gets a reply that the guest's kernel would accept, or none, and nothing outside of the share changes.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::*;
use crate::wire::{IN_HEADER, opcode};

const LIMITS: Limits = Limits { cached: 4, handles: 8, shares: 4 };

/// A share in a directory with something beside it.
struct Host {
    directory: tempfile::TempDir,
    session: Session,
}

impl Host {
    fn new(read_only: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let share = directory.path().join("share");
        fs::create_dir_all(share.join("d/e")).unwrap();
        fs::write(share.join("f"), "inside").unwrap();
        fs::write(directory.path().join("canary"), "outside").unwrap();
        std::os::unix::fs::symlink("../canary", share.join("s")).unwrap();
        let mut session = Session::new(LIMITS, OwnDescriptors::Proc, Identities::Own);
        let root = fs::File::open(&share).unwrap();
        session.add_share("share", root.into(), ShareKind::Bind, read_only).unwrap();
        Self { directory, session }
    }

    fn send(&mut self, opcode: u32, node: u64, body: &[u8]) -> Option<Reply> {
        self.answer(&packet(opcode, node, body))
    }

    fn answer(&mut self, packet: &[u8]) -> Option<Reply> {
        match self.session.answer(packet) {
            Answer::Reply(reply) => Some(reply),
            Answer::Later(job) => Some(job.perform()),
            Answer::Nothing => None,
        }
    }

    /// The guest knows nodes 2 to 6 and has handles 1 to 4.
    fn warm_up(&mut self) {
        for (parent, name) in [(1, "share\0"), (2, "d\0"), (3, "e\0"), (2, "f\0"), (2, "s\0")] {
            let reply = self.send(opcode::LOOKUP, parent, name.as_bytes()).unwrap();
            assert_eq!(reply.bytes.len(), OUT_HEADER + 128, "{name}: {reply:?}");
        }
        for (what, node) in
            [(opcode::OPEN, 5), (opcode::OPENDIR, 2), (opcode::OPENDIR, 1), (opcode::OPENDIR, 3)]
        {
            assert_eq!(self.send(what, node, &[0; 8]).unwrap().bytes.len(), OUT_HEADER + 16);
        }
    }

    fn everything(&self) -> BTreeMap<PathBuf, (Vec<u8>, std::time::SystemTime)> {
        let mut found = BTreeMap::new();
        let mut left = vec![self.directory.path().to_owned()];
        while let Some(path) = left.pop() {
            let metadata = fs::symlink_metadata(&path).unwrap();
            let content = if metadata.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            if metadata.is_dir() {
                left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
            found.insert(path, (content, metadata.modified().unwrap()));
        }
        found
    }
}

fn packet(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.u32(u32::try_from(IN_HEADER + body.len()).unwrap()).u32(opcode).u64(0x7ea5).u64(node);
    writer.u32(0).u32(0).u64(0).bytes(body);
    writer.0
}

fn check(reply: &Reply) -> Result<(), TestCaseError> {
    let bytes = &reply.bytes;
    prop_assert!((OUT_HEADER..=REPLY_MAX).contains(&bytes.len()));
    prop_assert_eq!(bytes[..4].to_vec(), u32::try_from(bytes.len()).unwrap().to_le_bytes());
    let error = i32::from_le_bytes(bytes[4..8].try_into().unwrap());
    prop_assert!((-511..=0).contains(&error), "{}", error);
    if error != 0 {
        prop_assert!(bytes.len() == OUT_HEADER && reply.file.is_none());
    }
    Ok(())
}

/// Bodies of requests: small numbers, as of nodes, handles and flags, and names, good and bad.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![
        8 => 0..10_u64,
        1 => any::<u32>().prop_map(|low| u64::from(low) & 0xffff),
        1 => prop::sample::select(vec![u64::MAX, 1 << 63, u64::from(u32::MAX)]),
    ];
    let names = ["d\0", "e\0", "f\0", "s\0", "new\0", "share\0", "..\0", ".\0", "\0", "a/b\0", "../canary\0"];
    let piece = prop_oneof![
        4 => number.prop_map(|number| number.to_le_bytes().to_vec()),
        1 => any::<[u8; 4]>().prop_map(|[low, ..]| u32::from(low).to_le_bytes().to_vec()),
        4 => prop::sample::select(names.to_vec()).prop_map(|name| name.as_bytes().to_vec()),
        1 => Just(b"user.x\0value".to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..20),
        1 => Just(vec![b'n'; 256]),
    ];
    prop::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn any_bytes_are_answered_or_ignored(packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..120), 1..20)) {
        let mut host = Host::new(false);
        for packet in packets {
            if let Some(reply) = host.answer(&packet) {
                check(&reply)?;
            }
        }
    }

    #[test]
    fn any_requests_are_answered_and_stay_in_the_share(
        requests in prop::collection::vec((0..55_u32, 0..9_u64, body()), 1..40),
    ) {
        let mut host = Host::new(false);
        host.warm_up();
        let canary = host.directory.path().join("canary");
        let before = fs::metadata(&canary).unwrap();
        for (opcode, node, body) in requests {
            if let Some(reply) = host.send(opcode, node, &body) {
                check(&reply)?;
            }
        }
        let after = fs::metadata(&canary).unwrap();
        prop_assert_eq!(fs::read(&canary).unwrap(), b"outside");
        prop_assert_eq!(
            (before.mode(), before.nlink(), before.mtime_nsec(), before.ctime_nsec()),
            (after.mode(), after.nlink(), after.mtime_nsec(), after.ctime_nsec())
        );
        let mut beside: Vec<_> = fs::read_dir(host.directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        beside.sort();
        prop_assert_eq!(beside, ["canary", "share"]);
    }

    #[test]
    fn nothing_changes_in_a_read_only_share(
        requests in prop::collection::vec((0..55_u32, 0..9_u64, body()), 1..40),
    ) {
        let mut host = Host::new(true);
        host.warm_up();
        let before = host.everything();
        for (opcode, node, body) in requests {
            if let Some(reply) = host.send(opcode, node, &body) {
                check(&reply)?;
            }
        }
        prop_assert_eq!(host.everything(), before);
    }
}

#[test]
fn a_short_packet_has_no_reply_and_a_wrong_length_is_an_error() {
    let mut host = Host::new(false);
    let whole = packet(opcode::GETATTR, 1, &[0; 16]);
    for length in 0..IN_HEADER {
        assert!(host.answer(&whole[..length]).is_none(), "{length}");
    }
    for length in IN_HEADER..whole.len() {
        let reply = host.answer(&whole[..length]).unwrap();
        assert_eq!(reply.bytes[4..8], (-libc::EINVAL).to_le_bytes(), "{length}");
    }
    assert_eq!(host.answer(&whole).unwrap().bytes.len(), OUT_HEADER + 104);
}

#[test]
fn a_file_is_found_again_when_its_descriptor_had_to_go() {
    let mut host = Host::new(false);
    host.warm_up();
    let share = Path::new(host.directory.path()).join("share");
    for name in 0..20 {
        fs::create_dir(share.join(format!("{name}"))).unwrap();
        let reply = host.send(opcode::LOOKUP, 2, format!("{name}\0").as_bytes()).unwrap();
        let node = u64::from_le_bytes(reply.bytes[16..24].try_into().unwrap());
        host.session.at(node).unwrap();
    }
    assert!(host.session.nodes.get(4).unwrap().slot.is_none());
    assert!(host.session.at(4).is_ok(), "by way of its parent");
    fs::rename(share.join("d/e"), share.join("d/other")).unwrap();
    for node in 7..20 {
        host.session.at(node).unwrap();
    }
    assert_eq!(host.session.at(4).err(), Some(Errno::STALE));
    // But for what is open.
    let (f, d) = (5, 3);
    fs::remove_file(share.join("f")).unwrap();
    fs::rename(share.join("d"), share.join("moved")).unwrap();
    for (node, handle) in [(f, 1), (d, 4)] {
        assert!(host.session.nodes.get(node).unwrap().slot.is_none());
        assert!(host.session.attributes(node).is_ok() && host.session.at(node).is_ok(), "{node}");
        let mut body = Writer::default();
        body.u64(handle).zeros(16);
        host.send(opcode::RELEASE, node, &body.0).unwrap();
        assert_eq!(host.session.at(node).err(), Some(Errno::STALE), "{node}");
    }
}
