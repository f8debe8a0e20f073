//! One container: its first process, its execs, and what is known of it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bulkhead_protocol::limits::EXECS_MAX;
use tokio::sync::watch;

use crate::errors::TaskError;
use crate::machine::Machine;
use crate::process::Process;

/// A container.
pub(crate) struct Task {
    /// containerd's name for it, and the agent's.
    pub(crate) id: String,
    /// Where its configuration is.
    pub(crate) bundle: PathBuf,
    /// Its first process.
    pub(crate) init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    machine: OnceLock<Arc<Machine>>,
    /// Set when the creation is to be given up.
    killed: watch::Sender<bool>,
    /// The first process has ended, though that may not have been published yet.
    pub(crate) init_ended: AtomicBool,
    /// An out-of-memory event has been published.
    pub(crate) oom_told: AtomicBool,
    /// It has been deleted. Locked by whoever does so.
    pub(crate) deleted: tokio::sync::Mutex<bool>,
    /// The guest holds nothing of it any more.
    released: watch::Sender<bool>,
}

/// A process that was added to a container.
#[derive(Debug)]
pub(crate) struct Exec {
    /// The process.
    pub(crate) process: Arc<Process>,
    /// The OCI `process` object, as JSON.
    pub(crate) spec: Vec<u8>,
}

impl Task {
    /// A container that is about to be created.
    pub(crate) fn new(id: String, bundle: PathBuf, init: Process) -> Self {
        Self {
            id,
            bundle,
            init: Arc::new(init),
            execs: Mutex::default(),
            machine: OnceLock::new(),
            killed: watch::Sender::new(false),
            init_ended: AtomicBool::new(false),
            oom_told: AtomicBool::new(false),
            deleted: tokio::sync::Mutex::default(),
            released: watch::Sender::new(false),
        }
    }

    /// Its machine, once it has one.
    pub(crate) fn machine(&self) -> Result<&Arc<Machine>, TaskError> {
        self.machine.get().ok_or(TaskError::BeingCreated)
    }

    /// Gives it its machine.
    pub(crate) fn set_machine(&self, machine: Arc<Machine>) {
        // A container is created once.
        let _ = self.machine.set(machine);
    }

    /// The VMM's process id, 0 without a machine.
    pub(crate) fn pid(&self) -> u32 {
        self.machine.get().map_or(0, |machine| machine.pid())
    }

    /// The first process, or the exec of this id.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, TaskError> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.exec(exec_id).map(|exec| Arc::clone(&exec.process))
    }

    /// The exec of this id.
    pub(crate) fn exec(&self, exec_id: &str) -> Result<Arc<Exec>, TaskError> {
        let exec = self.locked().get(exec_id).cloned();
        exec.ok_or_else(|| TaskError::NoProcess(exec_id.to_owned()))
    }

    /// All execs.
    pub(crate) fn execs(&self) -> Vec<Arc<Exec>> {
        self.locked().values().cloned().collect()
    }

    /// Adds an exec, whose id must be new.
    pub(crate) fn add(&self, exec: Exec) -> Result<(), TaskError> {
        let id = exec.process.id.exec_id.clone();
        let mut execs = self.locked();
        if execs.contains_key(&id) {
            return Err(TaskError::Exists(format!("id {id}")));
        }
        if execs.len() >= EXECS_MAX {
            return Err(TaskError::State(format!(
                "exec: the container has {EXECS_MAX} processes that were not deleted"
            )));
        }
        execs.insert(id, Arc::new(exec));
        Ok(())
    }

    /// Removes an exec; false when somebody else has.
    pub(crate) fn remove(&self, exec_id: &str) -> bool {
        self.locked().remove(exec_id).is_some()
    }

    fn locked(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has its creation given up.
    pub(crate) fn kill(&self) {
        self.killed.send_replace(true);
    }

    /// Waits until its creation is to be given up.
    pub(crate) async fn killed(&self) {
        // The sender is our own.
        let _ = self.killed.subscribe().wait_for(|killed| *killed).await;
    }

    /// Says that the guest holds nothing of it any more.
    pub(crate) fn release(&self) {
        self.released.send_replace(true);
    }

    /// Waits until the guest holds nothing of it any more.
    pub(crate) async fn released(&self) {
        // The sender is our own.
        let _ = self.released.subscribe().wait_for(|released| *released).await;
    }
}
