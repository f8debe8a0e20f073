//! Archives made to do harm: each is refused by an error that names the entry, and leaves nothing behind.

use std::error::Error as _;
use std::io::Read;

use bulkhead_rootfs_builder::erofs::Options;
use bulkhead_rootfs_builder::tar::{EntryError, Error, Limits, append_layer};

use crate::archive::{Header, Tar};
use crate::layers::try_convert;
use crate::writer::Workbench;

/// The name and reason of a refused entry.
fn refused(archive: impl AsRef<[u8]>) -> (String, EntryError) {
    refused_with(archive.as_ref(), &Limits::default())
}

fn refused_with(archive: &[u8], limits: &Limits) -> (String, EntryError) {
    match try_convert(archive, limits).1 {
        Err(Error::Entry { name, source }) => (name, source),
        other => panic!("{other:?}"),
    }
}

fn tar() -> Tar {
    Tar::default().directory("dir").file("file", b"x").link(b'2', "link", "dir")
}

#[test]
fn names_out_of_the_root() {
    for name in ["../x", "a/../../x", "/../x", "dir/../../x"] {
        let (entry, reason) = refused(tar().file(name, b"").end());
        assert_eq!(entry, name);
        assert!(matches!(reason, EntryError::Escapes), "{reason:?}");
    }
}

#[test]
fn entries_below_what_is_no_directory() {
    let cases = [
        ("file/x", "file", "a file"),
        ("link/x", "link", "a symbolic link"),
        ("pipe/x/y", "pipe", "a special file"),
    ];
    for (name, expected, kind) in cases {
        for entry in [tar(), tar()].map(|tar| tar.raw(&Header::new(b'6', "pipe"), b"")) {
            let (entry, reason) = refused(entry.file(name, b"").end());
            assert_eq!(entry, name);
            assert!(
                matches!(reason, EntryError::Parent { parent, what } if parent == expected && what == kind)
            );
        }
    }
    // Whiteouts do not pass either.
    let (_, reason) = refused(tar().file("link/.wh.x", b"").end());
    assert!(matches!(reason, EntryError::Parent { .. }));
}

#[test]
fn hard_links_to_where_they_must_not_lead() {
    let link = |target: &str| refused(tar().link(b'1', "l", target).end());
    assert!(
        matches!(link("../../etc/shadow"), (name, EntryError::LinkEscapes { target }) if name == "l" && target == "../../etc/shadow")
    );
    assert!(matches!(link("missing").1, EntryError::LinkToNothing { target } if target == "missing"));
    assert!(matches!(link("/etc/shadow").1, EntryError::LinkToNothing { .. }));
    assert!(matches!(link("link/file").1, EntryError::LinkToNothing { .. }));
    assert!(matches!(link("l").1, EntryError::LinkToNothing { .. }));
    assert!(matches!(link("dir").1, EntryError::LinkToDirectory { target } if target == "dir"));
    assert!(matches!(link("").1, EntryError::LinkToDirectory { .. }));
}

#[test]
fn names_that_no_file_can_have() {
    let (_, reason) = refused(tar().pax(&[("path", b"a\0b")]).file("x", b"").end());
    assert!(reason.to_string().contains("zero byte"), "{reason}");
    let long = "n".repeat(256);
    let (name, reason) = refused(tar().pax(&[("path", long.as_bytes())]).file("x", b"").end());
    // Errors show the beginning.
    assert_eq!(name, format!("{}...", &long[..200]));
    assert!(reason.to_string().contains("longer than 255 bytes"), "{reason}");
    for name in [".wh.", "dir/.wh..", "dir/.wh..."] {
        assert!(matches!(refused(tar().file(name, b"").end()), (_, EntryError::Whiteout)), "{name}");
    }
    assert!(matches!(refused(tar().link(b'2', "./", "x").end()).1, EntryError::Root));
    assert!(matches!(refused(tar().link(b'2', "empty", "").end()).1, EntryError::Image(_)));
}

