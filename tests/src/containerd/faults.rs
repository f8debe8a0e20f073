//! Processes are killed and starved: what must end ends, is told, and leaves nothing behind.

use std::process::Stdio;

use bulkhead_tests::bulkhead::{eventually, expect_code, stderr, stdout};
use bulkhead_tests::ctr::{
    self, Bundle, Events, NAMESPACE, Shim, ctr, in_background, is_runc, processes_called, run_command,
    status, task_directory, tasks,
};
use bulkhead_tests::files::{Tmpfs, busybox_tree};
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
        trial("faults: a full disk is an error of the writer's", full_disk),
        trial("faults: a bundle on a full disk leaves nothing", full_bundle),
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

fn client_killed() -> Result {
    let mut client = run_command("unwanted", &["--rm", "--fifo-dir", &ctr::pipes()?], &["sleep", "1000"])?
        .stderr(Stdio::null())
        .spawn()?;
    eventually("a bundle is made", || Ok(task_directory().join("unwanted").exists()))?;
    client.kill()?;
    client.wait()?;
    // It may have come as far as a task by then, or the create is still being undone.
    eventually("the container can be removed", || {
        let _ = ctr(["task", "delete", "--force", "unwanted"]).output()?;
        Ok(ctr(["container", "delete", "unwanted"]).output()?.status.success())
    })
}

fn full_disk() -> Result {
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

fn full_bundle() -> Result {
    let disk = Tmpfs::new(16 << 20)?;
    let bundle = Bundle::below(disk.path(), "cramped", &["true"])?;
    // All but nothing: the kernel gives a tmpfs whole pages.
    let filler = std::fs::File::create(disk.path().join("filler"))?;
    let filled = std::io::copy(&mut std::io::repeat(1), &mut &filler);
    ensure(filled.is_err(), || "the disk is not full".to_owned())?;
    if let Ok(shim) = bundle.start_shim() {
        let created = shim.create(&bundle.request());
        if created.is_ok() {
            shim.delete(bundle.id(), "")?;
        }
        shim.shutdown(bundle.id())?;
    }
    bundle.clean_up()
}
