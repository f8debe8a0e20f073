//! Packing a directory tree.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};

use bulkhead_rootfs_builder::directory::{Error, pack};

use crate::formats::populate;
use crate::tree::{assert_same, read_directory, read_image};

const LIMIT: u64 = 1 << 30;

#[test]
fn a_tree_is_packed_as_it_is() {
    let source = tempfile::tempdir().unwrap();
    populate(source.path());
    drop(std::os::unix::net::UnixListener::bind(source.path().join("socket")).unwrap());
    let out = tempfile::tempdir().unwrap();
    let image = out.path().join("image");
    let mut read = 0;
    let summary = pack(source.path(), &image, LIMIT, &mut |bytes| read = bytes).unwrap();
    assert_eq!(read, 13_400_000 + 4096 + 4 + 1);
    assert!(summary.size < 5_000_000, "holes were filled: {} bytes", summary.size);
    let mut expected = read_directory(source.path());
    // Some file systems count the links of directories otherwise.
    let mut actual = read_image(&image);
    for facts in expected.values_mut().chain(actual.values_mut()).filter(|facts| facts.mode >> 12 == 4) {
        facts.links = 0;
    }
    assert_same(&actual, &expected);
    // The same tree makes the same image, whatever the order of its names on disk.
    pack(source.path(), &out.path().join("again"), LIMIT, &mut |_| {}).unwrap();
    assert!(std::fs::read(&image).unwrap() == std::fs::read(out.path().join("again")).unwrap());
}

#[test]
fn links_are_not_followed_and_loops_end() {
    let source = tempfile::tempdir().unwrap();
    symlink(source.path(), source.path().join("loop")).unwrap();
    symlink("/", source.path().join("root")).unwrap();
    let out = tempfile::tempdir().unwrap();
    let image = out.path().join("image");
    let summary = pack(source.path(), &image, LIMIT, &mut |_| {}).unwrap();
    assert_eq!(summary.inodes, 3);
}

#[test]
fn failures_leave_no_image() {
    let source = tempfile::tempdir().unwrap();
    let out = tempfile::tempdir().unwrap();
    let image = out.path().join("image");
    let file = source.path().join("file");
    assert!(matches!(pack(&file, &image, LIMIT, &mut |_| {}), Err(Error::Read { .. })));
    File::create(&file).unwrap().write_all_at(&[1; 9000], 0).unwrap();
    assert!(file.metadata().unwrap().size() == 9000);
    assert!(matches!(pack(&file, &image, LIMIT, &mut |_| {}), Err(Error::NotADirectory { .. })));
    assert!(matches!(pack(source.path(), &image, 8192, &mut |_| {}), Err(Error::Pack { .. })));
    let missing = out.path().join("missing/image");
    assert!(matches!(pack(source.path(), &missing, LIMIT, &mut |_| {}), Err(Error::Output { .. })));
    assert_eq!(std::fs::read_dir(out.path()).unwrap().count(), 0);
}
