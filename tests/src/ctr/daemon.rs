//! A containerd of the tests' own, so that it can be configured and killed, and nobody else's containers are in it.

use std::fs::{File, create_dir_all, read_to_string, write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::{NAMESPACE, ctr};
use crate::bulkhead::eventually;
use crate::files::tool;
use crate::vm::{Result, artifact};

/// What a container of the blockfile snapshotter has for itself, in bytes. It is copied for each, where the file system cannot share.
const SCRATCH: u64 = 64 << 20;

/// Kubernetes' interfaces open ports and sockets for the whole machine, and these tests need none of them.
const DISABLED: [&str; 6] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.grpc.v1.sandbox-controllers",
    "io.containerd.nri.v1.nri",
    "io.containerd.podsandbox.controller.v1.podsandbox",
];

/// The directory of the daemon: its configuration, log, socket, root and state.
static DIRECTORY: OnceLock<tempfile::TempDir> = OnceLock::new();
/// The daemon, while it runs.
static DAEMON: Mutex<Option<Daemon>> = Mutex::new(None);

/// A running containerd.
struct Daemon(Child);

fn daemon() -> MutexGuard<'static, Option<Daemon>> {
    DAEMON.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where all that is the daemon's is.
pub fn directory() -> &'static Path {
    DIRECTORY.get_or_init(|| tempfile::tempdir().expect("a temporary directory")).path()
}

/// Where the bundles of running tasks are.
pub fn task_directory() -> PathBuf {
    directory().join("state/io.containerd.runtime.v2.task").join(NAMESPACE)
}

fn socket() -> PathBuf {
    directory().join("containerd.sock")
}

/// Starts it, unless it runs.
pub fn start() -> Result {
    let mut running = daemon();
    if running.is_none() {
        configure()?;
        *running = Some(Daemon(spawn()?));
        drop(running);
        eventually("containerd answers", || {
            Ok(UnixStream::connect(socket()).is_ok() && ctr(["version"]).output()?.status.success())
        })?;
    }
    Ok(())
}

/// Kills it, and leaves its containers alone.
pub fn kill() -> Result {
    if let Some(Daemon(mut child)) = daemon().take() {
        child.kill()?;
        child.wait()?;
    }
    Ok(())
}

/// Ends it and removes all it had.
pub fn stop() {
    let _ = kill();
    if let Some(directory) = DIRECTORY.get() {
        // Layers of the erofs snapshotter stay mounted when it ends.
        let mounts = read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mounted = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        for point in mounted.filter(|point| Path::new(point).starts_with(directory.path())) {
            let _ = Command::new("umount").arg(point).status();
        }
        let _ = std::fs::remove_dir_all(directory.path());
    }
}

/// What the daemon has logged after the first `bytes`, and how much that makes now.
pub fn log_since(bytes: usize) -> (String, usize) {
    let log = std::fs::read(directory().join("log")).unwrap_or_default();
    let new = log.get(bytes..).unwrap_or_default();
    (String::from_utf8_lossy(new).into_owned(), log.len())
}

/// The snapshotters that this containerd has and that are tested, the default one first.
pub fn snapshotters() -> Result<Vec<&'static str>> {
    let listed = tool(&mut ctr(["plugins", "ls"]))?;
    let listed = String::from_utf8_lossy(&listed).into_owned();
    let works = |name: &&str| {
        listed.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|columns| {
            columns.first() == Some(&"io.containerd.snapshotter.v1")
                && columns.get(1) == Some(name)
                && columns.last() == Some(&"ok")
        })
    };
    Ok(["overlayfs", "native", "blockfile", "erofs"].into_iter().filter(works).collect())
}

fn spawn() -> Result<Child> {
    let log = File::options().create(true).append(true).open(directory().join("log"))?;
    // Shims are looked for in PATH.
    let path = format!("{}:{}", artifact("bin").display(), std::env::var("PATH").unwrap_or_default());
    let child = Command::new("containerd")
        .arg("--config")
        .arg(directory().join("config.toml"))
        .env("PATH", path)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    Ok(child)
}

/// Whether it is containerd 2 or newer.
pub fn is_version_2() -> Result<bool> {
    let version = tool(Command::new("containerd").arg("--version"))?;
    Ok(!String::from_utf8_lossy(&version).contains(" 1."))
}

/// The defaults but for places, and the snapshotters that do nothing without a configuration.
fn configure() -> Result {
    let file = directory().join("config.toml");
    if file.exists() {
        return Ok(());
    }
    create_dir_all(directory().join("opt"))?;
    let scratch = directory().join("scratch");
    File::create(&scratch)?.set_len(SCRATCH)?;
    // No journal: there are as many of these as containers.
    tool(Command::new("mkfs.ext4").args(["-q", "-O", "^has_journal"]).arg(&scratch))?;
    let place = |name: &str| directory().join(name).display().to_string();
    let mut text = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = {DISABLED:?}\n\
         [grpc]\naddress = {:?}\n\
         [plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n\
         [plugins.\"io.containerd.snapshotter.v1.blockfile\"]\nscratch_file = {:?}\nfs_type = \"ext4\"\nmount_options = []\n",
        place("root"),
        place("state"),
        socket().display().to_string(),
        place("opt"),
        place("scratch"),
    );
    // containerd 2.1 brought it, and 1.7 does not start with a differ that it lacks.
    if is_version_2()? {
        text += "[plugins.\"io.containerd.service.v1.diff-service\"]\ndefault = [\"erofs\", \"walking\"]\n";
    }
    Ok(write(file, text)?)
}

/// Its process.
pub fn pid() -> Result<u32> {
    Ok(daemon().as_ref().ok_or("containerd does not run")?.0.id())
}
