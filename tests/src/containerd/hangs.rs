//! Processes that live and do not answer: calls end in the times that docs/containerd.md states, and SIGKILL works.

use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bulkhead_rootfs_builder::guest_image;
use bulkhead_tests::bulkhead::{eventually, expect_code};
use bulkhead_tests::ctr::{
    Bundle, CallResult, Code, Container, Shim, ctr, in_background, is_runc, processes_called, status, tasks,
};
use bulkhead_tests::files::{config, faulty_agent, share};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::{soak, trial};

/// In which time a SIGKILL is answered, a call into the guest, and a start.
const KILL: Duration = Duration::from_secs(5);
const CALL: Duration = Duration::from_secs(10);
const START: Duration = Duration::from_mins(1);
/// What a busy machine may add to a time that only shows that a call does end.
const LATE: Duration = Duration::from_secs(10);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial(
            "hangs: calls into a guest whose agent hangs end in time, and so does the container",
            agent_hangs,
        ),
        trial("hangs: a pause that is answered too late is taken back", late_pause),
        trial("hangs: a container whose agent hangs is deleted by force", deleted_by_force),
        trial("hangs: a task whose process is stopped on the host is killed and deleted", stopped),
        trial("hangs: a task whose process is stopped before it starts is killed and deleted", stopped_early),
        trial(
            "hangs: a container that waits for a file server for ever is killed and deleted",
            file_server_stopped,
        ),
        soak("hangs: a start ends in time although the machine is stopped", start_ends),
    ]
}

/// A guest image whose agent hangs when it is asked to, and a configuration that names it.
struct FaultyGuest {
    _share: tempfile::TempDir,
    config: PathBuf,
}

impl FaultyGuest {
    fn new() -> Result<Self> {
        let share = share()?;
        let image = share.path().join("guest.erofs");
        std::fs::remove_file(&image)?;
        guest_image::build(&faulty_agent(), &image)?;
        let config = config(share.path(), &format!("[paths]\nshare = \"{}\"\n", share.path().display()))?;
        Ok(Self { _share: share, config })
    }

    /// A container whose agent answers nothing any more, and the start of the exec that it hangs in.
    fn container(&self, id: &'static str) -> Result<(Container, Timed)> {
        let config = self.config.to_str().ok_or("a temporary directory")?;
        let container = in_background(id, &["--runtime-config-path", config], &["sleep", "1000"])?;
        let shim = container.shim()?;
        shim.exec(id, "last", &["bulkhead.fault=hang"], Path::new(""))?;
        let start = timed(id, |shim, id| shim.start(id, "last").map(drop));
        // A call may still overtake the one in which it hangs.
        eventually("the agent hangs", || Ok(shim.stats(id).is_err()))?;
        Ok((container, start))
    }
}

/// A call that goes on: its result, and how long it took.
type Timed = JoinHandle<std::result::Result<(CallResult, Duration), String>>;

/// Begins a call, by a connection of its own.
fn timed(id: &'static str, call: fn(&Shim, &str) -> CallResult) -> Timed {
    thread::spawn(move || {
        let shim = Shim::of(id).map_err(|error| error.to_string())?;
        let began = Instant::now();
        Ok((call(&shim, id), began.elapsed()))
    })
}

/// Checks that it ended because its time was up, and when.
fn expect_deadline(what: &str, call: Timed, limit: Duration) -> Result {
    let (result, took) = call.join().map_err(|_| "a thread panicked")??;
    Shim::expect(what, result, Code::DEADLINE_EXCEEDED)?;
    ensure(took < limit + LATE, || format!("{what} took {took:?}"))
}

/// Kills a task, in time, and waits for its end.
fn end(shim: &Shim, id: &str) -> Result {
    let began = Instant::now();
    shim.kill(id, "", 9)?;
    let took = began.elapsed();
    ensure(took < KILL, || format!("kill took {took:?}"))?;
    let code = shim.wait(id, "")?;
    ensure(code == 137, || format!("exit code {code}"))
}

