//! The shim as a process of its own: how it is started, how others know that it lives, and how it ends.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, open, stat};
use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};
use rustix::process::{getppid, setsid};

use crate::address::Address;
use crate::args::Args;
use crate::record::Recorded;
use crate::shim::CONTAINERS;

/// Name of the file, in the pod's directory, that a shim has locked for as long as it lives. It names its process.
const LOCK: &str = "shim";
/// Name of the file that whoever starts a shim, or cleans up after one, has locked meanwhile.
const TURN: &str = "turn";

/// How long a shim that ends may take before another one is started in its place: containerd waits longer for a start.
const END_TIMEOUT: Duration = Duration::from_secs(4);
/// How long is waited before a lock is tried again: one that is waited for until a deadline has no event.
const TURN_PAUSE: Duration = Duration::from_millis(2);

/// Why there is no process.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    /// A lock cannot be had.
    #[error("cannot lock {0}")]
    Lock(PathBuf, #[source] io::Error),
    /// Somebody else has a lock for too long.
    #[error("cannot lock {0} in time: another start or delete of this container has it")]
    Busy(PathBuf),
    /// A shim lives that does not listen.
    #[error("a shim of this container lives (its lock is {0}), but does not listen any more")]
    Lives(PathBuf),
    /// It cannot be started.
    #[error("cannot start the shim's process")]
    Spawn(#[source] io::Error),
    /// What it should have been given is missing.
    #[error("descriptor {0} is not what `start` passes on: this is run by `start` alone")]
    Descriptor(RawFd, #[source] io::Error),
}

/// Waits for one's turn to start or clean up. Nothing when the directory has been removed meanwhile.
pub(crate) fn turn(directory: &Path) -> Result<Option<OwnedFd>, DaemonError> {
    take_turn(directory, FlockOperation::LockExclusive)
}

/// The same, but only until a deadline.
pub(crate) fn turn_until(directory: &Path, deadline: Instant) -> Result<Option<OwnedFd>, DaemonError> {
    loop {
        let turn = try_turn(directory)?;
        if turn.is_some() || !directory.exists() {
            return Ok(turn);
        }
        if Instant::now() >= deadline {
            return Err(DaemonError::Busy(directory.join(TURN)));
        }
        sleep(TURN_PAUSE);
    }
}

/// The same, and nothing when it is somebody else's turn.
fn try_turn(directory: &Path) -> Result<Option<OwnedFd>, DaemonError> {
    take_turn(directory, FlockOperation::NonBlockingLockExclusive)
}

fn take_turn(directory: &Path, how: FlockOperation) -> Result<Option<OwnedFd>, DaemonError> {
    let path = directory.join(TURN);
    let failed = |errno: Errno| DaemonError::Lock(path.clone(), errno.into());
    let file = match lock_file(&path) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(failed(errno)),
    };
    match flock(&file, how) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(None),
        Err(errno) => return Err(failed(errno)),
    }
    // Who had it before may have removed it.
    let locked = fstat(&file).map_err(failed)?;
    match stat(&path) {
        Ok(there) if (there.st_dev, there.st_ino) == (locked.st_dev, locked.st_ino) => Ok(Some(file)),
        Ok(_) | Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(failed(errno)),
    }
}

/// Whether the shim of a directory lives.
#[derive(Debug)]
pub(crate) enum Life {
    /// It does, as this process.
    Lives(Option<Recorded>),
    /// It does not; and while this is kept, none will.
    Gone(OwnedFd),
}

/// Waits until the shim of a directory lives no longer, or for the deadline.
pub(crate) fn wait_for_end(directory: &Path, deadline: Instant) -> Result<Life, DaemonError> {
    loop {
        let life = life(directory)?;
        if matches!(life, Life::Gone(_)) || Instant::now() >= deadline {
            return Ok(life);
        }
        sleep(TURN_PAUSE);
    }
}

/// Looks whether the shim of a directory lives.
pub(crate) fn life(directory: &Path) -> Result<Life, DaemonError> {
    let path = directory.join(LOCK);
    let failed = |errno: Errno| DaemonError::Lock(path.clone(), errno.into());
    let file = lock_file(&path).map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Life::Gone(file)),
        Err(Errno::WOULDBLOCK) => Ok(Life::Lives(crate::record::read(&path))),
        Err(errno) => Err(failed(errno)),
    }
}

