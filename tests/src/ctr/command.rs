//! `ctr` as a user types it, with the runtime that is tested.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use super::daemon::{directory, start};
use super::shim::Shim;

use crate::bulkhead::{expect_code, stdout};
use crate::files::tool;
use crate::vm::{Result, artifact};

/// containerd's namespace of the tests.
pub const NAMESPACE: &str = "bulkhead-test";
/// The image that containers are made of.
pub const IMAGE: &str = "busybox:1";
/// The runtime that all others are measured by.
pub const RUNC: &str = "io.containerd.runc.v2";

static IMPORTED: Mutex<bool> = Mutex::new(false);

/// The runtime that is tested.
pub fn runtime() -> String {
    std::env::var("BULKHEAD_RUNTIME").unwrap_or_else(|_| "io.containerd.bulkhead.v2".to_owned())
}

/// Whether that is the reference.
pub fn is_runc() -> bool {
    runtime() == RUNC
}

/// `ctr` with these arguments.
pub fn ctr<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new("ctr");
    command.arg("--address").arg(directory().join("containerd.sock")).args(["--namespace", NAMESPACE]);
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Imports [`IMAGE`], once.
pub fn image() -> Result {
    start()?;
    let mut imported = IMPORTED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*imported {
        let archive = artifact("share/bulkhead-tests/busybox.tar");
        tool(&mut ctr([OsStr::new("image"), OsStr::new("import"), archive.as_os_str()]))?;
        *imported = true;
    }
    Ok(())
}

/// `ctr run` of a command in a new container. `options` go before the image.
pub fn run_command(id: &str, options: &[&str], command: &[&str]) -> Result<Command> {
    ctr_run(&runtime(), id, options, command)
}

/// The same with any runtime.
pub fn ctr_run(runtime: &str, id: &str, options: &[&str], command: &[&str]) -> Result<Command> {
    image()?;
    let root: &[&str] = if options.contains(&"--rootfs") { &[] } else { &[IMAGE] };
    Ok(ctr([&["run", "--runtime", runtime], options, root, &[id], command].concat()))
}

/// Runs a command in a container that is removed afterwards.
pub fn run(options: &[&str], command: &[&str]) -> Result<Output> {
    Ok(run_command("once", &[&["--rm"], options].concat(), command)?.output()?)
}

/// The same, in the background of the test.
pub fn spawn(id: &str, options: &[&str], command: &[&str]) -> Result<Child> {
    let mut command = run_command(id, &[&["--rm"], options].concat(), command)?;
    Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

/// A place for the pipes that `ctr` does not remove: of a process in the background, of a task that is gone, of a `ctr` that was killed.
pub fn pipes() -> Result<String> {
    let pipes = directory().join("pipes");
    std::fs::create_dir_all(&pipes)?;
    Ok(pipes.display().to_string())
}

/// A container that `ctr run --detach` has left running.
pub struct Container(String);

/// Leaves a command running in a container. What it writes is read by nobody unless somebody attaches.
pub fn in_background(id: &str, options: &[&str], command: &[&str]) -> Result<Container> {
    in_background_of(&runtime(), id, options, command)
}

/// The same with any runtime.
pub fn in_background_of(runtime: &str, id: &str, options: &[&str], command: &[&str]) -> Result<Container> {
    expect_code(&ctr_run(runtime, id, &[&["--detach"], options].concat(), command)?.output()?, 0)?;
    Ok(Container::of(id))
}

impl Container {
    /// The container of this name.
    #[must_use]
    pub fn of(id: &str) -> Self {
        Self(id.to_owned())
    }

    /// Its name.
    pub fn id(&self) -> &str {
        &self.0
    }

    /// `ctr task VERB ARGUMENTS ID`.
    pub fn task(&self, verb: &str, arguments: &[&str]) -> Command {
        ctr([&["task", verb], arguments, &[&self.0]].concat())
    }

    /// A command in it.
    pub fn exec_command(&self, exec: &str, options: &[&str], command: &[&str]) -> Command {
        ctr([&["task", "exec", "--exec-id", exec], options, &[&self.0], command].concat())
    }

    /// Leaves a command running in it. `ctr` does not remove the pipes of such a one.
    pub fn exec_in_background(&self, exec: &str, command: &[&str]) -> Result {
        let pipes = pipes()?;
        let options = ["--detach", "--fifo-dir", &pipes];
        expect_code(&self.exec_command(exec, &options, command).output()?, 0)
    }

    /// Runs a command in it.
    pub fn exec(&self, command: &[&str]) -> Result<Output> {
        Ok(self.exec_command("extra", &[], command).output()?)
    }

    /// Sends it a signal, by name or number.
    pub fn kill(&self, signal: &str) -> Result {
        expect_code(&self.task("kill", &["--signal", signal]).output()?, 0)
    }

    /// Its shim, for what `ctr` has no words for.
    pub fn shim(&self) -> Result<Shim> {
        Shim::of(&self.0)
    }

    /// Waits for the end of its command: the exit code.
    pub fn wait(&self) -> Result<u32> {
        Ok(self.shim()?.wait(&self.0, "")?)
    }

    /// Removes the task, which has ended.
    pub fn delete_task(&self) -> Result {
        expect_code(&self.task("delete", &[]).output()?, 0)
    }

    /// Removes task and container, which have ended.
    pub fn delete(&self) -> Result {
        self.delete_task()?;
        expect_code(&ctr(["container", "delete", &self.0]).output()?, 0)
    }

    /// Ends and removes it.
    pub fn end(&self) -> Result {
        self.kill("KILL")?;
        self.wait()?;
        self.delete()
    }
}

/// The tasks that containerd knows, each with its process and its state.
pub fn tasks() -> Result<BTreeMap<String, (u32, String)>> {
    let listed = String::from_utf8(tool(&mut ctr(["task", "list"]))?)?;
    let rows = listed.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    rows.map(|row| match row.as_slice() {
        [id, pid, state] => Ok(((*id).to_owned(), (pid.parse()?, (*state).to_owned()))),
        other => Err(format!("a row of task list: {other:?}").into()),
    })
    .collect()
}

/// The state of a task, as `ctr task list` has it.
pub fn status(id: &str) -> Result<String> {
    Ok(tasks()?.remove(id).ok_or_else(|| format!("no task {id}"))?.1)
}

/// Ends and removes all containers, after a test that failed.
pub fn remove_everything() -> Result {
    for id in tasks()?.keys() {
        ctr(["task", "delete", "--force", id]).output()?;
    }
    for id in stdout(&ctr(["container", "list", "--quiet"]).output()?).lines() {
        ctr(["container", "delete", id]).output()?;
    }
    Ok(())
}

/// The numbers of a container, as `ctr task metrics` has them.
pub fn metrics(id: &str) -> Result<Value> {
    Ok(serde_json::from_slice(&tool(&mut ctr(["task", "metrics", "--format", "json", id]))?)?)
}
