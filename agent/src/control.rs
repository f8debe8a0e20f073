//! What a container may have and whether its processes go on: calls that change its cgroup and no process.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::limits::CALL_TIMEOUT_S;
use rustix::io::Errno;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::cgroup::limits::Limits;
use crate::cgroup::{self, Cgroup};
use crate::lifecycle::{Error, Lifecycle};
use crate::process::{Error as TableError, State};
use crate::zygote::protocol::{Failure, FailureKind};

/// How long a container's processes may take to stop or to go on: a little less than the host waits for it. One that does not
/// return from a system call, because its disk does not answer, does not stop.
const FREEZE_PATIENCE: Duration = Duration::from_secs(CALL_TIMEOUT_S - 2);

impl Lifecycle {
    /// Changes the limits that `resources` mentions, in JSON. They hold when this returns.
    pub(crate) async fn update(self: Arc<Self>, id: String, resources: Vec<u8>) -> Result<(), Error> {
        let limits = Limits::parse(&resources)?;
        self.table.require(&id, &[State::Created, State::Starting, State::Running])?;
        // A limit below what is used makes the kernel reclaim, or kill, before the write returns.
        let applied = spawn_blocking(move || limits.apply(&Cgroup::of(&id))).await;
        Ok(applied.map_err(|error| Error::Io("change the limits", error.into()))??)
    }

    /// Stops all processes of a container, those included that an exec is about to make. When that fails, they go on.
    pub(crate) async fn pause(self: Arc<Self>, id: String) -> Result<(), Error> {
        self.table.set_paused(&id, true)?;
        let result = freeze(&id, true).await;
        if result.is_err() {
            // It may have ended.
            let _ = self.table.set_paused(&id, false);
            if let Err(error) = Cgroup::of(&id).freeze(false) {
                tracing::error!("let container {id} go on: {}", crate::chain(&error));
            }
        }
        result
    }

    /// Has the processes of a container go on.
    pub(crate) async fn resume(self: Arc<Self>, id: String) -> Result<(), Error> {
        self.table.require(&id, &[State::Running])?;
        freeze(&id, false).await?;
        // It may have ended since.
        let _ = self.table.set_paused(&id, false);
        Ok(())
    }

    /// Returns when the kernel has killed more than `known` processes of a container for want of memory, and how many.
    pub(crate) async fn more_oom_kills(&self, id: &str, known: u64) -> Result<u64, Error> {
        let removal = self.table.removal(id)?;
        self.table.require(
            id,
            &[State::Created, State::Starting, State::Running, State::Stopped, State::Removing],
        )?;
        let removed = || Error::Table(TableError::NoContainer(id.to_owned()));
        let cgroup = Cgroup::of(id);
        tokio::select! {
            () = removal => Err(removed()),
            kills = cgroup.more_oom_kills(known) => match kills {
                Err(cgroup::Error::Read(_, error)) if is_gone(&error) => Err(removed()),
                other => Ok(other?),
            }
        }
    }
}

async fn freeze(id: &str, frozen: bool) -> Result<(), Error> {
    let cgroup = Cgroup::of(id);
    cgroup.freeze(frozen)?;
    let done = timeout(FREEZE_PATIENCE, async { Ok(cgroup.frozen(frozen).await?) }).await;
    done.unwrap_or_else(|_| {
        let what = if frozen { "stop" } else { "go on" };
        let text = format!("the processes of container {id} did not {what} within {FREEZE_PATIENCE:?}");
        Err(Failure::new(FailureKind::Timeout, text).into())
    })
}

/// Whether a file of a group could not be read because the group is no more.
fn is_gone(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NODEV | Errno::NOENT))
}
