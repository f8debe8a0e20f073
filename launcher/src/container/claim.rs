//! The right to run a container.

use std::fs::File;
use std::path::PathBuf;

use rustix::process::getpid;

use super::files::{PACKED_FILE, SCRATCH_FILE, remove_directory, remove_disks};
use super::record::{self, Outcome, RECORD_FILE, RUNNING_FILE, Record, Running};
use super::registry::Registry;
use crate::failure::Failure;

/// The right to run a container, held by its launcher. When the launcher ends without [`finish`](Self::finish), whoever
/// comes next cleans up.
#[derive(Debug)]
pub(crate) struct Claim {
    /// The data directory.
    pub(crate) data: PathBuf,
    /// The run directory.
    pub(crate) run: PathBuf,
    registry: Registry,
    _lock: File,
}

impl Claim {
    /// The claim of whoever holds the lock of the run directory.
    pub(super) fn new(registry: &Registry, id: &str, lock: File) -> Self {
        Self {
            data: registry.data_directory(id),
            run: registry.run_directory(id),
            registry: registry.clone(),
            _lock: lock,
        }
    }

    /// The scratch disk's place.
    pub(crate) fn scratch(&self) -> PathBuf {
        self.data.join(SCRATCH_FILE)
    }

    /// The place of the root that was packed from a directory.
    pub(crate) fn packed_root(&self) -> PathBuf {
        self.data.join(PACKED_FILE)
    }

    /// Writes down who runs the container: this process, and the VMM if there is one already.
    pub(crate) fn running(&self, vmm_pid: Option<u32>) -> Result<(), Failure> {
        let supervisor_pid = getpid().as_raw_nonzero().get();
        record::write(&self.run, RUNNING_FILE, &Running { supervisor_pid, vmm_pid })
    }

    /// Writes down how the container ended, or removes what there is of it if `outcome` is `None`.
    pub(crate) fn finish(self, record: &Record, outcome: Option<Outcome>) -> Result<(), Failure> {
        // Nobody sees the one without the other.
        let _lock = self.registry.lock()?;
        if outcome.is_none() {
            remove_directory(&self.data)?;
        } else {
            remove_disks(&self.data)?;
            record::write(&self.data, RECORD_FILE, &Record { outcome, ..record.clone() })?;
        }
        remove_directory(&self.run)
    }
}
