//! What `ctr run` is told about a container.

use std::io::Write;
use std::process::{Command, Stdio};

use bulkhead_tests::bulkhead::{eventually, expect_code, stderr, stdout};
use bulkhead_tests::ctr::{Events, NAMESPACE, ctr, in_background, is_runc, run, run_command, spawn, tasks};
use bulkhead_tests::files::tool;
use bulkhead_tests::terminal::Terminal;
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::roots::Loop;
use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("options: environment, directory, user and hostname are those asked for", identity),
        trial("options: standard input reaches the command up to its end", stdin),
        trial("options: a container left in the background runs on", detached),
        trial("options: a command on a terminal has its size, its keys and its changes of size", terminal),
        trial("options: a capability that is dropped is not there", capability),
        trial("options: the default seccomp profile is in force", seccomp),
        trial("options: a seccomp profile of the user's is in force", own_profile),
        trial("options: only the loopback interface is there, and it is up", loopback),
        trial("options: the task's process is in the network namespace that is given", network_namespace),
        trial("limits: a device that is not allowed cannot be opened", devices),
        trial("limits: a container beyond its memory is killed, and containerd is told why", memory),
        trial(
            "limits: that of a disk is one of the container's group, and a weight holds or is an error",
            disks,
        ),
        trial("limits: a share of a CPU is a quota of the container's group", cpus),
        trial("options: a terminal is its user's, who may open it", terminal_owner),
        trial("options: a terminal that is closed and opened again goes on", terminal_again),
        trial("options: a working directory that is missing is made in the mount that it is in", directories),
    ]
}

fn identity() -> Result {
    let options = ["--env", "A=b c", "--cwd", "/tmp", "--user", "1000:1001", "--hostname", "web"];
    let output = run(&options, &["sh", "-c", "echo $A; pwd; id -u; id -g; hostname"])?;
    expect_code(&output, 0)?;
    ensure(stdout(&output) == "b c\n/tmp\n1000\n1001\nweb\n", || stdout(&output))
}

fn stdin() -> Result {
    let text = "line\n".repeat(40_000);
    let mut child = run_command("once", &["--rm"], &["md5sum"])?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().ok_or("no standard input")?;
    let written = text.clone();
    let writer = std::thread::spawn(move || input.write_all(written.as_bytes()));
    let output = child.wait_with_output()?;
    writer.join().map_err(|_| "the writer panicked")??;
    expect_code(&output, 0)?;
    let expected = bulkhead_tests::checksum::md5_hex(text.as_bytes())?;
    ensure(stdout(&output).starts_with(&expected), || format!("{output:?}, not {expected}"))
}

fn detached() -> Result {
    let container = in_background("left", &[], &["sleep", "1000"])?;
    let output = container.exec(&["pidof", "sleep"])?;
    ensure(stdout(&output) == "1\n", || format!("{output:?}"))?;
    container.end()
}

fn terminal() -> Result {
    let terminal = Terminal::new()?;
    terminal.resize(33, 111)?;
    // ctr sets the size when the command has started.
    let script = "while [ \"$(stty size)\" != '33 111' ]; do sleep 0.1; done; echo first; \
                  while [ \"$(stty size)\" != '44 122' ]; do sleep 0.1; done; echo second; \
                  trap 'echo interrupted; exit 5' INT; read line; echo got $line; while :; do sleep 0.1; done";
    let mut child = terminal.start(&mut run_command("once", &["--rm", "--tty"], &["sh", "-c", script])?)?;
    terminal.shows("first")?;
    ensure(terminal.is_raw()?, || "the terminal is not raw".to_owned())?;
    terminal.resize(44, 122)?;
    // A real terminal tells its foreground processes itself.
    kill(Pid::from_raw(i32::try_from(child.id())?), Signal::SIGWINCH)?;
    terminal.shows("second")?;
    terminal.press("typed\r")?;
    terminal.shows("got typed")?;
    terminal.press("\x03")?;
    terminal.shows("interrupted")?;
    let status = child.wait()?;
    ensure(status.code() == Some(5), || format!("{status}"))
}

