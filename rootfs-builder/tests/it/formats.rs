//! Archives as GNU tar writes them, in each of its formats. Every Debian has it.

use std::fs::File;
use std::os::unix::fs::{FileExt, symlink};
use std::path::Path;
use std::process::Command;

use crate::archive::{Header, Tar};
use crate::layers::convert;
use crate::tree::{Content, Tree, assert_same, read_directory};

/// What GNU tar makes of a directory.
fn tar(root: &Path, options: &[&str]) -> Vec<u8> {
    let output = Command::new("tar")
        .args(["--create", "--sort=name"])
        .args(options)
        .arg("-C")
        .arg(root)
        .arg(".")
        .output();
    let output = output.expect("GNU tar is there");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A directory with something of everything that a user without privileges can make.
pub(crate) fn populate(root: &Path) {
    let deep = (0..12).fold(root.to_path_buf(), |path, level| path.join(format!("{level:-<60}")));
    std::fs::create_dir_all(&deep).unwrap();
    std::fs::write(deep.join("n".repeat(255)), "deep").unwrap();
    symlink("t".repeat(1500), deep.join("long-target")).unwrap();
    std::fs::hard_link(deep.join("n".repeat(255)), root.join("hard")).unwrap();
    std::fs::write(root.join("empty"), "").unwrap();
    std::fs::write(root.join("page"), [1; 4096]).unwrap();
    std::fs::write(root.join("blocks"), (0..100_000u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>())
        .unwrap();
    std::fs::write(root.join("name with \n newline and \u{fc}"), "x").unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        root.join("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o640),
        0,
    )
    .unwrap();
    // Not every file system has user attributes; where it does, they are compared.
    let flags = rustix::fs::XattrFlags::empty();
    let _ = rustix::fs::setxattr(root.join("page"), "user.test", b"value\0", flags);
    let sparse = File::create(root.join("sparse")).unwrap();
    for index in 0..40u64 {
        sparse.write_all_at(format!("data {index}").as_bytes(), index * 300_000 + 7).unwrap();
    }
    sparse.set_len(13_000_000).unwrap();
}

/// Only what every format keeps: whole seconds, no attributes, links of directories as EROFS counts them.
fn reduce(mut tree: Tree, nanoseconds: bool, xattrs: bool) -> Tree {
    for facts in tree.values_mut() {
        if !nanoseconds {
            facts.mtime.1 = 0;
        }
        facts.xattrs.retain(|name, _| xattrs && name.starts_with(b"user."));
        if facts.mode & 0o170_000 == 0o040_000 {
            facts.links = 0;
        }
    }
    tree
}

#[test]
fn every_format_of_gnu_tar_survives() {
    let source = tempfile::tempdir().unwrap();
    populate(source.path());
    let original = read_directory(source.path());
    for options in [
        &["--format=gnu"][..],
        &["--format=gnu", "--sparse"],
        &["--format=pax", "--xattrs"],
        &["--format=pax", "--xattrs", "--sparse", "--sparse-version=0.0"],
        &["--format=pax", "--xattrs", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--xattrs", "--sparse", "--sparse-version=1.0"],
    ] {
        let archive = tar(source.path(), options);
        let pax = options[0] == "--format=pax";
        if options.contains(&"--sparse") {
            assert!(archive.len() < 5_000_000, "{options:?} did not make a sparse archive");
        }
        let (actual, expected) = (convert(&archive), original.clone());
        println!("{options:?}");
        assert_same(&reduce(actual, pax, pax), &reduce(expected, pax, pax));
    }
}

#[test]
fn names_of_ustar_with_prefix_are_joined() {
    let mut header = Header::new(b'0', "name").encode();
    header[345..350].copy_from_slice(b"a/b/c");
    crate::archive::set_checksum(&mut header);
    let tree = convert(&[&header[..], &[0; 1024]].concat());
    assert!(tree.contains_key(&b"a/b/c/name"[..]));
}

#[test]
fn directories_of_archives_older_than_posix_are_known_by_their_name() {
    let mut header = Header::new(0, "old/").encode();
    header[257..265].fill(0);
    crate::archive::set_checksum(&mut header);
    let tree = convert(&[&header[..], &[0; 1024]].concat());
    assert_eq!(tree[&b"old"[..]].mode & 0o170_000, 0o040_000);
}

#[test]
fn a_size_in_pax_counts_for_sparse_files_too() {
    // As GNU tar writes sparse files of more than 8 GiB of data: the size is that of map and data.
    let map = b"2\n0\n3\n1000\n2\n";
    let mut content = map.to_vec();
    content.resize(512, 0);
    content.extend(b"abcde");
    let archive = Tar::default()
        .pax(&[
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"sparse"),
            ("GNU.sparse.realsize", b"2000"),
            ("size", b"517"),
        ])
        .raw(&Header { size: 517, ..Header::new(b'0', "GNUSparseFile.0/sparse") }, &content)
        .file("after", b"ok")
        .end();
    let tree = convert(&archive);
    let mut expected = vec![0; 2000];
    expected[..3].copy_from_slice(b"abc");
    expected[1000..1002].copy_from_slice(b"de");
    assert_eq!(tree[&b"sparse"[..]].content, Content(expected));
    assert_eq!(tree[&b"after"[..]].content, Content(b"ok".to_vec()));
}
