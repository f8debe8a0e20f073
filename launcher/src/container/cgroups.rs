//! The host's cgroups of sandboxes. A note stands for each until it is removed, because that may be after the end of its
//! launcher, which does not wait for the machine to be torn down and may be killed at any time.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_sandbox::cgroup::{CgroupError, SandboxCgroup};
use bulkhead_sandbox::sizing::MachineSize;
use oci_spec::runtime::Spec;

use crate::failure::Failure;

/// Name of the directory with the notes, in that of all that runs.
pub(super) const DIRECTORY: &str = ".cgroups";
/// How long the machine of a launcher that was killed may take to be torn down while somebody waits.
const PATIENCE: Duration = Duration::from_secs(1);

/// The note for a container's cgroup: a link to what its `cgroupsPath` is, or would be.
pub(super) fn note(run: &Path, id: &str) -> PathBuf {
    run.join(DIRECTORY).join(id)
}

/// Makes a cgroup and the note for it.
pub(super) fn make(
    note: &Path,
    cgroups_path: &str,
    size: MachineSize,
    spec: &Spec,
) -> Result<Option<SandboxCgroup>, CgroupError> {
    // First the note: nobody would find a cgroup without one. Without its directory, there will be no container either.
    let _ = symlink(cgroups_path, note);
    let made = SandboxCgroup::make(cgroups_path, size, spec);
    if !matches!(made, Ok(Some(_))) {
        forget(note);
    }
    made
}

/// Removes a cgroup as soon as the last process in it has ended, without waiting for that.
pub(super) fn let_go(note: &Path, cgroup: &SandboxCgroup) -> Result<(), Failure> {
    if cgroup.remove(Duration::ZERO) {
        forget(note);
        return Ok(());
    }
    cgroup
        .remove_later(|| forget(note))
        .map_err(|e| Failure::from(e).context("cannot wait for the end of the virtual machine"))
}

/// Removes the cgroup of a container whose launcher was killed.
pub(super) fn bury(note: &Path) {
    remove(note, PATIENCE);
}

/// Removes those that nobody removes any more: of containers that have no run directory.
pub(super) fn sweep(run: &Path) -> Result<(), Failure> {
    let directory = run.join(DIRECTORY);
    let failed = |e| Failure::from(e).context(&format!("cannot list {}", directory.display()));
    for note in fs::read_dir(&directory).map_err(failed)? {
        let note = note.map_err(failed)?;
        if !run.join(note.file_name()).exists() {
            remove(&note.path(), Duration::ZERO);
        }
    }
    Ok(())
}

fn remove(note: &Path, patience: Duration) {
    let Ok(path) = fs::read_link(note) else { return };
    let cgroup = path.to_str().and_then(|path| SandboxCgroup::of(path).ok());
    if cgroup.is_none_or(|cgroup| cgroup.remove(patience)) {
        forget(note);
    }
}

/// One that is not there, or that cannot be removed now, is nothing to complain of.
fn forget(note: &Path) {
    let _ = fs::remove_file(note);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_stands_for_a_cgroup_until_that_is_gone() {
        let run = tempfile::tempdir().unwrap();
        fs::create_dir(run.path().join(DIRECTORY)).unwrap();
        let there = |id: &str| fs::symlink_metadata(note(run.path(), id)).is_ok();
        for id in ["runs", "killed", "ended"] {
            symlink("bulkhead-test/no-such-group", note(run.path(), id)).unwrap();
        }
        // A path that is none can stand for nothing.
        symlink("../etc", note(run.path(), "damaged")).unwrap();
        fs::create_dir(run.path().join("runs")).unwrap();
        bury(&note(run.path(), "killed"));
        assert!(!there("killed") && there("ended"));
        sweep(run.path()).unwrap();
        assert!(there("runs") && !there("ended") && !there("damaged"));
    }
}
