//! A task while it runs and after: processes, signals, pauses, numbers, its end.

use std::fs::read_link;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;

use bulkhead_tests::bulkhead::{eventually, expect_code, stderr, stdout};
use bulkhead_tests::ctr::{Status, ctr, in_background, metrics, status, tasks};
use bulkhead_tests::terminal::Terminal;
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("exec: output, exit code, directory and user are the process's own", exec),
        trial("exec: a process on a terminal has its size, and is told when that changes", exec_terminal),
        trial("exec: a process left in the background is killed by its own id", exec_killed),
        trial("kill: a trapped signal is handled, by name and by number", trapped),
        trial("kill: KILL makes 137, and the task is stopped until it is deleted", killed),
        trial("attach: what the command writes appears, and detaching leaves it alone", attach),
        trial("pause: a paused container does nothing, and goes on when it is resumed", paused),
        trial("pause: all processes of a paused container are shown as paused", shown_as_paused),
        trial("ps: the task's process is one of the host, in the container's network", processes),
        trial("metrics: memory, processes and CPU time are those of the container", numbers),
        trial("delete: a running task is not deleted, and by force it is", deleted),
    ]
}

fn exec() -> Result {
    let container = in_background("host", &["--env", "A=b"], &["sleep", "1000"])?;
    let options = ["--cwd", "/tmp", "--user", "1000"];
    let script = "echo $A; pwd; id -u; echo said >&2; exit 3";
    let output = container.exec_command("extra", &options, &["sh", "-c", script]).output()?;
    expect_code(&output, 3)?;
    ensure(stdout(&output) == "b\n/tmp\n1000\n" && stderr(&output).contains("said\n"), || {
        format!("{output:?}")
    })?;
    // The same name again, as the first one is gone.
    expect_code(&container.exec(&["true"])?, 0)?;
    let mut child = container
        .exec_command("extra", &[], &["cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    std::io::Write::write_all(&mut child.stdin.take().ok_or("no standard input")?, b"input")?;
    let output = child.wait_with_output()?;
    ensure(stdout(&output) == "input", || format!("{output:?}"))?;
    container.end()
}

fn exec_terminal() -> Result {
    let container = in_background("host", &[], &["sleep", "1000"])?;
    let terminal = Terminal::new()?;
    terminal.resize(12, 34)?;
    let script = "tty; while [ \"$(stty size)\" != '12 34' ]; do sleep 0.1; done; \
                  trap 'stty size; exit 4' WINCH; echo ready; while :; do sleep 0.1; done";
    let mut child =
        terminal.start(&mut container.exec_command("screen", &["--tty"], &["sh", "-c", script]))?;
    terminal.shows("/dev/pts/")?;
    terminal.shows("ready")?;
    container.shim()?.resize("host", "screen", 56, 78)?;
    terminal.shows("56 78")?;
    let status = child.wait()?;
    ensure(status.code() == Some(4), || format!("{status}"))?;
    container.end()
}

fn exec_killed() -> Result {
    let container = in_background("host", &[], &["sleep", "1000"])?;
    container.exec_in_background("extra", &["sleep", "2000"])?;
    expect_code(&container.task("kill", &["--signal", "TERM", "--exec-id", "extra"]).output()?, 0)?;
    let shim = container.shim()?;
    let code = shim.wait(container.id(), "extra")?;
    ensure(code == 143, || format!("exit code {code}"))?;
    shim.delete(container.id(), "extra")?;
    ensure(status("host")? == "RUNNING", || "the container has ended, too".to_owned())?;
    container.end()
}

fn trapped() -> Result {
    let script = "trap 'echo user >>/got' USR1; trap 'echo realtime >>/got' 40; trap 'exit 9' TERM; \
                  touch /ready; while :; do sleep 0.1; done";
    let container = in_background("trapping", &[], &["sh", "-c", script])?;
    eventually("the traps are set", || Ok(container.exec(&["test", "-e", "/ready"])?.status.success()))?;
    container.kill("SIGUSR1")?;
    container.kill("40")?;
    eventually("both signals are handled", || {
        let got = stdout(&container.exec(&["sort", "/got"])?);
        Ok(got == "realtime\nuser\n")
    })?;
    container.kill("SIGTERM")?;
    let code = container.wait()?;
    ensure(code == 9, || format!("exit code {code}"))?;
    container.delete()
}

fn killed() -> Result {
    let container = in_background("victim", &[], &["sleep", "1000"])?;
    container.kill("SIGKILL")?;
    let code = container.wait()?;
    ensure(code == 137, || format!("exit code {code}"))?;
    eventually("containerd knows it", || Ok(status("victim")? == "STOPPED"))?;
    let output = container.task("delete", &[]).output()?;
    ensure(stderr(&output).contains("exit code 137"), || format!("{output:?}"))?;
    expect_code(&ctr(["container", "delete", "victim"]).output()?, 0)
}

fn attach() -> Result {
    let script = "trap 'exit 6' TERM; while :; do echo tick; sleep 0.1; done";
    let container = in_background("ticking", &[], &["sh", "-c", script])?;
    for _ in 0..2 {
        let mut attached = container.task("attach", &[]).stdout(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(attached.stdout.take().ok_or("no standard output")?).lines();
        let first = lines.next().ok_or("no output")??;
        ensure(first == "tick", || first)?;
        attached.kill()?;
        attached.wait()?;
    }
    ensure(status("ticking")? == "RUNNING", || "it has ended".to_owned())?;
    let attached = container.task("attach", &[]).stdout(Stdio::piped()).spawn()?;
    container.kill("TERM")?;
    let output = attached.wait_with_output()?;
    expect_code(&output, 6)?;
    // ctr removes the task that it was attached to.
    container.shim().err().ok_or("the task is still there")?;
    expect_code(&ctr(["container", "delete", "ticking"]).output()?, 0)
}

fn paused() -> Result {
    let shared = tempfile::tempdir()?;
    let mount = format!("type=bind,src={},dst=/shared,options=rbind:rw", shared.path().display());
    let script = "while :; do echo tick >>/shared/ticks; sleep 0.01; done";
    let container = in_background("ticking", &["--mount", &mount], &["sh", "-c", script])?;
    let ticks = || std::fs::metadata(shared.path().join("ticks")).map_or(0, |file| file.len());
    eventually("it ticks", || Ok(ticks() > 0))?;
    expect_code(&container.task("pause", &[]).output()?, 0)?;
    ensure(status("ticking")? == "PAUSED", || "it is not said to be paused".to_owned())?;
    let before = ticks();
    let exec = container.exec(&["true"])?;
    ensure(exec.status.code() == Some(1) && stderr(&exec).contains("paused"), || format!("{exec:?}"))?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    let after = ticks();
    ensure(before == after, || format!("{before} bytes, then {after}"))?;
    expect_code(&container.task("resume", &[]).output()?, 0)?;
    eventually("it ticks again", || Ok(ticks() > after))?;
    ensure(status("ticking")? == "RUNNING", || "it is not said to be running".to_owned())?;
    container.end()
}

fn shown_as_paused() -> Result {
    let container = in_background("host", &[], &["sleep", "1000"])?;
    let shim = container.shim()?;
    for (exec, program) in [("added", "sleep"), ("running", "sleep"), ("stopped", "false")] {
        shim.exec("host", exec, &[program, "1000"], Path::new(""))?;
    }
    shim.start("host", "running")?;
    shim.start("host", "stopped")?;
    let code = shim.wait("host", "stopped")?;
    ensure(code == 1, || format!("exit code {code}"))?;
    let states = || -> Result<Vec<Status>> {
        let states = ["", "added", "running", "stopped"].map(|exec| shim.state("host", exec));
        states.into_iter().map(|state| Ok(state?.status.enum_value_or_default())).collect()
    };
    shim.pause("host")?;
    let paused = states()?;
    expect_code(&container.task("resume", &[]).output()?, 0)?;
    let resumed = states()?;
    ensure(paused == [Status::PAUSED; 4], || format!("{paused:?}"))?;
    let expected = [Status::RUNNING, Status::CREATED, Status::RUNNING, Status::STOPPED];
    ensure(resumed == expected, || format!("{resumed:?}"))?;
    shim.delete("host", "added")?;
    shim.delete("host", "stopped")?;
    container.end()
}

fn processes() -> Result {
    let container = in_background("host", &[], &["sleep", "1000"])?;
    let listed = stdout(&container.task("ps", &[]).output()?);
    let pids: Vec<u32> =
        listed.lines().skip(1).filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect();
    let task = tasks()?.remove("host").ok_or("no task")?.0;
    ensure(pids.contains(&task), || format!("{task} is not in {listed}"))?;
    let network = |pid: &str| read_link(format!("/proc/{pid}/ns/net"));
    ensure(network(&task.to_string())? != network("self")?, || "it is in the host's network".to_owned())?;
    container.end()
}

fn numbers() -> Result {
    let container =
        in_background("counted", &["--memory-limit", "134217728"], &["sh", "-c", "sleep 1000 & wait"])?;
    let before = metrics("counted")?;
    // In memory that stays in use, by the container and not by this command.
    let work = "dd if=/dev/zero of=/dev/shm/file bs=1M count=32 2>/dev/null; i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done";
    expect_code(&container.exec(&["sh", "-c", work])?, 0)?;
    let after = metrics("counted")?;
    let number =
        |metrics: &serde_json::Value, group: &str, name: &str| metrics[group][name].as_u64().unwrap_or(0);
    let (said_before, said_after) = (number(&before, "memory", "usage"), number(&after, "memory", "usage"));
    // Some of what the start took has gone meanwhile.
    ensure(said_after > said_before + (31 << 20) && said_after < 134_217_728, || {
        format!("memory: {said_before}, with 32 MiB more {said_after}")
    })?;
    let limit = number(&after, "memory", "usage_limit");
    ensure(limit == 134_217_728, || format!("memory limit: {limit}"))?;
    ensure(number(&after, "cpu", "usage_usec") > number(&before, "cpu", "usage_usec"), || {
        format!("CPU time: {} then {}", before["cpu"], after["cpu"])
    })?;
    let processes = number(&after, "pids", "current");
    ensure(processes == 2, || format!("{processes} processes, not 2"))?;
    container.end()
}

fn deleted() -> Result {
    let container = in_background("running", &[], &["sleep", "1000"])?;
    let output = container.task("delete", &[]).output()?;
    ensure(output.status.code() == Some(1) && stderr(&output).contains("must be stopped"), || {
        format!("{output:?}")
    })?;
    expect_code(&container.task("delete", &["--force"]).output()?, 0)?;
    expect_code(&ctr(["container", "delete", "running"]).output()?, 0)
}