#[test]
fn numbers_and_types_that_no_file_can_have() {
    for (key, value) in
        [("uid", "4294967296"), ("gid", "-1"), ("mtime", "soon"), ("size", "1e3"), ("uid", "")]
    {
        let (name, reason) = refused(tar().pax(&[(key, value.as_bytes())]).file("x", b"").end());
        assert_eq!(name, "x");
        assert!(matches!(reason, EntryError::Number { field, .. } if field == key), "{key}");
    }
    let (_, reason) =
        refused(tar().raw(&Header { device: (0o7_777_777, 0), ..Header::new(b'3', "c") }, b"").end());
    assert!(matches!(reason, EntryError::Image(_)));
    assert!(matches!(
        refused(tar().raw(&Header::new(b'M', "m"), b"").end()).1,
        EntryError::Type { kind: 'M' }
    ));
}

#[test]
fn sparse_maps_that_do_not_fit() {
    let sparse = |map: &[u8], content: &[u8]| {
        let records: [(&str, &[u8]); 3] =
            [("GNU.sparse.size", b"100"), ("GNU.sparse.numblocks", b"1"), ("GNU.sparse.map", map)];
        refused(tar().pax(&records).file("s", content).end()).1
    };
    assert!(matches!(sparse(b"0,5", b"1234"), EntryError::SparseSize { mapped: 5, stored: 4 }));
    assert!(matches!(sparse(b"0,18446744073709551615,1,1", b"1234"), EntryError::SparseSize { .. }));
    for map in [&b"10,2,5,2"[..], b"98,4", b"18446744073709551615,4"] {
        assert!(matches!(sparse(map, &[1; 4]), EntryError::Image(_)), "{}", String::from_utf8_lossy(map));
    }
}

#[test]
fn what_is_no_archive_says_so() {
    let error = |bytes: &[u8]| try_convert(bytes, &Limits::default()).1.unwrap_err();
    assert!(matches!(error(b""), Error::TooShort { length: 0 }));
    assert!(matches!(error(b"hello"), Error::TooShort { length: 5 }));
    assert!(matches!(error(&[b'x'; 2048]), Error::NotTar(_)));
    assert!(error(&[b'x'; 2048]).to_string().contains("not a tar archive"));
    let whole = tar().file("big", &[1; 5000]).end();
    for cut in [513, 700, 1100, 2000, 2100, 5000] {
        let message = error(&whole[..cut]);
        match &message {
            Error::Truncated { offset, .. } => assert_eq!(*offset, cut as u64),
            Error::Entry { name, source } => {
                assert!(name == "big" && source.to_string().contains("ends"), "{source}");
            }
            other => panic!("{other:?}"),
        }
    }
    let mut flipped = tar().end();
    flipped[512 + 3] ^= 1;
    let error = error(&flipped);
    assert!(matches!(&error, Error::Header { offset: 512, previous, .. } if previous == "dir"), "{error:?}");
    assert!(error.source().is_some());
}

#[test]
fn limits_hold() {
    let limits = Limits { entries: 20, metadata_bytes: 3000, archive_bytes: 1 << 20, ..Limits::default() };
    let many = (0..30).fold(Tar::default(), |tar, i| tar.file(format!("f{i}"), b"")).end();
    assert!(
        matches!(refused_with(&many, &limits), (name, EntryError::TooMany { limit: 20 }) if name == "f20")
    );
    let deep = "d/".repeat(40);
    assert!(matches!(refused_with(&tar().directory(&deep).end(), &limits).1, EntryError::TooMany { .. }));
    let heavy = tar().pax(&[("SCHILY.xattr.user.x", &[b'v'; 4000])]).file("heavy", b"").end();
    assert!(
        matches!(refused_with(&heavy, &limits), (name, EntryError::TooMuchMetadata { limit: 3000 }) if name == "heavy")
    );
    let long = "p/".repeat(2100);
    let long = tar().pax(&[("path", long.as_bytes())]).file("x", b"").end();
    assert!(matches!(try_convert(&long, &limits).1, Err(Error::Header { .. })));
    let pax = tar().pax(&[("comment", &vec![b'c'; 2 << 20])]).file("x", b"").end();
    assert!(matches!(try_convert(&pax, &Limits::default()).1, Err(Error::Header { .. })));
    let xattr = tar().pax(&[("SCHILY.xattr.user.x", &vec![b'v'; 65_536])]).file("x", b"").end();
    assert!(matches!(refused(xattr).1, EntryError::Image(_)));
}

