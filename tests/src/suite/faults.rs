//! Processes are killed and starved: what must end ends, is told, and leaves nothing behind.

use std::io::Read;
use std::process::Child;
use std::time::{Duration, Instant};

use bulkhead_tests::bulkhead::{bulkhead, spawn, vmm_below};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::trial;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("faults: a killed VMM is reported and leaves nothing", vmm_killed),
        trial("faults: a killed launcher takes its VMM along", launcher_killed),
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

/// Waits for what another process is about to do.
fn eventually(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result {
    let start = Instant::now();
    while !holds()? {
        ensure(start.elapsed() < PATIENCE, || format!("{what}: not within {PATIENCE:?}"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
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
    ensure(said.contains("killed"), || said)?;
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
