//! Where this host keeps what is Bulkhead's.

use std::env;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

/// Environment variable that names another directory than `/var/lib/bulkhead`.
pub const ROOT_VARIABLE: &str = "BULKHEAD_ROOT";
/// Environment variable that names another directory than `/run/bulkhead`.
pub const RUN_VARIABLE: &str = "BULKHEAD_RUN";

/// The two roots of everything that is kept.
#[derive(Clone, Debug)]
pub struct Paths {
    /// What survives a reboot: images, logs, scratch disks.
    pub data: PathBuf,
    /// What does not: sockets, locks.
    pub run: PathBuf,
}

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// It cannot be made or looked at.
    #[error("cannot {0} the directory {1}")]
    Directory(&'static str, PathBuf, #[source] io::Error),
    /// Others could write to it.
    #[error(
        "{path} belongs to uid {owner} with mode {mode:04o}, but what is kept there needs a directory of uid {own} that nobody \
         else can write to: `chown {own}` and `chmod 700` it, or name another with {ROOT_VARIABLE} or {RUN_VARIABLE}"
    )]
    NotPrivate {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who may do what with it.
        mode: u32,
        /// Whose it should be.
        own: u32,
    },
}

impl Paths {
    /// `/var/lib/bulkhead` and `/run/bulkhead`, unless the environment names other directories.
    pub fn from_environment() -> Self {
        let root =
            |variable, default: &str| env::var_os(variable).map_or_else(|| default.into(), PathBuf::from);
        Self { data: root(ROOT_VARIABLE, "/var/lib/bulkhead"), run: root(RUN_VARIABLE, "/run/bulkhead") }
    }

    /// The store of images.
    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    /// What is kept of one of the launcher's containers until it is removed.
    pub fn container_data(&self, id: &str) -> PathBuf {
        self.data.join("containers").join(id)
    }

    /// What is kept of one of the launcher's containers while it runs.
    pub fn container_run(&self, id: &str) -> PathBuf {
        self.run.join(id)
    }

    /// What is kept of a shim's pod while it runs. `key` is short and has no `/`: the path of a socket in there is bounded.
    pub fn pod_run(&self, key: &str) -> PathBuf {
        self.run.join(".pods").join(key)
    }

    /// The directory with a lock file for each uid.
    pub fn uid_locks(&self) -> PathBuf {
        self.run.join(".uids")
    }

    /// The empty directory that every VMM and file server takes for its root, made if need be.
    ///
    /// # Errors
    /// [`PathError`].
    pub fn empty(&self) -> Result<PathBuf, PathError> {
        let empty = self.run.join(".empty");
        private_directory(&empty)?;
        Ok(empty)
    }
}

/// Makes a directory that nobody else can write to, or makes sure that one is.
///
/// # Errors
/// [`PathError`].
pub fn private_directory(path: &Path) -> Result<(), PathError> {
    let failed = |what| move |e| PathError::Directory(what, path.to_owned(), e);
    DirBuilder::new().mode(0o700).recursive(true).create(path).map_err(failed("make"))?;
    let found = fs::metadata(path).map_err(failed("examine"))?;
    let (owner, mode, own) = (found.uid(), found.mode() & 0o7777, geteuid().as_raw());
    if owner == own && mode & 0o022 == 0 {
        return Ok(());
    }
    Err(PathError::NotPrivate { path: path.to_owned(), owner, mode, own })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let set = |mode| fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
        for mode in [0o1777, 0o775, 0o702] {
            set(mode);
            let error = private_directory(dir.path()).unwrap_err();
            assert!(error.to_string().contains("chmod 700"), "{error}");
        }
        for mode in [0o755, 0o700] {
            set(mode);
            private_directory(dir.path()).unwrap();
        }
        // Of somebody else.
        let other = if geteuid().is_root() {
            std::os::unix::fs::chown(dir.path(), Some(1), None).unwrap();
            dir.path()
        } else {
            Path::new("/")
        };
        assert!(private_directory(other).is_err());
    }
}
