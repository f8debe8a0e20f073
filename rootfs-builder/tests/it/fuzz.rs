//! Arbitrary and damaged archives: whatever they are, reading them ends, in an image that is intact or in an error.

use bulkhead_rootfs_builder::tar::Limits;
use proptest::prelude::*;

use crate::archive::{Header, Tar, set_checksum};
use crate::layers::try_convert;
use crate::tree::read_image;

fn limits() -> Limits {
    Limits {
        entries: 1000,
        archive_bytes: 4 << 20,
        metadata_bytes: 1 << 20,
        header_bytes: 64 << 10,
        extents: 100,
        ..Limits::default()
    }
}

/// Something of everything, for damage to hit.
fn rich() -> Vec<u8> {
    let sparse: [(&str, &[u8]); 4] = [
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"dir/sparse"),
        ("GNU.sparse.realsize", b"9000"),
    ];
    let mut map = b"2\n0\n3\n8000\n2\n".to_vec();
    map.resize(512, 0);
    map.extend(b"abcde");
    Tar::default()
        .directory("./dir")
        .file("dir/file", &[5; 5000])
        .link(b'1', "dir/hard", "dir/file")
        .link(b'2', "dir/symbolic", "file")
        .pax(&[("path", &[b'p'; 200]), ("SCHILY.xattr.user.a", b"value"), ("mtime", b"1.5")])
        .file("short", b"content")
        .raw(&Header { size: 151, gnu: true, ..Header::new(b'L', "././@LongLink") }, &[b'q'; 150])
        .file("cut", b"x")
        .pax(&sparse)
        .raw(&Header { size: map.len() as u64, ..Header::new(b'0', "GNUSparseFile/s") }, &map)
        .file("dir/.wh.x", b"")
        .file("dir/.wh..wh..opq", b"")
        .raw(&Header { device: (1, 3), ..Header::new(b'3', "null") }, b"")
        .end()
}

fn must_end(archive: &[u8]) {
    let (bench, report) = try_convert(archive, &limits());
    if report.is_ok() {
        read_image(&bench.image());
    }
}

#[test]
fn the_undamaged_archive_is_read() {
    assert_eq!(try_convert(&rich(), &limits()).1.unwrap().entries, 10);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        must_end(&bytes);
    }

    #[test]
    fn random_headers_with_right_checksums(
        blocks in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 512)), 1..6),
        kinds in "[0-7LKxgSV]{6}",
    ) {
        let mut archive = Vec::new();
        for ((shape, mut block), kind) in blocks.into_iter().zip(kinds.bytes()) {
            block[156] = kind;
            if shape & 1 == 0 {
                block[257..265].copy_from_slice(b"ustar\x0000");
            } else {
                block[257..265].copy_from_slice(b"ustar  \0");
            }
            if shape & 2 == 0 {
                block[100..156].copy_from_slice(&Header::new(kind, "").encode()[100..156]);
                block[329..345].copy_from_slice(&Header::new(kind, "").encode()[329..345]);
            }
            set_checksum(&mut block);
            archive.extend(block);
        }
        must_end(&archive);
    }

    #[test]
    fn damaged_archives(
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
        repair in any::<bool>(),
    ) {
        let mut archive = rich();
        for (at, value) in damage {
            let at = at.index(archive.len());
            archive[at] = value;
            let header = at / 512 * 512;
            if repair && archive[header + 257..].starts_with(b"ustar") {
                set_checksum(&mut archive[header..header + 512]);
            }
        }
        if let Some(cut) = cut {
            archive.truncate(cut.index(archive.len()));
        }
        must_end(&archive);
    }
}
