//! The containers that this shim has, and the machine that they share.

use std::collections::HashMap;
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_sandbox::agent::AgentError;
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::errors::TaskError;
use crate::events::Publisher;
use crate::machine::Machine;
use crate::task::Task;
use bulkhead_sandbox::pod::{ErrorKind, PodError};

/// Name of the directory, in the pod's, that has a file for each container of the shim.
pub(crate) const CONTAINERS: &str = "containers";
/// How long a machine that does not answer any more may take to be known as ended: its VMM is torn down meanwhile.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// A shim.
pub(crate) struct Shim {
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// The pod's own directory.
    pub(crate) directory: PathBuf,
    /// Where events go.
    pub(crate) events: Publisher,
    /// True when an annotation says that there may be more containers.
    pub(crate) grouped: AtomicBool,
    /// The machine. The lock is held while it is made: only others that are created wait for that.
    pub(crate) machine: tokio::sync::Mutex<Option<Arc<Machine>>>,
    tasks: Mutex<HashMap<String, Arc<Task>>>,
    stop: Notify,
}

impl Shim {
    /// A shim without containers.
    pub(crate) fn new(namespace: String, directory: PathBuf, events: Publisher) -> Self {
        Self {
            namespace,
            directory,
            events,
            grouped: AtomicBool::new(false),
            machine: tokio::sync::Mutex::default(),
            tasks: Mutex::default(),
            stop: Notify::new(),
        }
    }

    /// The container of this id.
    pub(crate) fn task(&self, id: &str) -> Result<Arc<Task>, TaskError> {
        self.locked().get(id).cloned().ok_or(TaskError::NoContainer)
    }

    /// All containers.
    pub(crate) fn tasks(&self) -> Vec<Arc<Task>> {
        self.locked().values().cloned().collect()
    }

    /// Adds a container, whose id must be new.
    pub(crate) fn add(&self, task: &Arc<Task>) -> Result<(), TaskError> {
        let mut tasks = self.locked();
        if tasks.contains_key(&task.id) {
            return Err(TaskError::Exists(format!("container {}", task.id)));
        }
        if let Err(error) = fs::write(self.mark(&task.id), "") {
            // `delete` would take the shim for one without this container: it asks the shim then.
            tracing::warn!(%error, id = task.id, "cannot write down the container");
        }
        tasks.insert(task.id.clone(), Arc::clone(task));
        Ok(())
    }

    /// Removes a container, but not another one that has its id by now; true when none is left.
    pub(crate) fn remove(&self, task: &Task) -> bool {
        let mut tasks = self.locked();
        if tasks.get(&task.id).is_some_and(|known| std::ptr::eq(Arc::as_ptr(known), task)) {
            tasks.remove(&task.id);
            let _ = fs::remove_file(self.mark(&task.id));
        }
        tasks.is_empty()
    }

    /// True when nothing runs or can still be started, and nothing will.
    pub(crate) fn is_over(&self) -> bool {
        !self.grouped.load(Ordering::Relaxed)
            && self.locked().values().all(|task| task.init.state().exit().is_some())
    }

    /// True when there is no other container than this one.
    pub(crate) fn is_alone(&self, task: &Task) -> bool {
        self.locked().keys().all(|id| *id == task.id)
    }

    /// Ends the shim if it has no container.
    pub(crate) fn shut_down(&self) {
        if self.locked().is_empty() {
            self.stop.notify_one();
        }
    }

    /// Waits until the shim is to end.
    pub(crate) async fn is_shut_down(&self) {
        self.stop.notified().await;
    }

    fn mark(&self, id: &str) -> PathBuf {
        mark(&self.directory, id)
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<String, Arc<Task>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The file that stands for a container of the pod.
pub(crate) fn mark(directory: &Path, id: &str) -> PathBuf {
    directory.join(CONTAINERS).join(id)
}

/// Sees something through to its end whatever becomes of the client that asked for it: a client that goes away, or whose deadline has
/// come, takes its request with it.
pub(crate) async fn through<T: Send + 'static>(
    work: impl Future<Output = Result<T, TaskError>> + Send + 'static,
) -> Result<T, TaskError> {
    tokio::spawn(work).await.unwrap_or(Err(TaskError::State("do it: the shim failed".into())))
}

/// Has an error that only says that the guest is gone say why.
pub(crate) async fn explain(machine: &Machine, error: TaskError) -> TaskError {
    let is_gone = match &error {
        TaskError::Agent(error) => matches!(error, AgentError::Lost(_) | AgentError::Connect(_)),
        TaskError::Pod(error) => PodError::kind(error) == ErrorKind::Unavailable,
        TaskError::Io(_) => true,
        _ => false,
    };
    if !is_gone {
        return error;
    }
    match timeout(END_TIMEOUT, machine.over()).await {
        Ok(end) => TaskError::MachineGone(end.to_string()),
        Err(_) => error,
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_sandbox::agent::ProcessId;

    use super::*;
    use crate::io::Stdio;
    use crate::process::{Process, State};

    #[test]
    fn a_container_that_is_removed_late_does_not_take_a_later_one_of_its_name_along() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join(CONTAINERS)).unwrap();
        let shim = Shim::new("ns".into(), directory.path().into(), Publisher::new().0);
        let task = || {
            let init = Process::new(ProcessId::init("web"), Stdio::default(), State::Creating);
            Arc::new(Task::new("web".into(), directory.path().into(), init))
        };
        let (first, later) = (task(), task());
        shim.add(&first).unwrap();
        assert!(shim.add(&later).is_err());
        assert!(shim.remove(&first));
        shim.add(&later).unwrap();
        assert!(!shim.remove(&first));
        assert!(Arc::ptr_eq(&shim.task("web").unwrap(), &later));
        assert!(mark(directory.path(), "web").exists());
        assert!(shim.remove(&later));
        assert!(!mark(directory.path(), "web").exists());
    }
}