fn capability() -> Result {
    let script = "chown 1 /tmp && echo changed; awk '/CapEff/ { print $2 }' /proc/self/status";
    let with = run(&[], &["sh", "-c", script])?;
    ensure(stdout(&with).starts_with("changed\n"), || format!("the test means nothing: {with:?}"))?;
    let without = run(&["--cap-drop", "CAP_CHOWN"], &["sh", "-c", script])?;
    let capabilities = u64::from_str_radix(stdout(&without).trim(), 16);
    // CAP_CHOWN is bit 0.
    ensure(capabilities.is_ok_and(|bits| bits & 1 == 0 && bits != 0), || format!("{without:?}"))
}

/// What the kernel says of seccomp: 2 is a filter.
const MODE: [&str; 3] =
    ["sh", "-c", "awk '/Seccomp:/ { print $2 }' /proc/self/status; unshare -U true && echo allowed"];

fn seccomp() -> Result {
    let without = run(&["--cap-add", "CAP_SYS_ADMIN"], &MODE)?;
    ensure(stdout(&without).starts_with("0\n"), || format!("{without:?}"))?;
    let with = run(&["--seccomp"], &MODE)?;
    ensure(stdout(&with) == "2\n", || format!("{with:?}"))
}

fn own_profile() -> Result {
    let directory = tempfile::tempdir()?;
    let profile = directory.path().join("profile.json");
    let denied: Value = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 }],
    });
    std::fs::write(&profile, denied.to_string())?;
    let options = ["--seccomp", "--seccomp-profile", profile.to_str().ok_or("a temporary file")?];
    let output = run(&options, &["sh", "-c", "mkdir /new 2>&1; echo x >/file && cat /file"])?;
    let said = stdout(&output);
    ensure(said.contains("Operation not supported") && said.ends_with("x\n"), || format!("{output:?}"))
}

fn loopback() -> Result {
    let script = "ls /sys/class/net; nc -l -p 80 -e echo heard & \
                  timeout 60 sh -c 'until nc 127.0.0.1 80 2>/dev/null; do sleep 0.1; done'";
    let output = run(&[], &["sh", "-c", script])?;
    ensure(stdout(&output) == "lo\nheard\n", || format!("{output:?}"))
}

fn network_namespace() -> Result {
    let mut owner = Command::new("unshare").args(["--net", "sleep", "1000"]).spawn()?;
    let tested = in_namespace_of(owner.id());
    owner.kill()?;
    owner.wait()?;
    tested
}

fn in_namespace_of(owner: u32) -> Result {
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/net"));
    eventually("the namespace is made", || Ok(namespace(owner)? != namespace(std::process::id())?))?;
    let container = in_background(
        "inside",
        &["--with-ns", &format!("network:/proc/{owner}/ns/net")],
        &["sleep", "1000"],
    )?;
    let pid = tasks()?.remove("inside").ok_or("no task")?.0;
    let (given, used) = (namespace(owner)?, namespace(pid)?);
    ensure(given == used, || format!("{}, not {}", used.display(), given.display()))?;
    container.end()
}

fn devices() -> Result {
    // /dev/zero, which the default configuration allows, and /dev/kmsg, which it does not. Both may be made.
    let script = "mknod /zero c 1 5 && mknod /kmsg c 1 11 && head -c 1 /zero | od -An -c && head -c 1 /kmsg";
    let output = run(&[], &["sh", "-c", script])?;
    expect_code(&output, 1)?;
    let said = stderr(&output);
    ensure(stdout(&output).contains("\\0") && said.contains("Operation not permitted"), || {
        format!("{output:?}")
    })
}

fn memory() -> Result {
    let events = Events::listen()?;
    let output = run(&["--memory-limit", "67108864"], &["tail", "/dev/zero"])?;
    expect_code(&output, 137)?;
    let seen = events.until("/tasks/delete")?;
    let told: Vec<_> = seen.iter().filter(|(topic, _)| topic == "/tasks/oom").collect();
    ensure(!told.is_empty() && told[0].1["container_id"] == "once", || format!("{seen:?}"))
}

