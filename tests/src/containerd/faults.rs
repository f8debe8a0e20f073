//! Processes are killed and starved: what must end ends, is told, and leaves nothing behind.

use std::process::{Child, Stdio};

use bulkhead_tests::bulkhead::{eventually, expect_code, stderr, stdout};
use bulkhead_tests::ctr::{
    self, Bundle, Code, Events, NAMESPACE, Shim, ctr, in_background, is_runc, processes_called, run_command,
    status, task_directory, tasks,
};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial(
            "faults: a task whose process is killed on the host has exited, and is deleted",
            process_killed,
        ),
        trial(
            "faults: a killed file server makes errors, and the container can be ended",
            file_server_killed,
        ),
        trial("faults: a killed shim takes its containers along", shim_killed),
        trial("faults: containers go on without containerd, and it finds them again", containerd_killed),
        trial("faults: an exit without containerd is told by the next one", exit_unseen),
        trial("faults: a client that goes away while a container is created leaves nothing", client_killed),
        trial("faults: a task that is killed while it is created leaves nothing", task_killed_early),
        trial(
            "faults: a containerd that is killed while it creates a container can remove it later",
            killed_in_create,
        ),
    ]
}

fn signal(pid: u32, signal: Signal) -> Result {
    match kill(Pid::from_raw(i32::try_from(pid)?), signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The one process of this name that is the namespace's or, for what shims start, anybody's.
fn only(name: &str, word: &str) -> Result<u32> {
    match processes_called(name, word)?.as_slice() {
        [pid] => Ok(*pid),
        other => Err(format!("{name}: {other:?}").into()),
    }
}

/// With runc that is the command, with a machine the VMM.
fn process_killed() -> Result {
    let events = Events::listen()?;
    let container = in_background("beheaded", &[], &["sleep", "1000"])?;
    container.exec_in_background("extra", &["sleep", "2000"])?;
    let pid = tasks()?.remove("beheaded").ok_or("no task")?.0;
    signal(pid, Signal::SIGKILL)?;
    let code = container.wait()?;
    ensure(code == 137, || format!("exit code {code}"))?;
    eventually("containerd knows it", || Ok(status("beheaded")? == "STOPPED"))?;
    container.delete()?;
    let seen = events.until("/tasks/delete")?;
    let exits: Vec<_> = seen.iter().filter(|(topic, _)| topic == "/tasks/exit").collect();
    let last = exits.last().map(|(_, event)| event["id"].clone());
    ensure(exits.len() == 2 && last == Some("beheaded".into()), || format!("{seen:?}"))
}

fn file_server_killed() -> Result {
    if is_runc() {
        // It has none.
        return Ok(());
    }
    let container = in_background("beheaded", &[], &["sleep", "1000"])?;
    // A program of which a part is missing ends of SIGBUS when it comes there: this one shall have all that it needs.
    let asleep = "until grep -q '(sleep) S' /proc/1/stat; do true; done";
    expect_code(&container.exec(&["sh", "-c", asleep])?, 0)?;
    signal(only("bulkhead-fs", "--control-fd")?, Signal::SIGKILL)?;
    // It may have what it needs in its cache; a name that it has not asked for yet it has not.
    let output = container.exec(&["cat", "/etc/never-looked-up"])?;
    ensure(!output.status.success(), || format!("{output:?}"))?;
    container.end()
}

fn shim_killed() -> Result {
    let container = in_background("orphaned", &["--fifo-dir", &ctr::pipes()?], &["sleep", "1000"])?;
    let socket = Shim::socket("orphaned")?;
    let pid = tasks()?.remove("orphaned").ok_or("no task")?.0;
    let process = format!("/proc/{pid}/ns/net");
    signal(only("containerd-shim", NAMESPACE)?, Signal::SIGKILL)?;
    eventually("the container's process ends", || Ok(std::fs::read_link(&process).is_err()))?;
    eventually("containerd knows it", || {
        Ok(tasks()?.get("orphaned").is_none_or(|(_, state)| state != "RUNNING"))
    })?;
    let _ = container.task("delete", &["--force"]).output()?;
    expect_code(&ctr(["container", "delete", "orphaned"]).output()?, 0)?;
    if is_runc() {
        // Its cleanup leaves the socket behind.
        std::fs::remove_file(socket)?;
    }
    Ok(())
}

fn containerd_killed() -> Result {
    let container = in_background("lasting", &[], &["sleep", "1000"])?;
    ctr::kill()?;
    let pid = only("containerd-shim", NAMESPACE)?;
    ctr::start()?;
    ensure(status("lasting")? == "RUNNING", || "it is not said to run".to_owned())?;
    ensure(only("containerd-shim", NAMESPACE)? == pid, || "it has another shim".to_owned())?;
    let output = container.exec(&["echo", "still here"])?;
    ensure(stdout(&output) == "still here\n", || format!("{output:?}"))?;
    container.end()
}

fn exit_unseen() -> Result {
    let shared = tempfile::tempdir()?;
    let mount = format!("type=bind,src={},dst=/shared,options=rbind:rw", shared.path().display());
    let script = "while [ ! -e /shared/go ]; do sleep 0.1; done; exit 5";
    let options = ["--mount", &mount, "--fifo-dir", &ctr::pipes()?];
    let container = in_background("unseen", &options, &["sh", "-c", script])?;
    let shim = container.shim()?;
    ctr::kill()?;
    std::fs::write(shared.path().join("go"), "")?;
    let code = shim.wait("unseen", "")?;
    ensure(code == 5, || format!("exit code {code}"))?;
    ctr::start()?;
    // containerd takes a shim without processes for one that was forgotten, and runc's shim has none to show by now: the task is gone.
    if !is_runc() || tasks()?.contains_key("unseen") {
        ensure(status("unseen")? == "STOPPED", || "it is not said to have stopped".to_owned())?;
        let output = container.task("delete", &[]).output()?;
        ensure(stderr(&output).contains("exit code 5"), || format!("{output:?}"))?;
    }
    expect_code(&ctr(["container", "delete", "unseen"]).output()?, 0)
}

/// A `ctr run` whose container is being created.
fn creating() -> Result<Child> {
    let client = run_command("unwanted", &["--fifo-dir", &ctr::pipes()?], &["sleep", "1000"])?
        .stderr(Stdio::null())
        .spawn()?;
    eventually("a bundle is made", || Ok(task_directory().join("unwanted").exists()))?;
    Ok(client)
}

/// It may have come as far as a task by then, or the create is still being undone.
fn remove_unwanted() -> Result {
    eventually("the container can be removed", || {
        let _ = ctr(["task", "delete", "--force", "unwanted"]).output()?;
        Ok(ctr(["container", "delete", "unwanted"]).output()?.status.success())
    })
}

fn client_killed() -> Result {
    let mut client = creating()?;
    client.kill()?;
    client.wait()?;
    remove_unwanted()
}

/// At different times. With runc it cannot be killed before it is there.
fn task_killed_early() -> Result {
    for pause in [0, 50, 200, 500, 1000] {
        let bundle = Bundle::new("unborn", &["sleep", "1000"])?;
        let address = bundle.start_shim_at()?;
        let (shim, request, own) = (Shim::connect(&address)?, bundle.request(), address.clone());
        let creating = std::thread::spawn(move || {
            let shim = Shim::connect(&own).map_err(|error| error.to_string())?;
            Ok::<_, String>(shim.create(&request).is_ok())
        });
        std::thread::sleep(std::time::Duration::from_millis(pause));
        eventually("the creation ends", || {
            let _ = shim.kill("unborn", "", 9);
            Ok(creating.is_finished())
        })?;
        if creating.join().map_err(|_| "a thread panicked")?? {
            let _ = shim.kill("unborn", "", 9);
            let code = shim.wait("unborn", "")?;
            ensure(code == 137, || format!("exit code {code}"))?;
            shim.delete("unborn", "")?;
        }
        Shim::expect("state", shim.state("unborn", ""), Code::NOT_FOUND)?;
        shim.shutdown("unborn")?;
        bundle.clean_up()?;
    }
    Ok(())
}

fn killed_in_create() -> Result {
    let mut client = creating()?;
    ctr::kill()?;
    client.wait()?;
    ctr::start()?;
    remove_unwanted()
}
