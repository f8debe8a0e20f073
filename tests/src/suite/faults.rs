//! Processes are killed and starved: what must end ends, is told, and leaves nothing behind.

use std::fs::{copy, create_dir, remove_file};
use std::io::Read;
use std::process::{Child, Stdio};

use bulkhead_rootfs_builder::{directory, guest_image};
use bulkhead_tests::bulkhead::{
    bulkhead, detach, eventually, expect_code, image, logs, run_command, run_directory, spawn, stderr,
    stdout, vmm_below,
};
use bulkhead_tests::files::{faulty_agent, share};
use bulkhead_tests::residue::entries;
use bulkhead_tests::vm::{CMDLINE, Plan, Result, Vm, ensure};
use bulkhead_vmm::control::message::Exit;
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("faults: a killed VMM is reported and leaves nothing", vmm_killed),
        trial("faults: a killed launcher takes its VMM along", launcher_killed),
        trial(
            "faults: a killed supervisor takes its VMM along, and what it ran is remembered",
            supervisor_killed,
        ),
        trial("faults: a launcher ended while its machine boots leaves nothing", ended_early),
        trial(
            "faults: a command that leaves a container in the background is killed before it has",
            starter_killed,
        ),
        trial("faults: an agent that dies panics the guest, whose console says so", agent_killed),
        trial("faults: an agent that cannot go on says why", agent_failed),
        trial("signals: a command that a signal ends makes 128 and the signal", killed),
        trial("signals: what the launcher is sent, the command gets", forwarded),
    ]
}

/// A container whose command has printed its first line.
fn started(name: &str, script: &str) -> Result<Child> {
    let mut child = spawn(&["--name", name], &["sh", "-c", script])?;
    let mut byte = [0];
    child.stdout.as_mut().ok_or("no standard output")?.read_exact(&mut byte)?;
    Ok(child)
}

fn signal(pid: u32, signal: Signal) -> Result {
    Ok(kill(Pid::from_raw(i32::try_from(pid)?), signal)?)
}

fn only_vmm(launcher: u32) -> Result<u32> {
    match vmm_below(launcher)?.as_slice() {
        [pid] => Ok(*pid),
        other => Err(format!("VMMs of the launcher: {other:?}").into()),
    }
}

fn vmm_killed() -> Result {
    let child = started("beheaded", "echo started; sleep 1000")?;
    signal(only_vmm(child.id())?, Signal::SIGKILL)?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure(output.status.code() == Some(125), || format!("{}: {said}", output.status))?;
    // A busy host may take longer to tear the machine down than the launcher waits to learn of the signal.
    let told = ["the VMM was killed by signal 9", "the VMM ended without a word"];
    ensure(told.iter().any(|told| said.contains(told)), || said)?;
    eventually("the container is gone", || {
        Ok(!String::from_utf8_lossy(&bulkhead(["ps", "-a"]).output()?.stdout).contains("beheaded"))
    })
}

fn launcher_killed() -> Result {
    let mut child = started("orphaned", "echo started; sleep 1000")?;
    let vmm = only_vmm(child.id())?;
    signal(child.id(), Signal::SIGKILL)?;
    child.wait()?;
    eventually("the VMM ends", || Ok(!std::path::Path::new(&format!("/proc/{vmm}/exe")).exists()))?;
    // The next command finds what is left and cleans it up.
    let listed = bulkhead(["ps"]).output()?;
    ensure(!String::from_utf8_lossy(&listed.stdout).contains("orphaned"), || format!("{listed:?}"))
}

fn killed() -> Result {
    let child = started("victim", "echo started; exec sleep 1000")?;
    let kill = bulkhead(["kill", "victim"]).output()?;
    ensure(kill.status.success(), || format!("{kill:?}"))?;
    let output = child.wait_with_output()?;
    ensure(output.status.code() == Some(137), || format!("{}", output.status))
}

fn forwarded() -> Result {
    let child = started("told", "trap 'exit 9' TERM; echo started; while :; do sleep 0.1; done")?;
    signal(child.id(), Signal::SIGTERM)?;
    let output = child.wait_with_output()?;
    ensure(output.status.code() == Some(9), || format!("{}", output.status))
}

