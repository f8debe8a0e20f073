//! The launcher as a user runs it, with a root of its own and images that every test shares.

use std::ffi::OsStr;
use std::fs::read_dir;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_rootfs_builder::store::Store;

use crate::vm::{Result, artifact, ensure};

/// Where this process's images and containers are.
static ROOT: OnceLock<tempfile::TempDir> = OnceLock::new();
/// The images that have been imported.
static IMPORTED: Mutex<Vec<&'static str>> = Mutex::new(Vec::new());

fn root() -> &'static Path {
    ROOT.get_or_init(|| tempfile::tempdir().expect("a temporary directory")).path()
}

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_mins(2);

/// Removes what the tests have made.
pub fn clean_up() {
    if let Some(root) = ROOT.get() {
        let _ = std::fs::remove_dir_all(root.path());
    }
}

/// Where `bulkhead` keeps what runs.
#[must_use]
pub fn run_directory() -> PathBuf {
    root().join("run")
}

/// Where `bulkhead` keeps images and what is left of containers.
#[must_use]
pub fn data_directory() -> PathBuf {
    root().join("lib")
}

/// `bulkhead` with these arguments.
pub fn bulkhead<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(artifact("bin/bulkhead"));
    command.args(arguments).stdin(Stdio::null());
    command.env("BULKHEAD_ROOT", data_directory()).env("BULKHEAD_RUN", run_directory());
    command
}

/// Imports one of the images that were installed with the suite, once.
pub fn image(name: &'static str) -> Result {
    let mut imported = IMPORTED.lock().unwrap_or_else(PoisonError::into_inner);
    if !imported.contains(&name) {
        let archive = artifact("share/bulkhead-tests").join(format!("{name}.tar"));
        let output = bulkhead([OsStr::new("image"), OsStr::new("import"), archive.as_os_str()]).output()?;
        ensure(output.status.success(), || {
            format!("import of {name}: {}", String::from_utf8_lossy(&output.stderr))
        })?;
        imported.push(name);
    }
    Ok(())
}

/// The EROFS layers of one of these images, the topmost first.
pub fn layers(name: &'static str) -> Result<Vec<PathBuf>> {
    image(name)?;
    let store = Store::open(data_directory().join("images"))?;
    Ok(store.resolve(&format!("{name}:1"))?.layers.into_iter().rev().collect())
}

/// `bulkhead run --rm` of a command in the busybox image. `options` go before the image.
pub fn run_command(options: &[&str], command: &[&str]) -> Result<Command> {
    image("busybox")?;
    Ok(bulkhead([&["run", "--rm"], options, &["busybox:1", "--"], command].concat()))
}

/// Runs a command in a new container of the busybox image.
pub fn run(options: &[&str], command: &[&str]) -> Result<Output> {
    Ok(run_command(options, command)?.output()?)
}

/// The same, in the background of the test.
pub fn spawn(options: &[&str], command: &[&str]) -> Result<Child> {
    Ok(run_command(options, command)?.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

/// Leaves a container of the busybox image in the background.
pub fn detach(name: &str, options: &[&str], command: &[&str]) -> Result {
    image("busybox")?;
    let words = [&["run", "-d", "--name", name], options, &["busybox:1", "--"], command].concat();
    expect_code(&bulkhead(words).output()?, 0)
}

/// What a container has written to its standard output so far.
pub fn logs(name: &str) -> Result<String> {
    Ok(stdout(&bulkhead(["logs", name]).output()?))
}

/// Waits for what another process is about to do.
pub fn eventually(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result {
    let start = Instant::now();
    while !holds()? {
        ensure(start.elapsed() < PATIENCE, || format!("{what}: not within {PATIENCE:?}"))?;
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// What a command wrote to its standard output.
#[must_use]
pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What a command wrote to its standard error.
#[must_use]
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Checks an exit code.
pub fn expect_code(output: &Output, code: i32) -> Result {
    ensure(output.status.code() == Some(code), || {
        format!(
            "exit code {:?}, not {code}; stdout: {:?}; stderr: {:?}",
            output.status,
            stdout(output),
            stderr(output)
        )
    })
}

/// Checks that a command failed with this code, wrote nothing to its standard output, and said why in one line that has all of
/// these words.
pub fn expect_refusal(output: &Output, code: i32, words: &[&str]) -> Result {
    expect_code(output, code)?;
    ensure(output.stdout.is_empty(), || format!("stdout: {:?}", stdout(output)))?;
    let said = stderr(output);
    let one_line = said.lines().count() == 1 && said.starts_with("bulkhead: ");
    ensure(one_line && !said.contains("internal error"), || format!("not one line: {said}"))?;
    let missing: Vec<_> = words.iter().filter(|word| !said.contains(**word)).collect();
    ensure(missing.is_empty(), || format!("{missing:?} is not in: {said}"))
}

/// The processes below `ancestor` that run the VMM.
pub fn vmm_below(ancestor: u32) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let Some((head, tail)) = stat.rsplit_once(')') else { continue };
        let parent = tail.split_whitespace().nth(1).and_then(|parent| parent.parse::<u32>().ok());
        if head.ends_with("(bulkhead-vmm") && parent == Some(ancestor) {
            found.push(pid);
        }
    }
    Ok(found)
}
