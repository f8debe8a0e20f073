//! What cannot be run is refused: in one line that says what to do, with the right exit code, and nothing is left.

use std::fs::{read, remove_file, write};
use std::path::Path;
use std::process::{Command, Output};

use bulkhead_sandbox::config::Uids;
use bulkhead_sandbox::uid::UidLease;
use bulkhead_tests::bulkhead::{
    bulkhead, expect_code, expect_refusal, layers, run, run_command, run_directory, stderr,
};
use bulkhead_tests::elf;
use bulkhead_tests::files::{Tmpfs, busybox_tree, config, share, tool, truncate};
use bulkhead_tests::residue::entries;
use bulkhead_tests::vm::{Result, artifact, ensure};
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("refused: sizes that no machine can have", sizes),
        trial("refused: a user that the image does not know", user),
        trial("refused: a kernel or guest image that is missing or cut short", artifacts),
        trial("refused: a kernel that dies at once, told after a second try", dead_kernel),
        trial("refused: KVM that is missing, not permitted or something else", kvm),
        trial("refused: one VMM more than there are uids", uids),
        trial("refused: a disk without room for the image, the scratch disk or the root", full_disk),
    ]
}

fn sizes() -> Result {
    for (options, words) in [
        (["--cpus", "0"], ["--cpus asks for 0 CPUs", "1 to 32"]),
        (["--cpus", "33"], ["--cpus asks for 33 CPUs", "1 to 32"]),
        (["--memory", "8M"], ["--memory asks for a virtual machine of 8 MiB", "64 to"]),
        (["--memory", "4000G"], ["--memory", "give less"]),
        (["--storage", "1M"], ["--storage 1 MiB", "at least 16 MiB"]),
    ] {
        expect_refusal(&run(&options, &["true"])?, 125, &words)
            .map_err(|error| format!("{options:?}: {error}"))?;
    }
    Ok(())
}

fn user() -> Result {
    expect_refusal(&run(&["-u", "nobody-like-it"], &["true"])?, 125, &["nobody-like-it", "passwd"])
}

fn artifacts() -> Result {
    for (name, words) in [("vmlinux", "install Bulkhead"), ("guest.erofs", "install Bulkhead")] {
        let share = share()?;
        let file = share.path().join(name);
        let mut command = run_command(&[], &["true"])?;
        command.env("BULKHEAD_SHARE", share.path());
        truncate(&file)?;
        expect_refusal(&command.output()?, 125, &[name, "truncated", words])?;
        remove_file(&file)?;
        expect_refusal(&command.output()?, 125, &[name, "cannot read", words])?;
        write(&file, "something else")?;
        expect_refusal(&command.output()?, 125, &[name, words])?;
    }
    Ok(())
}

fn dead_kernel() -> Result {
    let share = share()?;
    let kernel = share.path().join("vmlinux");
    remove_file(&kernel)?;
    // ud2, with no interrupt table to handle it
    write(&kernel, elf::pvh_kernel(&[0x0f, 0x0b]))?;
    let output = run_command(&[], &["true"])?.env("BULKHEAD_SHARE", share.path()).output()?;
    expect_refusal(&output, 125, &["did not start", "triple fault", "console is empty"])
}

fn kvm() -> Result {
    // Its file system has no devices: opening one is not permitted, not even for root.
    let tmpfs = Tmpfs::new(1 << 20)?;
    let forbidden = tmpfs.path().join("kvm");
    tool(Command::new("mknod").arg(&forbidden).args(["c", "10", "232"]))?;
    let directory = tempfile::tempdir()?;
    for (path, said) in [
        (directory.path().join("none"), "No such file"),
        (forbidden, "Permission denied"),
        ("/dev/null".into(), "cannot boot the machine"),
    ] {
        let config = config(directory.path(), &format!("[paths]\nkvm = '{}'\n", path.display()))?;
        let output = run_command(&[], &["true"])?.env("BULKHEAD_CONFIG", config).output()?;
        expect_refusal(&output, 125, &[said, "bulkhead check"])
            .map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(())
}

fn uids() -> Result {
    let directory = tempfile::tempdir()?;
    let config = config(directory.path(), "[uids]\ncount = 1\n")?;
    let mut command = run_command(&[], &["true"])?;
    command.env("BULKHEAD_CONFIG", config);
    let lease = UidLease::take(Uids { count: 1, ..Uids::default() }, &run_directory().join(".uids"))?;
    expect_refusal(&command.output()?, 125, &["all 1 uids", "uids.count"])?;
    drop(lease);
    expect_code(&command.output()?, 0)
}

/// Runs a command whose images and containers have to share so many bytes, of which nothing may be left.
fn within(bytes: u32, command: &mut Command) -> Result<Output> {
    let tmpfs = Tmpfs::new(bytes)?;
    let output = command.env("BULKHEAD_ROOT", tmpfs.path()).output()?;
    for directory in ["containers", "images/layers", "images/work"] {
        let left = entries(&tmpfs.path().join(directory))?;
        ensure(left.is_empty(), || format!("{directory}: {left:?}; {}", stderr(&output)))?;
    }
    Ok(output)
}

fn full_disk() -> Result {
    let archive = artifact("share/bulkhead-tests/busybox.tar");
    let import = within(1 << 20, bulkhead(["image", "import"]).arg(&archive))?;
    expect_refusal(&import, 125, &["are free", "bulkhead image rm"])?;

    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    busybox_tree(&at("tree"))?;
    let run = |bytes, root: &Path, options: &[&str], command: &[&str]| {
        let words = [&["run", "--rm"], options, &["--rootfs"]].concat();
        within(bytes, bulkhead(words).arg(root).arg("--").args(command))
    };
    expect_refusal(&run(1 << 20, &at("tree"), &[], &["true"])?, 125, &["free space"])?;
    let layer = layers("busybox")?.remove(0);
    let output = run(64 << 10, &layer, &["--storage", "4G"], &["true"])?;
    expect_refusal(&output, 125, &["scratch disk", "No space left", "free space"])?;

    tool(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(at("tree")).arg(at("ext4")).arg("16M"))?;
    let before = read(at("ext4"))?;
    expect_refusal(&run(1 << 20, &at("ext4"), &[], &["true"])?, 125, &["cannot copy", "No space left"])?;
    ensure(read(at("ext4"))? == before, || "the image has changed".to_owned())?;

    // A scratch disk takes space only when it is written: that fails in the container, and nowhere else.
    let fill = ["/bin/dd", "if=/dev/zero", "of=/file", "bs=1M", "count=8", "conv=fsync"];
    let output = run(1 << 20, &layer, &["--storage", "256M"], &fill)?;
    expect_code(&output, 1)?;
    ensure(stderr(&output).contains("Input/output error"), || stderr(&output))
}
