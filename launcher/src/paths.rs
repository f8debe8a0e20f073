//! Where containers are kept.

use std::env;
use std::path::PathBuf;

/// The two roots of everything that is kept.
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    /// What survives a reboot: images, logs, scratch disks.
    pub(crate) data: PathBuf,
    /// What does not: sockets, locks.
    pub(crate) run: PathBuf,
}

impl Paths {
    /// `/var/lib/bulkhead` and `/run/bulkhead`, unless `BULKHEAD_ROOT` and `BULKHEAD_RUN` name other directories.
    pub(crate) fn from_environment() -> Self {
        let root =
            |variable, default: &str| env::var_os(variable).map_or_else(|| default.into(), PathBuf::from);
        Self { data: root("BULKHEAD_ROOT", "/var/lib/bulkhead"), run: root("BULKHEAD_RUN", "/run/bulkhead") }
    }

    /// The store of images.
    pub(crate) fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    /// What is kept of one container until it is removed.
    pub(crate) fn container_data(&self, id: &str) -> PathBuf {
        self.data.join("containers").join(id)
    }

    /// What is kept of one container while it runs.
    pub(crate) fn container_run(&self, id: &str) -> PathBuf {
        self.run.join(id)
    }

    /// The directory with a lock file for each uid.
    pub(crate) fn uid_locks(&self) -> PathBuf {
        self.run.join(".uids")
    }

    /// The empty directory that every VMM takes for its root.
    pub(crate) fn empty(&self) -> PathBuf {
        self.run.join(".empty")
    }
}