fn disks() -> Result {
    let directory = tempfile::tempdir()?;
    let image = directory.path().join("image");
    std::fs::File::create(&image)?.set_len(1 << 20)?;
    let disk = Loop::new(&image)?;
    let classes = directory.path().join("classes");
    let text = format!(
        "Classes:\n  slow:\n  - Devices: [{}]\n    ThrottleReadBps: 1M\n  light:\n  - Weight: 80\n",
        disk.name()
    );
    std::fs::write(&classes, text)?;
    let classes = classes.to_str().ok_or("a temporary directory")?;
    let options = |class| ["--blockio-config-file", classes, "--blockio-class", class];
    let container = in_background("slow", &options("slow"), &["sleep", "1000"])?;
    // ctr leaves out, without an error, what it cannot find out about a disk.
    let asked = tool(&mut ctr(["container", "info", "--spec", "slow"]))?;
    let asked = &serde_json::from_slice::<Value>(&asked)?["linux"]["resources"]["blockIO"];
    ensure(asked["throttleReadBpsDevice"][0]["rate"] == 1_000_000, || format!("ctr asks for {asked}"))?;
    let limit = std::fs::read_to_string(format!("/sys/fs/cgroup/{NAMESPACE}/slow/io.max"))?;
    container.end()?;
    ensure(limit.contains("rbps=1000000"), || format!("{limit:?}"))?;
    // That of one container among others, which the guest's kernel cannot keep.
    let output = run(&options("light"), &["true"])?;
    if is_runc() {
        return expect_code(&output, 0);
    }
    expect_code(&output, 1)?;
    ensure(stderr(&output).contains("blockIO.weight cannot be enforced"), || format!("{output:?}"))
}

fn cpus() -> Result {
    let script = "while :; do :; done";
    for (options, limited) in [(&["--cpus", "0.5"][..], true), (&[], false)] {
        let child = spawn("spinning", options, &["sh", "-c", script])?;
        bulkhead_tests::bulkhead::eventually("a task", || {
            Ok(bulkhead_tests::ctr::tasks()?.get("spinning").is_some_and(|(_, state)| state == "RUNNING"))
        })?;
        let periods = || -> Result<u64> {
            let metrics = bulkhead_tests::ctr::metrics("spinning")?;
            Ok(metrics["cpu"]["nr_periods"].as_u64().unwrap_or(0))
        };
        if limited {
            bulkhead_tests::bulkhead::eventually("periods are counted", || Ok(periods()? > 0))?;
        } else {
            let counted = periods()?;
            ensure(counted == 0, || format!("{counted} periods without a quota"))?;
        }
        expect_code(
            &bulkhead_tests::ctr::ctr(["task", "kill", "--signal", "KILL", "spinning"]).output()?,
            0,
        )?;
        expect_code(&child.wait_with_output()?, 137)?;
    }
    Ok(())
}

/// What a script shows on a terminal, once it has shown `last` and ended.
fn on_terminal(options: &[&str], script: &str, last: &str) -> Result {
    let terminal = Terminal::new()?;
    let options = [&["--rm", "--tty"], options].concat();
    let mut child = terminal.start(&mut run_command("once", &options, &["sh", "-c", script])?)?;
    terminal.shows(last)?;
    let status = child.wait()?;
    ensure(status.code() == Some(5), || format!("{status}"))
}

fn terminal_owner() -> Result {
    let script = "echo owner $(stat -c %u $(tty)) >/dev/stdout; exit 5";
    on_terminal(&["--user", "1000"], script, "owner 1000")
}

fn terminal_again() -> Result {
    let script = "exec <&- >&- 2>&-; sleep 1; echo first >/dev/console; sleep 1; exec >/dev/console; echo second; exit 5";
    on_terminal(&[], script, "second")
}

fn directories() -> Result {
    let volume = tempfile::tempdir()?;
    let mount = format!("type=bind,src={},dst=/volume,options=rbind:rw", volume.path().display());
    let script = "pwd; stat -c '%u %a' .";
    let output = run(&["--mount", &mount, "--cwd", "/volume/a/b"], &["sh", "-c", script])?;
    ensure(stdout(&output) == "/volume/a/b\n0 755\n", || format!("{output:?}"))?;
    ensure(volume.path().join("a/b").is_dir(), || "it is not in the volume".to_owned())?;
    let mount = "type=tmpfs,src=tmpfs,dst=/volume,options=mode=755";
    let output = run(&["--mount", mount, "--cwd", "/volume/a/b"], &["sh", "-c", script])?;
    ensure(stdout(&output) == "/volume/a/b\n0 755\n", || format!("{output:?}"))
}
