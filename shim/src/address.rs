//! Where a shim listens, and where it keeps what is its own: both follow from what containerd calls its pod.

use std::env;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use bulkhead_sandbox::paths::{PathError, Paths, private_directory};

/// Where containerd's shims have their sockets, unless it names another directory.
const SOCKETS: &str = "/run/containerd/s";
/// Environment variable that names another one, for tests.
const SOCKETS_VARIABLE: &str = "BULKHEAD_SHIM_SOCKETS";
/// Longest path of a socket, `sockaddr_un` with its zero byte.
const SOCKET_MAX: usize = 107;
/// Hexadecimal digits of the hash that a directory's name has: a socket in there must not get too long a path.
const KEY_LEN: usize = 32;
/// Name of the file in a bundle that holds the address.
const ADDRESS: &str = "address";

/// The addresses of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    /// The socket.
    pub(crate) socket: PathBuf,
    /// The directory of its own.
    pub(crate) directory: PathBuf,
}

/// Why there is no address.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AddressError {
    /// The socket's path is too long.
    #[error("the socket {0} has a path of more than {SOCKET_MAX} bytes")]
    Long(PathBuf),
    /// The sockets' directory cannot be made.
    #[error("cannot make the directory {0}")]
    Sockets(PathBuf, #[source] io::Error),
    /// The pod's directory cannot be used.
    #[error(transparent)]
    Directory(#[from] PathError),
    /// The address cannot be written to the bundle.
    #[error("cannot write the address to {0}")]
    Write(PathBuf, #[source] io::Error),
}

impl Address {
    /// The address of a group of containers. `containerd` is the path of containerd's socket, `sockets` the directory that containerd
    /// wants the socket in, if it says so.
    pub(crate) fn of(containerd: &str, namespace: &str, group: &str, sockets: Option<&str>) -> Self {
        let hash = hex(&Sha256::digest(join(&[containerd, namespace, group]).as_bytes()));
        let sockets = sockets.filter(|directory| !directory.is_empty()).map(PathBuf::from);
        let sockets = sockets.or_else(|| env::var_os(SOCKETS_VARIABLE).map(PathBuf::from));
        Self::with_hash(&hash, &sockets.unwrap_or_else(|| SOCKETS.into()))
    }

    fn with_hash(hash: &str, sockets: &Path) -> Self {
        let key = &hash[..KEY_LEN.min(hash.len())];
        Self { socket: sockets.join(hash), directory: Paths::from_environment().pod_run(key) }
    }

    /// The address that a bundle has, if it has one that could be ours.
    pub(crate) fn read(bundle: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(bundle.join(ADDRESS)).ok()?;
        let socket = Path::new(text.trim().strip_prefix("unix://")?);
        let hash = socket.file_name()?.to_str()?;
        let is_hash = hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hash.then(|| Self::with_hash(hash, socket.parent().unwrap_or(Path::new("/"))))
    }

    /// Writes it to a bundle, where containerd 1.7 looks for it after a restart.
    pub(crate) fn write(&self, bundle: &Path) -> Result<(), AddressError> {
        // In one step: a reader sees all or nothing.
        let (new, path) = (bundle.join(".address"), bundle.join(ADDRESS));
        let written = std::fs::write(&new, self.url()).and_then(|()| std::fs::rename(&new, &path));
        written.map_err(|error| AddressError::Write(path, error))
    }

    /// As containerd wants it.
    pub(crate) fn url(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Makes the directories.
    pub(crate) fn prepare(&self) -> Result<(), AddressError> {
        if self.socket.as_os_str().len() > SOCKET_MAX {
            return Err(AddressError::Long(self.socket.clone()));
        }
        let sockets = self.socket.parent().unwrap_or(Path::new("/"));
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o711).create(sockets);
        made.map_err(|error| AddressError::Sockets(sockets.to_owned(), error))?;
        private_directory(&self.directory)?;
        Ok(private_directory(&self.directory.join(crate::shim::CONTAINERS))?)
    }

    /// Nobody but root may speak to the shim.
    pub(crate) fn restrict(&self) -> io::Result<()> {
        std::fs::set_permissions(&self.socket, std::fs::Permissions::from_mode(0o600))
    }
}

/// Go's `filepath.Join`: joined by slashes, and cleaned as `filepath.Clean` does.
fn join(parts: &[&str]) -> String {
    let parts: Vec<&str> = parts.iter().copied().filter(|part| !part.is_empty()).collect();
    let joined = parts.join("/");
    let rooted = joined.starts_with('/');
    let mut clean: Vec<&str> = Vec::new();
    for part in joined.split('/') {
        match part {
            "" | "." => {}
            ".." if clean.last().is_some_and(|last| *last != "..") => drop(clean.pop()),
            ".." if rooted => {}
            part => clean.push(part),
        }
    }
    match (rooted, clean.join("/")) {
        (true, clean) => format!("/{clean}"),
        (false, clean) if clean.is_empty() && !joined.is_empty() => ".".into(),
        (false, clean) => clean,
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sockets_name_is_the_one_that_containerd_expects() {
        // printf /run/containerd/containerd.sock/default/web | sha256sum
        let address =
            Address::of("/run/containerd/containerd.sock", "default", "web", Some("/run/containerd/s"));
        assert_eq!(
            address.socket,
            Path::new("/run/containerd/s/2cde4450fa38c74f53603e01d2afd903b315a27a596f12a151414cd59897d883")
        );
        assert!(address.socket.as_os_str().len() <= 106);
        let elsewhere = Address::of("/run/containerd/containerd.sock", "default", "web", Some("/x"));
        assert_eq!(elsewhere.socket.file_name(), address.socket.file_name());
        assert_eq!(elsewhere.directory, address.directory);
    }

    #[test]
    fn paths_are_joined_as_go_does_it() {
        assert_eq!(join(&["/a//b/", "c", "d"]), "/a/b/c/d");
        assert_eq!(join(&["/a", "..", "../b"]), "/b");
        assert_eq!(join(&["", "a", "./b"]), "a/b");
        assert_eq!(join(&["", ""]), "");
        assert_eq!(join(&["a", ".."]), ".");
    }

    #[test]
    fn what_a_bundle_holds_is_found_again_and_anything_else_is_not() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(Address::read(bundle.path()), None);
        let address = Address::of("", "n", "id", Some("/s"));
        address.write(bundle.path()).unwrap();
        assert_eq!(Address::read(bundle.path()), Some(address));
        for text in ["", "unix:///s/abc", "/s/x", "unix:///s/../../../../etc/passwd"] {
            std::fs::write(bundle.path().join(ADDRESS), text).unwrap();
            assert_eq!(Address::read(bundle.path()), None, "{text}");
        }
    }
}
