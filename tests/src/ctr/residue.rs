//! What a container may leave behind under containerd, which is nothing.

use std::collections::BTreeSet;
use std::fs::read_to_string;
use std::path::{Path, PathBuf};

use super::{NAMESPACE, ctr, directory, task_directory};
use crate::bulkhead::{eventually, stdout};
use crate::residue::{entries, mounts, processes};
use crate::vm::Result;

/// What the processes of containers and of their helpers are called; the kernel cuts names at 15 bytes.
const PROCESSES: [&str; 8] =
    ["containerd-shim", "runc", "ctr", "bulkhead-vmm", "bulkhead-fs", "sleep", "sh", "cat"];

/// What there was before a test.
#[derive(Debug, PartialEq, Eq)]
pub struct Before(BTreeSet<String>);

impl Before {
    /// Looks around.
    pub fn look() -> Result<Self> {
        Ok(Self(things()?))
    }

    /// Waits until there is no more than before: a VMM may outlive its shim by the time that its machine takes to be torn down.
    pub fn expect_nothing_more(&self) -> Result {
        let mut left = Vec::new();
        let gone = eventually("nothing is left", || {
            left = things()?.difference(&self.0).cloned().collect();
            Ok(left.is_empty())
        });
        gone.map_err(|error| format!("{error}: {left:?}").into())
    }
}

/// All that containers are made of on a host.
fn things() -> Result<BTreeSet<String>> {
    let mut found: BTreeSet<String> =
        processes(&PROCESSES)?.iter().map(|pid| format!("process {pid} {}", command_line(*pid))).collect();
    let own = directory().join("root");
    // The erofs snapshotter keeps the layers of images mounted.
    let held = |mount: &String| !mount.contains(&own.display().to_string());
    found.extend(mounts()?.into_iter().filter(held).map(|mount| format!("mount {mount}")));
    let run = Path::new("/run/containerd");
    for place in [
        run.join("s"),
        run.join("fifo"),
        run.join("runc").join(NAMESPACE),
        PathBuf::from("/run/netns"),
        PathBuf::from("/run/bulkhead"),
        PathBuf::from("/run/bulkhead/.pods"),
        directory().join("root/io.containerd.runtime.v2.task").join(NAMESPACE),
        task_directory(),
    ] {
        let hidden = |name: &String| !name.starts_with('.');
        let names = entries(&place)?.into_iter().filter(hidden);
        found.extend(names.map(|name| place.join(name).display().to_string()));
    }
    found.extend(cgroups(Path::new("/sys/fs/cgroup"), 3)?);
    // Each has a snapshot, too.
    let containers = stdout(&ctr(["container", "list", "--quiet"]).output()?);
    found.extend(containers.lines().map(|id| format!("container {id}")));
    Ok(found)
}

/// The groups down to a depth, but for the one of the namespace, which runtimes make and keep.
fn cgroups(directory: &Path, depth: usize) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for name in entries(directory)? {
        let path = directory.join(name);
        if depth > 0 && path.is_dir() {
            found.extend(cgroups(&path, depth - 1)?);
            if !path.ends_with(NAMESPACE) {
                found.push(path.display().to_string());
            }
        }
    }
    Ok(found)
}

fn command_line(pid: u32) -> String {
    read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ")
}

/// The processes of this name whose command line has this word in it.
pub fn processes_called(name: &str, word: &str) -> Result<Vec<u32>> {
    let named = processes(&[name])?;
    Ok(named.into_iter().filter(|pid| command_line(*pid).split(' ').any(|own| own == word)).collect())
}

/// How many descriptors a process has open.
pub fn descriptors(pid: u32) -> Result<usize> {
    Ok(entries(Path::new(&format!("/proc/{pid}/fd")))?.len())
}
