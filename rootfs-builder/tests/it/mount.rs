//! The kernel's own reading of our images. `tests/images/through-kernel` runs these in a lab.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use bulkhead_rootfs_builder::directory::pack;
use bulkhead_rootfs_builder::oci::Source;
use bulkhead_rootfs_builder::store::Store;

use crate::tree::{Tree, assert_same, read_directory, read_image};

/// An image mounted by the kernel as long as it lives.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new(image: &Path) -> Self {
        let directory = tempfile::tempdir().unwrap();
        run(Command::new("mount").args(["-t", "erofs", "-o", "loop,ro"]).args([image, directory.path()]));
        Self(directory)
    }

    fn tree(&self) -> Tree {
        read_directory(self.0.path())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run(Command::new("umount").arg(self.0.path()));
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The most memory that this process has had, in bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
#[ignore = "needs root, a kernel with EROFS, and the tar of a Debian"]
fn a_real_debian_is_the_same_through_the_kernel() {
    let bench = tempfile::tempdir().unwrap();
    let tar = bench.path().join("layer.tar");
    let given = std::env::var_os("BULKHEAD_TEST_ROOTFS_TAR").expect("BULKHEAD_TEST_ROOTFS_TAR names the tar");
    std::fs::copy(given, &tar).unwrap();
    let unpacked = bench.path().join("unpacked");
    std::fs::create_dir(&unpacked).unwrap();
    let tar_options = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf"];
    run(Command::new("tar").args(tar_options).arg(&tar).arg("-C").arg(&unpacked));
    let mut expected = read_directory(&unpacked);

    let mut blobs = crate::oci::Blobs::default();
    let manifest = blobs.image("amd64", &[std::fs::read(&tar).unwrap()], crate::oci::Packing::Gzip);
    let layout = bench.path().join("layout");
    blobs.write(&layout, &[manifest]);
    drop(blobs);

    let store = Store::open(bench.path().join("store")).unwrap();
    let started = Instant::now();
    let image = store.import(&Source::Local(layout), Some("debian:13"), &mut |_| {}).unwrap().remove(0);
    println!(
        "imported {} bytes of tar as {} bytes in {:?}",
        tar.metadata().unwrap().len(),
        image.size,
        started.elapsed()
    );
    let mounted = Mounted::new(&image.layers[0]).tree();
    assert_same(&mounted, &expected);
    assert_same(&read_image(&image.layers[0]), &expected);

    let packed = bench.path().join("packed");
    let started = Instant::now();
    let summary = pack(&unpacked, &packed, 1 << 40, &mut |_| {}).unwrap();
    println!("packed the directory as {} bytes in {:?}", summary.size, started.elapsed());
    // ext4 gives up counting the links of a directory at 65,000, and others count otherwise; EROFS does not.
    for (path, facts) in &mut expected {
        facts.links = mounted[path].links;
    }
    assert_same(&Mounted::new(&packed).tree(), &expected);
    println!("peak memory of the test, which holds the whole tree several times: {} bytes", peak_memory());
}

#[test]
#[ignore = "needs root and a kernel with EROFS"]
fn what_only_root_can_make_is_the_same_through_the_kernel() {
    let source = tempfile::tempdir().unwrap();
    crate::formats::populate(source.path());
    let path = |name: &str| source.path().join(name);
    run(Command::new("mknod").arg(path("null")).args(["c", "1", "3"]));
    run(Command::new("mknod").arg(path("disk")).args(["b", "259", "70000"]));
    std::fs::write(path("owned"), "x").unwrap();
    run(Command::new("chown").arg("70000:4000000000").arg(path("owned")));
    run(Command::new("chmod").arg("6755").arg(path("owned")));
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(path("owned"), "trusted.example", &[1; 3000], flags).unwrap();
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    rustix::fs::setxattr(path("owned"), "security.capability", &capability, flags).unwrap();
    let image = tempfile::tempdir().unwrap();
    let image = image.path().join("image");
    pack(source.path(), &image, 1 << 30, &mut |_| {}).unwrap();
    assert_same(&Mounted::new(&image).tree(), &read_directory(source.path()));
}

#[test]
#[ignore = "needs root: fills a file system of its own"]
fn a_full_disk_leaves_the_store_as_it_was() {
    let bench = tempfile::tempdir().unwrap();
    let archive = bench.path().join("archive.tar");
    let big = crate::archive::Tar::default().file("big", &vec![7; 12 << 20]).end();
    std::fs::write(&archive, crate::oci::docker_archive(&["big:1"], &[big])).unwrap();
    let disk = bench.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(&disk));
    let result = std::panic::catch_unwind(|| {
        let store = Store::open(disk.join("store")).unwrap();
        let error = store.import(&Source::Local(archive.clone()), None, &mut |_| {}).unwrap_err();
        let mut cause: &dyn std::error::Error = &error;
        while let Some(next) = cause.source() {
            cause = next;
        }
        assert!(cause.to_string().contains("8 MiB are free"), "{cause}");
        assert!(store.list().unwrap().is_empty());
        assert_eq!(std::fs::read_dir(disk.join("store/work")).unwrap().count(), 0);
        assert_eq!(std::fs::read_dir(disk.join("store/layers")).unwrap().count(), 0);
    });
    run(Command::new("umount").arg(&disk));
    result.unwrap();
}