/// Removes what is left of a `start` that has failed or of a shim that has ended, unless a shim lives there, or it is somebody else's
/// turn until the deadline.
pub(crate) fn abandon(address: &Address, deadline: Instant) {
    let directory = &address.directory;
    // What cannot be removed is what the next `start` or `delete` finds.
    match turn_until(directory, deadline) {
        Ok(Some(_turn)) => {
            // Not made for the look: there may be no room for it.
            let is_gone = !directory.join(LOCK).exists() || matches!(life(directory), Ok(Life::Gone(_)));
            if is_gone {
                let _ = fs::remove_file(&address.socket);
                let _ = remove_directory(directory);
            }
        }
        Ok(None) | Err(DaemonError::Busy(_)) => {}
        // Where nobody can have a turn, nobody has had one, or it is not empty.
        Err(_) => {
            let _ = fs::remove_dir(directory.join(CONTAINERS));
            let _ = fs::remove_dir(directory);
        }
    }
}

/// Removes a pod's directory. It has another name first: whoever looks for a turn meanwhile must not make its file in half a directory.
///
/// # Errors
/// When it cannot be removed.
pub(crate) fn remove_directory(directory: &Path) -> io::Result<()> {
    remove_rest(directory);
    fs::rename(directory, half_removed(directory))?;
    remove_rest(directory);
    Ok(())
}

/// Removes what somebody else has begun to remove, and may not have come to the end of.
pub(crate) fn remove_rest(directory: &Path) {
    // Who had the directory open before it changed its name may still make a file in it, once.
    for _ in 0..2 {
        if fs::remove_dir_all(half_removed(directory)).is_ok() {
            return;
        }
    }
}

fn half_removed(directory: &Path) -> PathBuf {
    directory.with_extension("removed")
}

fn lock_file(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    open(path, flags, Mode::RUSR | Mode::WUSR)
}

/// Starts the process. It has the lock before this returns, and takes part in neither our session nor our standard streams.
pub(crate) fn spawn(
    args: &Args,
    group: &str,
    bundle: &Path,
    directory: &Path,
    listener: UnixListener,
    debug: bool,
) -> Result<(), DaemonError> {
    // One that lives does not listen any more, so it is about to end.
    let Life::Gone(lock) = wait_for_end(directory, Instant::now() + END_TIMEOUT)? else {
        return Err(DaemonError::Lives(directory.join(LOCK)));
    };
    let listener = OwnedFd::from(listener);
    // By its own name, unless it has been replaced meanwhile: then it is the file that runs now.
    let executable = std::env::current_exe().ok().filter(|path| path.exists());
    let mut command = Command::new(executable.unwrap_or_else(|| "/proc/self/exe".into()));
    command.current_dir("/");
    command.args(["-namespace", &args.namespace, "-id", group, "-address", &args.address]);
    command.arg("-listener-fd").arg(listener.as_raw_fd().to_string());
    command.arg("-lock-fd").arg(lock.as_raw_fd().to_string());
    command.arg("-bundle").arg(bundle).arg(if debug { "-debug=true" } else { "-debug=false" });
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let passed = [listener.as_raw_fd(), lock.as_raw_fd()];
    // SAFETY: the closure runs in the forked child and makes system calls alone, on descriptors that the child has copies of: the
    // parent closes its own only after `spawn` has returned.
    unsafe {
        command.pre_exec(move || {
            setsid()?;
            for fd in passed {
                fcntl_setfd(BorrowedFd::borrow_raw(fd), FdFlags::empty())?;
            }
            Ok(())
        });
    }
    let child = command.spawn().map_err(DaemonError::Spawn)?;
    // Both go on without us: the listener and the lock are the child's.
    let recorded = Recorded::of(child.id()).and_then(|child| fs::write(directory.join(LOCK), child.line()));
    if let Err(error) = recorded {
        tracing::warn!(%error, "cannot write down the shim's process id");
    }
    protect(child.id());
    Ok(())
}