fn supervisor_killed() -> Result {
    detach("headless", &[], &["sh", "-c", "echo started; sleep 1000"])?;
    eventually("it has started", || Ok(logs("headless")? == "started\n"))?;
    let listed = stdout(&bulkhead(["ps", "--json"]).output()?);
    let vmm = listed.lines().find_map(|line| line.trim().strip_prefix("\"vmm_pid\": ")?.strip_suffix(','));
    let vmm: u32 = vmm.ok_or_else(|| listed.clone())?.parse()?;
    let status = std::fs::read_to_string(format!("/proc/{vmm}/status"))?;
    let supervisor = status.lines().find_map(|line| line.strip_prefix("PPid:\t"));
    signal(supervisor.ok_or(status.clone())?.parse()?, Signal::SIGKILL)?;
    eventually("it is known to have ended", || {
        let listed = stdout(&bulkhead(["ps", "-a"]).output()?);
        Ok(listed.contains("exited (137)") && listed.contains("launcher"))
    })?;
    let said = stdout(&bulkhead(["logs", "headless"]).output()?);
    ensure(said == "started\n", || said)?;
    expect_code(&bulkhead(["rm", "headless"]).output()?, 0)
}

/// Waits until a launcher has begun to make a container.
fn begun() -> Result {
    eventually("a container is made", || {
        Ok(entries(&run_directory())?.iter().any(|name| !name.starts_with('.')))
    })
}

fn ended_early() -> Result {
    for (ending, code) in [(Signal::SIGTERM, Some(143)), (Signal::SIGKILL, None)] {
        // On a machine where it has started by then, the command ends in the same way.
        let child = spawn(&[], &["sh", "-c", "trap 'exit 143' TERM; while :; do sleep 0.1; done"])?;
        begun()?;
        signal(child.id(), ending)?;
        let output = child.wait_with_output()?;
        ensure(output.status.code() == code, || format!("{}: {}", output.status, stderr(&output)))?;
        expect_code(&bulkhead(["ps"]).output()?, 0)?;
    }
    Ok(())
}

fn starter_killed() -> Result {
    image("busybox")?;
    let words = ["run", "-d", "--name", "unwanted", "busybox:1", "--", "sleep", "1000"];
    let mut starter = bulkhead(words).stderr(Stdio::null()).spawn()?;
    begun()?;
    starter.kill()?;
    // On a machine where it was faster, the container is there to stay.
    if starter.wait()?.success() {
        expect_code(&bulkhead(["rm", "-f", "unwanted"]).output()?, 0)?;
    }
    Ok(())
}

fn agent_killed() -> Result {
    let directory = tempfile::tempdir()?;
    let root = directory.path().join("guest.erofs");
    guest_image::build(&faulty_agent(), &root)?;
    let cmdline = format!("{CMDLINE} bulkhead.fault=ill");
    let mut vm = Vm::ready(&Plan { root, cmdline, ..Plan::default() })?;
    let exit = vm.wait_exit()?;
    ensure(exit == Exit::Reset, || format!("{exit:?}"))?;
    let console = vm.console()?;
    ensure(console.contains("Kernel panic - not syncing: Attempted to kill init"), || console)
}

fn agent_failed() -> Result {
    let (share, tree) = (share()?, tempfile::tempdir()?);
    copy(faulty_agent(), tree.path().join("agent"))?;
    // All that it mounts on but /tmp.
    for name in ["dev", "proc", "run", "sys"] {
        create_dir(tree.path().join(name))?;
    }
    let guest = share.path().join("guest.erofs");
    remove_file(&guest)?;
    directory::pack(tree.path(), &guest, 1 << 30, &mut |_| {})?;
    let output = run_command(&[], &["true"])?.env("BULKHEAD_SHARE", share.path()).output()?;
    expect_code(&output, 125)?;
    let said = stderr(&output);
    ensure(said.contains("did not start: the agent in the guest failed"), || said.clone())?;
    ensure(said.contains("mount tmpfs on /tmp"), || said)
}
