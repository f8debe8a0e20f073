//! `bulkhead run` as a user meets it: output, exit codes, options, limits.

use bulkhead_tests::bulkhead::{expect_code, expect_refusal, run, stderr, stdout};
use bulkhead_tests::vm::{Result, ensure};
use bulkhead_vmm::arch::layout::VCPUS_MAX;
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("run: a container has a kernel of its own", own_kernel),
        trial("run: exit codes are Docker's", exit_codes),
        trial("run: environment, directory, user and hostname are those asked for", identity),
        trial("run: a read-only root cannot be written", read_only),
        trial("run: a disk for what is written", storage),
        trial("run: two CPUs by default, and more than the host has with a warning", cpus),
        trial("limits: a memory hog is killed, and said to be out of memory", memory_hog),
        trial("isolation: a container with CAP_MKNOD cannot open the guest's disks", guest_disks),
    ]
}

fn own_kernel() -> Result {
    let output = run(&[], &["uname", "-r"])?;
    expect_code(&output, 0)?;
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let guest = stdout(&output);
    ensure(guest.contains("bulkhead") && guest != host, || format!("guest {guest:?}, host {host:?}"))
}

fn exit_codes() -> Result {
    expect_code(&run(&[], &["sh", "-c", "exit 7"])?, 7)?;
    expect_refusal(&run(&[], &["nothing-like-it"])?, 127, &["nothing-like-it", "not found"])?;
    expect_refusal(&run(&[], &["/etc/passwd"])?, 126, &["/etc/passwd", "Permission denied"])
}

fn identity() -> Result {
    // The directory is made if it is not there, as Docker does.
    let options = ["-e", "A=b c", "-w", "/made/for/it", "-u", "1000:1001", "--hostname", "web"];
    let output = run(&options, &["sh", "-c", "echo $A; pwd; id -u; id -g; hostname; stat -c %U:%a ."])?;
    expect_code(&output, 0)?;
    ensure(stdout(&output) == "b c\n/made/for/it\n1000\n1001\nweb\nroot:755\n", || stdout(&output))
}

fn read_only() -> Result {
    let output = run(&["--read-only"], &["sh", "-c", "echo x > /file"])?;
    expect_code(&output, 1)?;
    ensure(stderr(&output).contains("Read-only file system"), || stderr(&output))
}

fn storage() -> Result {
    let fill = "dd if=/dev/zero of=/file bs=1M count=40 2>/dev/null && stat -c %s /file";
    let output = run(&["--storage", "256M", "--memory", "128M"], &["sh", "-c", fill])?;
    expect_code(&output, 0)?;
    ensure(stdout(&output).trim() == "41943040", || stdout(&output))
}

/// Waits until there are so many CPUs: the second and later ones come online beside the container's start.
const WAIT_FOR_CPUS: &str = "while [ $(nproc) -lt $1 ]; do sleep 0.1; done; nproc";

fn cpus() -> Result {
    let host = std::thread::available_parallelism()?.get();
    // Two, where the host has them.
    let default = host.min(2).to_string();
    let output = run(&[], &["timeout", "60", "sh", "-c", WAIT_FOR_CPUS, "-", &default])?;
    ensure(stdout(&output).trim() == default, || format!("by default {:?}", stdout(&output)))?;
    if host >= usize::from(VCPUS_MAX) {
        return Ok(());
    }
    let more = (host + 1).to_string();
    let output = run(&["--cpus", &more], &["timeout", "60", "sh", "-c", WAIT_FOR_CPUS, "-", &more])?;
    expect_code(&output, 0)?;
    let warned = stderr(&output);
    ensure(
        warned.lines().count() == 1 && warned.contains(&format!("more than the {host} of this host")),
        || warned,
    )
}

fn memory_hog() -> Result {
    let output = run(&["--memory", "128M"], &["tail", "/dev/zero"])?;
    expect_code(&output, 137)?;
    ensure(stderr(&output).contains("out of memory"), || stderr(&output))
}

fn guest_disks() -> Result {
    let probe = "for n in 0 16 32; do mknod /tmp/disk$n b 254 $n && head -c 1 /tmp/disk$n && echo OPENED; done; mknod /tmp/port c 1 4 && head -c 1 /tmp/port && echo OPENED; grep CapEff /proc/self/status";
    let output = run(&[], &["sh", "-c", probe])?;
    ensure(!stdout(&output).contains("OPENED"), || stdout(&output))?;
    ensure(stderr(&output).matches("Operation not permitted").count() == 4, || stderr(&output))?;
    // CAP_MKNOD is bit 27: the test means nothing without it.
    let said = stdout(&output);
    let capabilities =
        said.split_whitespace().last().and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or(0);
    ensure(capabilities & 1 << 27 != 0, || format!("no CAP_MKNOD: {said}"))
}
