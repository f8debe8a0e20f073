//! The right to run a container.

use std::fs::File;
use std::path::PathBuf;
use std::sync::OnceLock;

use bulkhead_sandbox::cgroup::{CgroupError, SandboxCgroup};
use bulkhead_sandbox::sizing::MachineSize;
use oci_spec::runtime::Spec;
use rustix::process::getpid;

use super::cgroups;
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
    cgroup: OnceLock<SandboxCgroup>,
    cgroup_note: PathBuf,
    registry: Registry,
    _lock: File,
}

impl Claim {
    /// The claim of whoever holds the lock of the run directory.
    pub(super) fn new(registry: &Registry, id: &str, lock: File) -> Self {
        Self {
            data: registry.data_directory(id),
            run: registry.run_directory(id),
            cgroup: OnceLock::new(),
            cgroup_note: registry.cgroup_note(id),
            registry: registry.clone(),
            _lock: lock,
        }
    }

    /// Makes the host's cgroup of the container's sandbox, which will be removed when the container has ended. There is none for
    /// who is not root.
    pub(crate) fn make_cgroup(
        &self,
        cgroups_path: &str,
        size: MachineSize,
        spec: &Spec,
    ) -> Result<Option<SandboxCgroup>, CgroupError> {
        let cgroup = cgroups::make(&self.cgroup_note, cgroups_path, size, spec)?;
        Ok(cgroup.map(|cgroup| self.cgroup.get_or_init(|| cgroup).clone()))
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
        self.settle(record, outcome)?;
        self.cgroup.get().map_or(Ok(()), |cgroup| cgroups::let_go(&self.cgroup_note, cgroup))
    }

    fn settle(&self, record: &Record, outcome: Option<Outcome>) -> Result<(), Failure> {
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
