//! `start`: the address of the shim that serves a container, which is started if there is none yet.
//!
//! containerd takes both standard output and standard error for the answer, so nothing else is written, and waits until nobody has
//! either of them open any more.

use std::fs;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::address::{Address, AddressError};
use crate::args::Args;
use crate::bootstrap::{self, Bootstrap};
use crate::daemon::{self, DaemonError};
use bulkhead_sandbox::oci::{self, SpecError};

/// Why there is no shim.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    /// The bundle cannot be used.
    #[error("the bundle cannot be used")]
    Bundle(#[from] SpecError),
    /// The working directory is gone.
    #[error("cannot tell the bundle's directory")]
    Directory(#[source] io::Error),
    /// No address.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// No socket.
    #[error("cannot listen on {0}")]
    Listen(PathBuf, #[source] io::Error),
    /// No process.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
}

/// Finds or starts the shim of a container. Returns what containerd is answered.
pub(crate) fn start(args: &Args) -> Result<String, StartError> {
    let bootstrap = Bootstrap::read(args);
    let bundle = std::env::current_dir().map_err(StartError::Directory)?;
    let group = oci::group(&oci::read_spec(&bundle)?, &args.id);
    let address = Address::of(&args.address, &args.namespace, &group, bootstrap.socket_dir.as_deref());
    let ensured = ensure(args, &group, &bundle, &address, args.debug || bootstrap.debug);
    if ensured.is_err() {
        // containerd runs no `delete` after a `start` that has failed.
        daemon::abandon(&address, Instant::now());
    }
    ensured.map(|()| bootstrap::reply(bootstrap.version, &address.url()))
}

/// Starts the shim of a group, unless it serves already.
fn ensure(args: &Args, group: &str, bundle: &Path, address: &Address, debug: bool) -> Result<(), StartError> {
    // Two that start for one pod at a time must not take each other's socket for one that was left behind.
    let _turn = loop {
        address.prepare()?;
        // Only a shim that has just ended, or a `delete`, takes the directory away from under us, and does so once.
        if let Some(turn) = daemon::turn(&address.directory)? {
            break turn;
        }
    };
    // Before there is a shim that nobody would hear of if this failed.
    address.write(bundle)?;
    let failed = |error| StartError::Listen(address.socket.clone(), error);
    if let Some(listener) = listen(&address.socket).map_err(failed)? {
        address.restrict().map_err(failed)?;
        daemon::spawn(args, group, bundle, &address.directory, listener, debug)?;
    }
    Ok(())
}

/// A socket to listen on; nothing when somebody listens there already.
fn listen(path: &Path) -> io::Result<Option<UnixListener>> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        bound => return bound.map(Some),
    }
    match UnixStream::connect(path) {
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) => return Err(error),
    }
    // Left behind by a shim that was killed.
    fs::remove_file(path)?;
    UnixListener::bind(path).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_that_was_left_behind_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = listen(&path).unwrap().unwrap();
        assert!(listen(&path).unwrap().is_none());
        drop(listener);
        assert!(path.exists());
        assert!(listen(&path).unwrap().is_some());
    }
}