fn agent_hangs() -> Result {
    if is_runc() {
        // It has none.
        return Ok(());
    }
    let guest = FaultyGuest::new()?;
    let (container, start) = guest.container("hung")?;
    let calls = [
        ("stats", timed("hung", |shim, id| shim.stats(id).map(drop))),
        ("pause", timed("hung", Shim::pause)),
        ("update", timed("hung", |shim, id| shim.update(id, &json!({ "memory": { "limit": 1 << 27 } })))),
        ("kill", timed("hung", |shim, id| shim.kill(id, "", 15))),
    ];
    // What the shim knows itself, it says.
    ensure(!container.shim()?.pids("hung")?.processes.is_empty(), || "it has no processes".to_owned())?;
    for (what, call) in calls {
        expect_deadline(what, call, CALL)?;
    }
    ensure(status("hung")? == "RUNNING", || "it is not said to run".to_owned())?;
    expect_deadline("start", start, START)?;
    end(&container.shim()?, "hung")?;
    container.delete()
}

fn deleted_by_force() -> Result {
    if is_runc() {
        return Ok(());
    }
    let guest = FaultyGuest::new()?;
    let (container, start) = guest.container("hung")?;
    expect_code(&container.task("delete", &["--force"]).output()?, 0)?;
    let (started, _) = start.join().map_err(|_| "a thread panicked")??;
    ensure(started.is_err(), || "the exec was started".to_owned())?;
    expect_code(&ctr(["container", "delete", "hung"]).output()?, 0)
}

/// The guest hears of the pause when nobody waits for it any more.
fn late_pause() -> Result {
    if is_runc() {
        // It waits for as long as it takes.
        return Ok(());
    }
    let container = in_background("late", &[], &["sleep", "1000"])?;
    let machine = tasks()?.remove("late").ok_or("no task")?.0;
    stop(machine)?;
    let pause = timed("late", Shim::pause);
    let paused = expect_deadline("pause", pause, CALL);
    kill(Pid::from_raw(i32::try_from(machine)?), Signal::SIGCONT)?;
    paused?;
    ensure(status("late")? == "RUNNING", || "it is not said to run".to_owned())?;
    // Nobody else resumes it.
    eventually("it goes on", || Ok(container.exec(&["true"])?.status.success()))?;
    container.end()
}

fn stop(pid: u32) -> Result {
    Ok(kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGSTOP)?)
}

/// With runc that is the command, with a machine the VMM.
fn stopped() -> Result {
    let container = in_background("stopped", &[], &["sleep", "1000"])?;
    stop(tasks()?.remove("stopped").ok_or("no task")?.0)?;
    ensure(status("stopped")? == "RUNNING", || "it is not said to run".to_owned())?;
    end(&container.shim()?, "stopped")?;
    container.delete()
}

/// A task that has been created and stopped.
fn created() -> Result<(Bundle, String, Shim)> {
    let bundle = Bundle::new("stopped", &["true"])?;
    let address = bundle.start_shim_at()?;
    let shim = Shim::connect(&address)?;
    let pid = shim.create(&bundle.request())?.pid;
    stop(pid)?;
    Ok((bundle, address, shim))
}

fn finish(bundle: &Bundle, shim: &Shim) -> Result {
    shim.delete("stopped", "")?;
    shim.shutdown("stopped")?;
    bundle.clean_up()
}

fn stopped_early() -> Result {
    let (bundle, _, shim) = created()?;
    end(&shim, "stopped")?;
    finish(&bundle, &shim)
}

/// Its guest takes the signal; but what waits for a file is not to be interrupted.
fn file_server_stopped() -> Result {
    if is_runc() {
        return Ok(());
    }
    // A name that is not there is looked for again and again.
    let script = "while :; do test -e /nothing; sleep 0.1; done";
    let container = in_background("stopped", &[], &["sh", "-c", script])?;
    match processes_called("bulkhead-fs", "--control-fd")?.as_slice() {
        [pid] => stop(*pid)?,
        other => return Err(format!("file servers: {other:?}").into()),
    }
    thread::sleep(Duration::from_secs(3));
    end(&container.shim()?, "stopped")?;
    container.delete()
}

fn start_ends() -> Result {
    if is_runc() {
        // Its start waits for the process for ever.
        return Ok(());
    }
    let (bundle, address, shim) = created()?;
    let began = Instant::now();
    Shim::expect("start", shim.start("stopped", ""), Code::DEADLINE_EXCEEDED)?;
    let took = began.elapsed();
    ensure(took < START + LATE, || format!("start took {took:?}"))?;
    // Another one, which a kill ends.
    let start = thread::spawn(move || {
        let shim = Shim::connect(&address).map_err(|error| error.to_string())?;
        Ok::<_, String>(shim.start("stopped", "").is_err())
    });
    end(&shim, "stopped")?;
    let failed = start.join().map_err(|_| "a thread panicked")??;
    ensure(failed, || "it was started".to_owned())?;
    finish(&bundle, &shim)
}
