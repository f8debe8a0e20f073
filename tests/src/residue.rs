//! What a test may leave behind, which is nothing: processes, mounts, cgroups, leased uids, files of containers and of imports.

use std::collections::BTreeSet;
use std::fs::{File, read_dir, read_to_string};
use std::io::ErrorKind;
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};

use crate::bulkhead::{bulkhead, data_directory, eventually, run_directory};
use crate::vm::Result;

/// What there was before a test.
pub struct Before {
    processes: BTreeSet<u32>,
    mounts: BTreeSet<String>,
}

impl Before {
    /// Looks around.
    pub fn look() -> Result<Self> {
        Ok(Self { processes: processes(&OWN)?, mounts: mounts()? })
    }

    /// Waits until there is no more than before: a VMM may outlive its launcher by the time that its machine takes to be torn
    /// down.
    pub fn expect_nothing_more(&self) -> Result {
        let mut left = Vec::new();
        let gone = eventually("nothing is left", || {
            left = self.left()?;
            Ok(left.is_empty())
        });
        gone.map_err(|error| format!("{error}: {left:?}").into())
    }

    fn left(&self) -> Result<Vec<String>> {
        let mut left: Vec<String> =
            processes(&OWN)?.difference(&self.processes).map(|pid| format!("process {pid}")).collect();
        left.extend(mounts()?.difference(&self.mounts).map(|mount| format!("mount {mount}")));
        let (run, data) = (run_directory(), data_directory());
        left.extend(
            entries(&run)?
                .into_iter()
                .filter(|name| ![".cgroups", ".empty", ".lock", ".uids"].contains(&&**name)),
        );
        let directories =
            [run.join(".cgroups"), run.join(".empty"), data.join("containers"), data.join("images/work")];
        for directory in directories {
            left.extend(entries(&directory)?.iter().map(|name| format!("{}/{name}", directory.display())));
        }
        left.extend(subdirectories(Path::new(CGROUPS))?.into_iter().map(|name| format!("{CGROUPS}/{name}")));
        for uid in entries(&run.join(".uids"))? {
            let lock = File::open(run.join(".uids").join(&uid))?;
            if Flock::lock(lock, FlockArg::LockExclusiveNonblock).is_err() {
                left.push(format!("uid {uid}"));
            }
        }
        Ok(left)
    }
}

/// Ends and removes all containers, after a test that failed.
pub fn remove_containers() -> Result {
    for id in entries(&data_directory().join("containers"))? {
        bulkhead(["rm", "-f", &id]).output()?;
    }
    Ok(())
}

/// The names in a directory, none if it is not there.
pub fn entries(directory: &Path) -> Result<Vec<String>> {
    match read_dir(directory) {
        Ok(found) => found.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect(),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

/// The directories in a directory, none if it is not there.
fn subdirectories(directory: &Path) -> Result<Vec<String>> {
    let mut names = entries(directory)?;
    names.retain(|name| directory.join(name).is_dir());
    Ok(names)
}

/// Where `bulkhead run` makes its cgroups.
const CGROUPS: &str = "/sys/fs/cgroup/bulkhead";

/// Launchers, VMMs and file servers.
const OWN: [&str; 3] = ["bulkhead", "bulkhead-fs", "bulkhead-vmm"];

/// The processes of these names that have not ended.
pub(crate) fn processes(names: &[&str]) -> Result<BTreeSet<u32>> {
    let pids = entries(Path::new("/proc"))?.into_iter().filter_map(|name| name.parse().ok());
    let ours = |pid: &u32| {
        let stat = read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let zombie = stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'));
        !zombie && names.iter().any(|name| stat.contains(&format!("({name})")))
    };
    Ok(pids.filter(ours).collect())
}

pub(crate) fn mounts() -> Result<BTreeSet<String>> {
    Ok(read_to_string("/proc/self/mountinfo")?.lines().map(str::to_owned).collect())
}
