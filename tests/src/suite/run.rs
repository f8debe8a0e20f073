//! `bulkhead run` as a user meets it: output, input, exit codes, options.

use std::io::Write;
use std::process::Stdio;

use bulkhead_tests::bulkhead::{bulkhead, expect_code, image, run, stderr, stdout};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("run: a container has a kernel of its own", own_kernel),
        trial("run: exit codes are Docker's", exit_codes),
        trial("run: standard input ends where it ends", input),
        trial("run: a closed output ends the command", closed_output),
        trial("run: environment, directory, user and hostname are those asked for", identity),
        trial("run: a read-only root cannot be written", read_only),
        trial("run: a disk for what is written", storage),
        trial("run: what makes no sense is refused with what to do", refused),
        trial("run: two CPUs by default, and as many as asked for", cpus),
        trial("limits: a fork bomb meets the pids limit, and the container can be stopped", fork_bomb),
        trial("limits: a memory hog is killed, and said to be out of memory", memory_hog),
        trial("isolation: a container with CAP_MKNOD cannot open the guest's disks", guest_disks),
        trial("background: run, ps, exec, logs, stop and rm", background),
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
    for (command, code) in
        [(&["true"][..], 0), (&["sh", "-c", "exit 7"], 7), (&["nothing-like-it"], 127), (&["/etc"], 126)]
    {
        expect_code(&run(&[], command)?, code).map_err(|error| format!("{command:?}: {error}"))?;
    }
    Ok(())
}

fn input() -> Result {
    image("busybox")?;
    let bytes: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
    let mut child = bulkhead(["run", "--rm", "-i", "busybox:1", "--", "md5sum"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    child.stdin.take().ok_or("no standard input")?.write_all(&bytes)?;
    let output = child.wait_with_output()?;
    expect_code(&output, 0)?;
    // md5 of the integers below a million, little-endian.
    let expected = bulkhead_tests::checksum::md5_hex(&bytes)?;
    ensure(stdout(&output).starts_with(&expected), || format!("{} instead of {expected}", stdout(&output)))
}

fn closed_output() -> Result {
    image("busybox")?;
    let mut child = bulkhead(["run", "--rm", "busybox:1", "--", "yes"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    drop(child.stdout.take());
    let output = child.wait_with_output()?;
    ensure(!output.status.success(), || format!("{}", output.status))?;
    ensure(!stderr(&output).contains("panicked"), || stderr(&output))
}

fn identity() -> Result {
    let options = ["-e", "A=b c", "-w", "/tmp", "-u", "1000:1001", "--hostname", "web"];
    let output = run(&options, &["sh", "-c", "echo $A; pwd; id -u; id -g; hostname"])?;
    expect_code(&output, 0)?;
    ensure(stdout(&output) == "b c\n/tmp\n1000\n1001\nweb\n", || stdout(&output))
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

fn refused() -> Result {
    for (options, expected) in [
        (&["--cpus", "0"][..], "cpus"),
        (&["--memory", "8M"], "memory"),
        (&["--memory", "4000G"], "memory"),
        (&["-u", "nobody-like-it"], "nobody-like-it"),
    ] {
        let output = run(options, &["true"])?;
        expect_code(&output, 125)
            .or_else(|error| if output.status.code() == Some(2) { Ok(()) } else { Err(error) })?;
        let said = stderr(&output).to_lowercase();
        ensure(said.contains(expected) && !said.contains("panicked"), || format!("{options:?}: {said}"))?;
    }
    let output = bulkhead(["run", "no-such-image", "--", "true"]).output()?;
    expect_code(&output, 125)?;
    ensure(stderr(&output).contains("image import"), || stderr(&output))
}

fn cpus() -> Result {
    let counted = |options: &[&str]| -> Result<String> {
        // The second CPU comes online beside the container's start.
        let wait = "for i in 1 2 3 4 5 6 7 8 9; do nproc; sleep 1; done | sort -n | tail -n 1";
        Ok(stdout(&run(options, &["sh", "-c", wait])?).trim().to_owned())
    };
    let default = counted(&[])?;
    ensure(default == "2", || format!("{default} CPUs by default"))?;
    let three = counted(&["--cpus", "3"])?;
    ensure(three == "3", || format!("{three} CPUs of 3"))
}

fn fork_bomb() -> Result {
    let bomb = "b() { b | b & }; b 2>/dev/null; sleep 2; echo survived";
    let output = run(&["--pids-limit", "64"], &["timeout", "-s", "KILL", "5", "sh", "-c", bomb])?;
    let code = output.status.code();
    ensure(code.is_some_and(|code| code != 125), || format!("{code:?}: {}", stderr(&output)))
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

fn background() -> Result {
    image("busybox")?;
    let script = "trap 'echo bye; exit 3' TERM; echo started; while :; do sleep 0.1; done";
    let output = bulkhead(["run", "-d", "--name", "bg", "busybox:1", "--", "sh", "-c", script]).output()?;
    expect_code(&output, 0)?;
    let listed = stdout(&bulkhead(["ps"]).output()?);
    ensure(listed.contains("bg"), || listed)?;
    let inside = bulkhead(["exec", "bg", "sh", "-c", "echo inside; exit 5"]).output()?;
    expect_code(&inside, 5)?;
    ensure(stdout(&inside) == "inside\n", || stdout(&inside))?;
    expect_code(&bulkhead(["stop", "bg"]).output()?, 0)?;
    let logs = bulkhead(["logs", "bg"]).output()?;
    ensure(stdout(&logs) == "started\nbye\n", || format!("logs: {:?}", stdout(&logs)))?;
    let ended = stdout(&bulkhead(["ps", "-a"]).output()?);
    ensure(ended.contains("bg") && ended.contains('3'), || ended)?;
    expect_code(&bulkhead(["rm", "bg"]).output()?, 0)?;
    let gone = stdout(&bulkhead(["ps", "-a"]).output()?);
    ensure(!gone.contains("bg"), || gone)
}