/// A stream that costs nothing to make and never ends, counting what was asked of it.
struct Endless {
    block: Vec<u8>,
    read: u64,
}

impl Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let at = usize::try_from(self.read % self.block.len() as u64).unwrap();
        let count = buffer.len().min(self.block.len() - at);
        buffer[..count].copy_from_slice(&self.block[at..at + count]);
        self.read += count as u64;
        Ok(count)
    }
}

fn read_endless(start: &[u8], block: Vec<u8>) -> (Error, u64) {
    let limits = Limits { archive_bytes: 20 << 20, ..Limits::default() };
    let bench = Workbench::new();
    let mut builder = bench.builder(Options { uuid: [0; 16], max_size: limits.archive_bytes });
    let mut endless = Endless { block, read: 0 };
    let error = append_layer(start.chain(&mut endless), &mut builder, &limits).unwrap_err();
    (error, endless.read)
}

#[test]
fn bombs_end_at_a_limit() {
    let huge = Tar::default().raw(&Header { size: 1 << 50, ..Header::new(b'0', "bomb") }, b"");
    let (error, read) = read_endless(&huge.0, vec![0; 65_536]);
    assert!(matches!(&error, Error::Entry { name, .. } if name == "bomb"), "{error:?}");
    assert!(read < 21 << 20);

    // A skipped entry as large as the format allows.
    let skipped = Tar::default().raw(&Header { size: 1 << 60, ..Header::new(b'0', ".wh.x") }, b"");
    let (error, read) = read_endless(&skipped.0, vec![0; 65_536]);
    assert!(matches!(&error, Error::TooLong { previous, .. } if previous == ".wh.x"), "{error:?}");
    assert!(read < 21 << 20);

    // Global headers say nothing and need not end.
    let global = Tar::default().raw(&Header { size: 10, ..Header::new(b'g', "g") }, b"10 a=bcde\n");
    let (error, read) = read_endless(&[], global.0);
    assert!(matches!(error, Error::TooLong { .. }), "{error:?}");
    assert!(read < 21 << 20);

    // A sparse header of the old GNU kind that is always continued, by blocks without extents.
    let mut sparse = Header { gnu: true, ..Header::new(b'S', "sparse") }.encode();
    sparse[482] = 1;
    crate::archive::set_checksum(&mut sparse);
    let mut continued = vec![0; 512];
    continued[504] = 1;
    let (error, read) = read_endless(&sparse, continued);
    assert!(matches!(error, Error::HeaderTooLong { .. }), "{error:?}");
    assert!(read < 21 << 20);

    // A sparse map without an end of its first line.
    let records: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"s"),
        ("GNU.sparse.realsize", b"9"),
    ];
    let sparse = Tar::default().pax(&records).raw(&Header { size: 1 << 40, ..Header::new(b'0', "s") }, b"");
    let (error, read) = read_endless(&sparse.0, vec![b'1'; 65_536]);
    assert!(matches!(error, Error::HeaderTooLong { .. }), "{error:?}");
    assert!(read < 21 << 20);

    // What follows the end of the archive belongs to its digest, but not without end.
    let (error, read) = read_endless(&[0; 1024], vec![0; 65_536]);
    assert!(matches!(error, Error::TooLong { .. }), "{error:?}");
    assert!(read < 21 << 20);
}
