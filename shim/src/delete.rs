//! `delete`: what is left of a container is removed, whether its shim lives, is about to end, or was killed.
//!
//! containerd runs this after every deletion, not only when a shim has died, and gives it five seconds. It takes one at most, so
//! that a hundred containers that are left over do not hold up a containerd that starts.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::api::{DeleteRequest, DeleteResponse};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use protobuf::MessageField;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{UnmountFlags, unmount};
use tokio::net::UnixStream;
use tokio::time::timeout;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context;

use crate::address::Address;
use crate::args::Args;
use crate::daemon::{self, DaemonError, Life};
use crate::process::KILLED;
use crate::record::{self, Recorded};
use crate::service::ABANDONED;
use crate::shim::{CONTAINERS, mark};
use bulkhead_sandbox::cgroup::SandboxCgroup;
use bulkhead_sandbox::oci;

/// How long everything that is waited for may take together: a turn, processes that have been killed or are about to end, a shim's
/// answer, a cgroup that gets empty.
const PATIENCE: Duration = Duration::from_millis(800);

/// Why something may be left.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeleteError {
    /// The locks cannot be had.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The working directory is gone.
    #[error("cannot tell the bundle's directory: say it with -bundle")]
    Directory(#[source] io::Error),
    /// Files cannot be removed.
    #[error("cannot remove {0}")]
    Remove(PathBuf, #[source] io::Error),
}

/// Removes what is left of a container. Done again, it does nothing.
pub(crate) fn delete(args: &Args) -> Result<DeleteResponse, DeleteError> {
    let deadline = Instant::now() + PATIENCE;
    let bundle = if args.bundle.as_os_str().is_empty() {
        std::env::current_dir().map_err(DeleteError::Directory)?
    } else {
        args.bundle.clone()
    };
    let address = Address::read(&bundle).unwrap_or_else(|| {
        // A bundle that cannot be read any more had no pod.
        let group =
            oci::read_spec(&bundle).map_or_else(|_| args.id.clone(), |spec| oci::group(&spec, &args.id));
        Address::of(&args.address, &args.namespace, &group, None)
    });
    let cleaned = if address.directory.exists() {
        clean(&address, &args.id, deadline)?
    } else {
        Cleaned { pid: None, shim_is_gone: true }
    };
    // A shim that was killed, or is about to end, may be in the middle of it.
    daemon::remove_rest(&address.directory);
    if cleaned.shim_is_gone {
        // A shim that has ended by itself may have had no time for it.
        remove_cgroup(&bundle, deadline);
    }
    // Bulkhead mounts nothing there; whoever did is not to be hindered by it.
    let _ = unmount(bundle.join("rootfs"), UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    Ok(DeleteResponse {
        pid: cleaned.pid.unwrap_or(0),
        exit_status: KILLED,
        exited_at: MessageField::some(SystemTime::now().into()),
        ..Default::default()
    })
}

/// What came of cleaning up.
#[derive(Default)]
struct Cleaned {
    /// The process id that the container had.
    pid: Option<u32>,
    /// Nobody uses what was the shim's any more.
    shim_is_gone: bool,
}

/// Cleans up a pod's directory, as far as the container goes.
fn clean(address: &Address, id: &str, deadline: Instant) -> Result<Cleaned, DeleteError> {
    let directory = &address.directory;
    let Some(turn) = daemon::turn_until(directory, deadline)? else { return Ok(Cleaned::default()) };
    let vmm = record::read(&directory.join(record::VMM));
    let pid = vmm.map(Recorded::pid);
    let mut life = daemon::life(directory)?;
    let mut ending = None;
    if let Life::Lives(shim) = &life {
        let own = mark(directory, id).exists();
        ending = match (own, has_others(directory, id)) {
            (false, true) => return Ok(Cleaned { pid, shim_is_gone: false }),
            (true, true) => {
                ask(&address.socket, id, deadline);
                return Ok(Cleaned { pid, shim_is_gone: false });
            }
            // Nothing is left for it but this container.
            (true, false) => shim.and_then(Recorded::kill),
            // It has been told to end, or will be used by the next container of its pod.
            (false, false) => shim.and_then(Recorded::open),
        };
        life = daemon::wait_for_end(directory, deadline)?;
    }
    let Life::Gone(_lock) = life else { return Ok(Cleaned { pid, shim_is_gone: false }) };
    // They end by themselves when the shim does, unless they hang.
    let file_server = record::read(&directory.join(record::FILE_SERVER));
    let gone: Vec<OwnedFd> = [vmm, file_server].into_iter().flatten().filter_map(Recorded::kill).collect();
    for process in &gone {
        wait(process, deadline);
    }
    for (path, removed) in [
        (&address.socket, fs::remove_file(&address.socket)),
        (directory, daemon::remove_directory(directory)),
    ] {
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(DeleteError::Remove(path.clone(), error));
            }
            _ => {}
        }
    }
    // It may have waited for its turn itself.
    drop(turn);
    if let Some(shim) = ending {
        wait(&shim, deadline);
    }
    Ok(Cleaned { pid, shim_is_gone: true })
}