/// Makes the shim the next after containerd when memory runs out, as runc's shim does: where containerd's children are killed, it is
/// the shims before containerd.
fn protect(child: u32) {
    let score = || -> Option<i32> {
        let parent = getppid()?.as_raw_nonzero();
        fs::read_to_string(format!("/proc/{parent}/oom_score_adj")).ok()?.trim().parse().ok()
    };
    if let Some(score) = score() {
        let score = score.saturating_add(1).min(1000);
        // Without the privilege to lower it, it stays what it is.
        let _ = fs::write(format!("/proc/{child}/oom_score_adj"), score.to_string());
    }
}

/// Takes over what `start` has passed on: the listener and the lock.
pub(crate) fn take_over(listener: RawFd, lock: RawFd) -> Result<(UnixListener, OwnedFd), DaemonError> {
    let take = |fd: RawFd| {
        // SAFETY: looks at a number, and only whether it is a descriptor.
        let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(fd) });
        let failed = |errno: Errno| DaemonError::Descriptor(fd, errno.into());
        let flags = flags.map_err(failed)?;
        if flags.contains(FdFlags::CLOEXEC) {
            // One of our own making: an inherited descriptor does not have this.
            return Err(failed(Errno::BADF));
        }
        // SAFETY: the descriptor is open, was inherited, and nothing else here knows its number.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        fcntl_setfd(&owned, FdFlags::CLOEXEC).map_err(failed)?;
        Ok(owned)
    };
    let (listener_fd, lock_fd) = (listener, lock);
    let (listener, lock) = (take(listener)?, take(lock)?);
    let not_listening = |errno: Errno| DaemonError::Descriptor(listener_fd, errno.into());
    if !rustix::net::sockopt::socket_acceptconn(&listener).map_err(not_listening)? {
        return Err(not_listening(Errno::INVAL));
    }
    let listener = UnixListener::from(listener);
    listener.set_nonblocking(true).map_err(|error| DaemonError::Descriptor(listener_fd, error))?;
    let lock_file = File::from(lock);
    lock_file.metadata().map_err(|error| DaemonError::Descriptor(lock_fd, error))?;
    Ok((listener, lock_file.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shim_lives_for_as_long_as_somebody_has_its_lock() {
        let directory = tempfile::tempdir().unwrap();
        let Life::Gone(lock) = life(directory.path()).unwrap() else { panic!("nobody lives there") };
        let recorded = Recorded::of(std::process::id()).unwrap();
        fs::write(directory.path().join(LOCK), recorded.line()).unwrap();
        let Life::Lives(found) = life(directory.path()).unwrap() else { panic!("it is locked") };
        assert_eq!(found, Some(recorded));
        drop(lock);
        assert!(matches!(life(directory.path()).unwrap(), Life::Gone(_)));
    }

    #[test]
    fn a_turn_that_somebody_else_has_is_waited_for_until_the_deadline() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("pod");
        // There is nothing to clean up.
        assert!(turn_until(&directory, Instant::now()).unwrap().is_none());
        fs::create_dir(&directory).unwrap();
        let turn = turn(&directory).unwrap().unwrap();
        let waiting = {
            let directory = directory.clone();
            std::thread::spawn(move || turn_until(&directory, Instant::now() + Duration::from_mins(1)))
        };
        assert!(matches!(turn_until(&directory, Instant::now()), Err(DaemonError::Busy(_))));
        drop(turn);
        assert!(waiting.join().unwrap().unwrap().is_some());
    }

    #[test]
    fn a_start_that_fails_leaves_nothing_but_a_shim_that_lives() {
        let root = tempfile::tempdir().unwrap();
        let address = Address { socket: root.path().join("socket"), directory: root.path().join("pod") };
        fs::create_dir_all(address.directory.join(CONTAINERS)).unwrap();
        fs::write(&address.socket, "").unwrap();
        let Life::Gone(lock) = life(&address.directory).unwrap() else { panic!("nobody lives there") };
        abandon(&address, Instant::now());
        assert!(address.directory.exists() && address.socket.exists());
        drop(lock);
        abandon(&address, Instant::now());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        // Nor does it make anything.
        abandon(&address, Instant::now());
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_no_inherited_listener_is_not_taken_over() {
        assert!(matches!(take_over(900, 901), Err(DaemonError::Descriptor(900, _))));
        let file = File::open("/dev/null").unwrap();
        // Of our own making.
        assert!(take_over(file.as_raw_fd(), 901).is_err());
    }
}
