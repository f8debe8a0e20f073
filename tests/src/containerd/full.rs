//! Disks that are full: an error of whoever writes, and of nobody else.

use std::fs::{File, create_dir_all};
use std::path::{Path, PathBuf};

use bulkhead_tests::bulkhead::{eventually, expect_code, stderr, stdout};
use bulkhead_tests::ctr::{
    Bundle, Container, NAMESPACE, ctr, in_background, is_runc, pipes, run, run_command, status,
};
use bulkhead_tests::files::{Tmpfs, busybox_tree};
use bulkhead_tests::residue::entries;
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;

use crate::trial;

/// Bytes of a small disk, and of output that is too much for it.
const SMALL: u32 = 1 << 20;
const OUTPUT: u32 = 4 << 20;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("full disks: it is an error of the writer's", root),
        trial("full disks: a bundle on one leaves nothing", bundle),
        trial("full disks: a runtime without room for its state leaves nothing", state),
        trial("full disks: a log on one keeps nobody from ending the container", log),
        trial("full disks: a reader that has no room for the output leaves the container alone", reader),
    ]
}

fn root() -> Result {
    let disk = Tmpfs::new(16 << 20)?;
    let tree = disk.path().join("tree");
    busybox_tree(&tree)?;
    let root = tree.to_str().ok_or("a temporary directory")?;
    let script = "dd if=/dev/zero of=/file bs=64k; rm /file && echo x >/file && cat /file";
    let output =
        run_command("once", &["--rm", "--env", "PATH=/bin", "--rootfs", root], &["sh", "-c", script])?
            .output()?;
    expect_code(&output, 0)?;
    ensure(stderr(&output).contains("No space left on device"), || format!("{output:?}"))?;
    ensure(stdout(&output) == "x\n", || format!("{output:?}"))
}

fn bundle() -> Result {
    let disk = Tmpfs::new(16 << 20)?;
    let bundle = Bundle::below(disk.path(), "cramped", &["true"])?;
    fill(disk.path())?;
    if let Ok(shim) = bundle.start_shim() {
        let created = shim.create(&bundle.request());
        if created.is_ok() {
            shim.delete(bundle.id(), "")?;
        }
        shim.shutdown(bundle.id())?;
    }
    bundle.clean_up()
}

fn fill(disk: &Path) -> Result {
    // All but nothing: the kernel gives a tmpfs whole pages.
    let filled = std::io::copy(&mut std::io::repeat(1), &mut File::create(disk.join("filler"))?);
    ensure(filled.is_err(), || "the disk is not full".to_owned())
}

/// From no room at all to as much as is needed, a file or a directory at a time.
fn state() -> Result {
    let place = if is_runc() {
        Path::new("/run/containerd/runc").join(NAMESPACE)
    } else {
        PathBuf::from("/run/bulkhead")
    };
    let containers = if is_runc() { place.clone() } else { place.join(".pods") };
    create_dir_all(&place)?;
    let mut failures = 0;
    for files in 1.. {
        // The first one is the root.
        let disk = Tmpfs::over(&place, &format!("mode=700,nr_inodes={files}"))?;
        let output = run(&[], &["echo", "said"])?;
        let left = || Ok(entries(&containers)?.is_empty());
        eventually("nothing is left of the container", left).map_err(|error| format!("{files}: {error}"))?;
        drop(disk);
        if output.status.success() {
            ensure(stdout(&output) == "said\n", || format!("{output:?}"))?;
            break;
        }
        ensure(output.status.code() == Some(1), || format!("{output:?}"))?;
        // runc has other words.
        let told = is_runc() || stderr(&output).to_lowercase().contains("no space left on device");
        ensure(told, || format!("{files}: {output:?}"))?;
        failures += 1;
    }
    ensure(failures > 0, || "it has no state there".to_owned())
}

/// With runc the container waits for room that does not come; but it can be ended.
fn log() -> Result {
    let disk = Tmpfs::new(SMALL)?;
    let log = disk.path().join("log");
    let target = format!("file://{}", log.display());
    let script = format!("head -c {OUTPUT} /dev/zero; head -c {OUTPUT} /dev/zero >&2; exit 5");
    let container = in_background("logged", &["--log-uri", &target], &["sh", "-c", &script])?;
    if is_runc() {
        eventually("the disk is full", || Ok(log.metadata()?.len() == u64::from(SMALL)))?;
        container.kill("KILL")?;
    }
    let (code, expected) = (container.wait()?, if is_runc() { 137 } else { 5 });
    ensure(code == expected, || format!("exit code {code}"))?;
    container.delete()?;
    let written = log.metadata()?.len();
    ensure(written == u64::from(SMALL), || format!("{written} bytes of the log"))
}

fn reader() -> Result {
    let disk = Tmpfs::new(SMALL)?;
    let script = format!("head -c {OUTPUT} /dev/zero; touch /done; sleep 1000");
    let client = run_command("loud", &["--fifo-dir", &pipes()?], &["sh", "-c", &script])?
        .stdout(File::create(disk.path().join("output"))?)
        .spawn()?;
    eventually("the disk is full", || Ok(disk.path().join("output").metadata()?.len() == u64::from(SMALL)))?;
    ensure(status("loud")? == "RUNNING", || "it has ended".to_owned())?;
    let container = Container::of("loud");
    // Nobody reads any more, so it waits; all else goes on.
    expect_code(&container.exec(&["test", "!", "-e", "/done"])?, 0)?;
    container.kill("KILL")?;
    let code = client.wait_with_output()?.status.code();
    ensure(code == Some(137), || format!("{code:?}"))?;
    expect_code(&ctr(["container", "delete", "loud"]).output()?, 0)
}