/// Removes the host's cgroup of a machine whose shim did not come to it. Nothing in it is killed by that: the configuration may have named
/// a group that others are in.
fn remove_cgroup(bundle: &Path, deadline: Instant) {
    let Ok(spec) = oci::read_spec(bundle) else { return };
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref()?.to_str());
    let Some(Ok(cgroup)) = path.map(SandboxCgroup::of) else { return };
    // What does not end keeps it, and so does whoever else is in it.
    cgroup.remove(left(deadline));
}

/// True when the shim has other containers than this one.
fn has_others(directory: &Path, id: &str) -> bool {
    let names = fs::read_dir(directory.join(CONTAINERS)).into_iter().flatten().flatten();
    names.map(|entry| entry.file_name()).any(|name| name != *id)
}

/// What is left of the time.
fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Waits, until the deadline, for the end of a process.
fn wait(process: &OwnedFd, deadline: Instant) {
    let timeout = Timespec::try_from(left(deadline)).unwrap_or_default();
    // One that has not ended by then is in the kernel's hands.
    let _ = poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&timeout));
}

/// Has a shim that lives end and delete a container. It goes on with that when it takes longer than there is time here.
fn ask(socket: &Path, id: &str, deadline: Instant) {
    let asking = async {
        let client = TaskClient::new(Client::new(Socket::from(UnixStream::connect(socket).await?)));
        let mut context = context::with_duration(left(deadline));
        context.add(ABANDONED.into(), "yes".into());
        let delete = DeleteRequest { id: id.into(), ..Default::default() };
        let _ = client.delete(context, &delete).await;
        io::Result::Ok(())
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    // What the shim does not do, nobody else can without ending the other containers.
    let _ = runtime.map(|runtime| runtime.block_on(async { timeout(left(deadline), asking).await }));
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::process::{Pid, PidfdFlags, pidfd_open};

    use super::*;

    #[test]
    fn all_waits_end_with_one_deadline() {
        let root = tempfile::tempdir().unwrap();
        let address = Address { socket: root.path().join("socket"), directory: root.path().join("pod") };
        fs::create_dir_all(address.directory.join(CONTAINERS)).unwrap();
        let over = Instant::now();
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        wait(&pidfd, over);
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        // It listens, and never answers.
        let _listener = std::os::unix::net::UnixListener::bind(&address.socket).unwrap();
        ask(&address.socket, "web", over);
        let turn = daemon::turn(&address.directory).unwrap();
        let error = clean(&address, "web", over).err().unwrap();
        assert!(matches!(error, DeleteError::Daemon(DaemonError::Busy(_))), "{error}");
        drop(turn);
        // What needs no waiting is done all the same.
        assert!(clean(&address, "web", over).unwrap().shim_is_gone);
        assert!(!address.directory.exists() && !address.socket.exists());
    }

    /// In a process of its own: what another test forks has copies of all locks until it runs its program.
    #[test]
    fn a_shim_and_a_delete_that_end_together_leave_nothing() {
        let mut alone = Command::new(std::env::current_exe().unwrap());
        alone.args(["--exact", "delete::tests::they_end_together", "--ignored"]);
        let output = alone.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
    }

    #[test]
    #[ignore = "run by another test, in a process in which nothing else happens"]
    fn they_end_together() {
        let root = tempfile::tempdir().unwrap();
        let address = Address { socket: root.path().join("socket"), directory: root.path().join("pod") };
        for round in 0..400 {
            fs::create_dir_all(address.directory.join(CONTAINERS)).unwrap();
            let Life::Gone(lock) = daemon::life(&address.directory).unwrap() else {
                panic!("nobody lives there")
            };
            let ending = {
                let address = address.clone();
                // As a shim does at its end.
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_micros(round % 100 * 30));
                    drop(lock);
                    daemon::abandon(&address, Instant::now() + Duration::from_mins(1));
                })
            };
            // It has little time to wait for the shim, which may be at any point of its end.
            match clean(&address, "web", Instant::now() + Duration::from_millis(1)) {
                Ok(_) | Err(DeleteError::Daemon(DaemonError::Busy(_))) => {}
                Err(error) => panic!("{error}"),
            }
            ending.join().unwrap();
            assert!(!address.directory.exists());
        }
    }
}
