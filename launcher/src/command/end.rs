//! `stop`, `kill` and `rm`: how containers end and are forgotten.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use bulkhead_sandbox::agent::{Agent, AgentError, ProcessId};
use bulkhead_sandbox::paths::Paths;
use bulkhead_sandbox::watch::watch;
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::cli::{KillArgs, RmArgs, StopArgs};
use crate::container::registry::{Container, Registry, State};
use crate::failure::Failure;
use crate::message;
use crate::{runtime, signal};

const SIGKILL: u32 = 9;
/// How long a container that was killed, and its launcher, may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Asks containers to end; kills those that do not.
pub(crate) fn stop(args: &StopArgs) -> Result<u8, Failure> {
    let registry = Registry::open(&Paths::from_environment())?;
    let grace = Duration::from_secs(args.grace.into());
    Ok(each(&args.containers, |reference| {
        let container = registry.find(reference)?;
        runtime::block_on(end(&registry, &container, container.record.stop_signal, grace))
    }))
}

/// Sends a signal to containers.
pub(crate) fn kill(args: &KillArgs) -> Result<u8, Failure> {
    let registry = Registry::open(&Paths::from_environment())?;
    let number = signal::parse(&args.signal)?;
    Ok(each(&args.containers, |reference| {
        let container = registry.find(reference)?;
        if !matches!(container.state, State::Live(_)) {
            return Err(Failure::new(format!("container {} does not run", container.record.name)));
        }
        if number == SIGKILL {
            return runtime::block_on(end(&registry, &container, SIGKILL, KILL_TIMEOUT));
        }
        let sent = runtime::block_on(async {
            Ok(send(&registry.socket(&container.record.id), &container.record.id, number).await?)
        });
        sent.map_err(|e| e.context(&format!("cannot send a signal to container {}", container.record.name)))
    }))
}

/// Forgets containers.
pub(crate) fn rm(args: &RmArgs) -> Result<u8, Failure> {
    let registry = Registry::open(&Paths::from_environment())?;
    Ok(each(&args.containers, |reference| {
        let container = registry.find(reference)?;
        if args.force {
            runtime::block_on(end(&registry, &container, SIGKILL, KILL_TIMEOUT))?;
        }
        registry.remove(&container.record.id)
    }))
}

/// Does the same to every container, and says which it was done to. One failure does not keep others from their turn.
fn each(references: &[String], action: impl Fn(&str) -> Result<(), Failure>) -> u8 {
    let mut worst = 0;
    for reference in references {
        match action(reference) {
            Ok(()) => message::result(&format!("{reference}\n")),
            Err(failure) => {
                message::error(&failure.to_string());
                worst = 1;
            }
        }
    }
    worst
}

/// Brings a container to its end: by a signal, then by SIGKILL, then by killing its launcher and its VMM.
async fn end(
    registry: &Registry,
    container: &Container,
    signal: u32,
    grace: Duration,
) -> Result<(), Failure> {
    let Some(supervisor) = registry.supervisor(container)? else { return Ok(()) };
    // Taken now, while it is known to be the launcher's own.
    let vmm = registry.vmm(container)?;
    let supervisor = watch(supervisor, Interest::READABLE)?;
    let (id, socket) = (&container.record.id, registry.socket(&container.record.id));
    for (signal, patience) in [(signal, grace), (SIGKILL, KILL_TIMEOUT)] {
        match send(&socket, id, signal).await {
            // A process that has ended already takes no signal, and its launcher is about to end.
            Ok(()) | Err(AgentError::Refused { .. }) => {}
            // Nobody there to pass the signal on.
            Err(error) => {
                tracing::debug!(%error, "killing the launcher");
                break;
            }
        }
        if timeout(patience, supervisor.readable()).await.is_ok() {
            return Ok(());
        }
    }
    kill_supervisor(&supervisor, vmm.as_ref()).await?;
    // Cleans up after it.
    registry.list().map(drop)
}

/// Kills a launcher, and its VMM: one that was taken over would not end with it.
async fn kill_supervisor(supervisor: &AsyncFd<OwnedFd>, vmm: Option<&OwnedFd>) -> Result<(), Failure> {
    for process in [Some(supervisor.get_ref()), vmm].into_iter().flatten() {
        match pidfd_send_signal(process, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(errno) => return Err(Failure::from(errno).context("cannot kill the container's processes")),
        }
    }
    match timeout(KILL_TIMEOUT, supervisor.readable()).await {
        Ok(_) => Ok(()),
        Err(_) => Err(Failure::new("the container's launcher does not end although it was killed")),
    }
}

async fn send(socket: &Path, id: &str, signal: u32) -> Result<(), AgentError> {
    Agent::connect(socket).await?.signal(&ProcessId::init(id), signal).await
}
