//! What is done with a container between Create and its end: start, exec, kill, pause, delete.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bulkhead_protocol::limits::{CREATE_TIMEOUT_S, is_valid_id};
use bulkhead_sandbox::agent::{AgentError, Code, ProcessId, messages};
use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecAdded, TaskExecStarted, TaskPaused, TaskResumed, TaskStart,
};
use protobuf::MessageField;
use rustix::process::Signal;
use tokio::time::{Instant, timeout, timeout_at};

use crate::attend::{self, DRAIN_TIMEOUT};
use crate::errors::TaskError;
use crate::io::{Attached, HostEnds, Owner, Stdio};
use crate::machine::{Machine, WRITE_TIMEOUT};
use crate::process::{Exit, KILLED, Process, State};
use crate::shim::{Shim, explain, through};
use crate::task::{Exec, Task};

/// How long the guest may take to deliver a SIGKILL before its machine is ended in its place: with the machine's own end, kill is
/// answered within five seconds.
const KILL_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a container may live on that the guest has sent a SIGKILL: its last writes to a slow disk are waited for.
const DEATH_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a signal waits for the start of the exec that it is for: until then the guest does not know the process.
const STARTING_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a start may take, with the CPUs that the container's machine gets first.
const START_TIMEOUT: Duration = Duration::from_secs(CREATE_TIMEOUT_S);
/// How long a deletion waits for the guest to let go of a container that writes to no disk.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(2500);
/// How long a deletion waits for the end of a container that was created and never started.
const STOP_TIMEOUT: Duration = Duration::from_secs(4);
/// Exit statuses of programs that do not start, as shells have them.
const NOT_FOUND: u32 = 127;
const NOT_EXECUTABLE: u32 = 126;
/// And of those that do not start for another reason.
const NOT_STARTED: u32 = 255;
/// The highest signal there is on Linux.
const SIGNAL_MAX: u32 = 64;

impl Shim {
    /// Starts a container's first process, or an exec. Returns its process id on the host.
    pub(crate) async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32, TaskError> {
        let task = self.task(id)?;
        let machine = Arc::clone(task.machine()?);
        if exec_id.is_empty() {
            task.init.enter("start", |state| *state == State::Created, State::Starting)?;
            return through(Arc::clone(self).start_init(task, machine)).await;
        }
        let exec = task.exec(exec_id)?;
        if task.init_ended.load(Ordering::Relaxed) {
            return Err(TaskError::InitEnded(task.id.clone()));
        }
        if matches!(task.init.state(), State::Paused | State::Pausing) {
            // What is born into a frozen container is frozen before it has started.
            return Err(TaskError::state("exec", &State::Paused));
        }
        exec.process.enter("start", |state| *state == State::Created, State::Starting)?;
        through(Arc::clone(self).start_exec(task, exec, machine)).await
    }

    async fn start_init(self: Arc<Self>, task: Arc<Task>, machine: Arc<Machine>) -> Result<u32, TaskError> {
        let started = timeout(START_TIMEOUT, machine.pod().start_container(&task.id)).await;
        match started.unwrap_or(Err(AgentError::Timeout(START_TIMEOUT))) {
            Ok(()) => {
                // Only now: ctr that had all its input before the creation was over has gone by then, and never calls CloseIO
                // (containerd's issue 4489).
                task.init.hold_input();
                let pid = machine.pid();
                self.events.publish(&TaskStart { container_id: task.id.clone(), pid, ..Default::default() });
                task.init.advance(State::Starting, State::Running);
                Ok(pid)
            }
            Err(error) => {
                // Its end, if there is one, comes as every end does.
                task.init.advance(State::Starting, State::Created);
                Err(explain(&machine, TaskError::start("start", &task.init.program(), error)).await)
            }
        }
    }

    async fn start_exec(
        self: Arc<Self>,
        task: Arc<Task>,
        exec: Arc<Exec>,
        machine: Arc<Machine>,
    ) -> Result<u32, TaskError> {
        let process = &exec.process;
        match self.run_exec(&exec, &machine).await {
            Ok(attached) => {
                process.attach(attached);
                process.hold_input();
            }
            Err(error) => {
                let status = match &error {
                    TaskError::Agent(error) if error.code() == Some(Code::NOT_FOUND) => NOT_FOUND,
                    TaskError::Agent(error) if error.code() == Some(Code::PERMISSION_DENIED) => {
                        NOT_EXECUTABLE
                    }
                    _ => NOT_STARTED,
                };
                process.stop(Exit::now(status));
                let error = match error {
                    TaskError::Agent(error) => TaskError::start("exec", &process.program(), error),
                    other => other,
                };
                return Err(explain(&machine, error).await);
            }
        }
        let pid = machine.pid();
        self.events.publish(&TaskExecStarted {
            container_id: task.id.clone(),
            exec_id: process.id.exec_id.clone(),
            pid,
            ..Default::default()
        });
        process.advance(State::Starting, State::Running);
        tokio::spawn(attend::exec(self, task, Arc::clone(process), machine));
        Ok(pid)
    }

    async fn run_exec(&self, exec: &Exec, machine: &Machine) -> Result<Attached, TaskError> {
        let process = &exec.process;
        // A logger is told the exec's name, as runc's shim tells it.
        let owner = Owner { namespace: &self.namespace, id: &process.id.exec_id };
        let ends = HostEnds::open(&process.stdio, owner).await?;
        let size = process.size();
        let request = messages::ExecProcessRequest {
            container_id: process.id.container_id.clone(),
            exec_id: process.id.exec_id.clone(),
            process: exec.spec.clone(),
            stdio: MessageField::some(process.stdio.asked(size)),
            ..Default::default()
        };
        machine.agent().exec_process(&request).await?;
        let attached = Attached::connect(machine.socket(), &process.id, ends).await;
        let attached = match attached {
            Ok(attached) => attached,
            Err(error) => {
                // Nobody would hear of its end.
                let _ = machine.agent().signal(&process.id, Signal::KILL.as_raw().unsigned_abs()).await;
                return Err(error.into());
            }
        };
        if process.size() != size {
            // It was told while the process started.
            let (rows, columns) = process.size();
            let _ = machine.agent().resize(&process.id, rows, columns).await;
        }
        Ok(attached)
    }

    /// Adds a process that can be started.
    pub(crate) fn exec(&self, id: &str, exec_id: &str, stdio: Stdio, spec: Vec<u8>) -> Result<(), TaskError> {
        let task = self.task(id)?;
        if !is_valid_id(exec_id) {
            return Err(TaskError::Invalid(format!("the exec id {exec_id:?}")));
        }
        if task.exec(exec_id).is_ok() {
            return Err(TaskError::Exists(format!("id {exec_id}")));
        }
        match task.init.state() {
            State::Created | State::Starting | State::Running => {}
            state => return Err(TaskError::state("exec", &state)),
        }
        let parsed: oci_spec::runtime::Process = serde_json::from_slice(&spec)
            .map_err(|error| TaskError::Invalid(format!("the process to execute: {error}")))?;
        let id = ProcessId { container_id: task.id.clone(), exec_id: exec_id.to_owned() };
        let process = Process::new(id, stdio, State::Created);
        process
            .set_program(parsed.args().as_ref().and_then(|args| args.first()).cloned().unwrap_or_default());
        if let Some(size) = parsed.console_size() {
            let cells = |count: u64| u16::try_from(count).unwrap_or(u16::MAX);
            process.set_size((cells(size.height()), cells(size.width())));
        }
        task.add(Exec { process: Arc::new(process), spec })?;
        let (container_id, exec_id) = (task.id.clone(), exec_id.to_owned());
        self.events.publish(&TaskExecAdded { container_id, exec_id, ..Default::default() });
        Ok(())
    }

    /// Sends a signal. SIGKILL arrives, if need be by the end of the machine, even if the client does not wait for that.
    pub(crate) async fn kill(
        &self,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), TaskError> {
        through(kill(self.task(id)?, exec_id.to_owned(), signal, all)).await
    }

    /// Freezes a container.
    pub(crate) async fn pause(self: &Arc<Self>, id: &str) -> Result<(), TaskError> {
        let task = self.task(id)?;
        let machine = Arc::clone(task.machine()?);
        task.init.enter("pause", |state| *state == State::Running, State::Pausing)?;
        let events = self.events.clone();
        through(async move {
            match machine.agent().pause(&task.id).await {
                Ok(()) => {
                    if task.init.advance(State::Pausing, State::Paused) {
                        events.publish(&TaskPaused { container_id: task.id.clone(), ..Default::default() });
                    }
                    Ok(())
                }
                Err(error) => {
                    if matches!(error, AgentError::Timeout(_)) {
                        // The guest may yet freeze a container that is said to run.
                        let (machine, task) = (Arc::clone(&machine), Arc::clone(&task));
                        tokio::spawn(async move { machine.agent().resume(&task.id).await });
                    }
                    task.init.advance(State::Pausing, State::Running);
                    Err(explain(&machine, error.into()).await)
                }
            }
        })
        .await
    }

    /// Lets a container go on.
    pub(crate) async fn resume(self: &Arc<Self>, id: &str) -> Result<(), TaskError> {
        let task = self.task(id)?;
        let machine = Arc::clone(task.machine()?);
        if task.init.state() != State::Paused {
            return Err(TaskError::state("resume", &task.init.state()));
        }
        let events = self.events.clone();
        through(async move {
            if let Err(error) = machine.agent().resume(&task.id).await {
                return Err(explain(&machine, error.into()).await);
            }
            if task.init.advance(State::Paused, State::Running) {
                events.publish(&TaskResumed { container_id: task.id.clone(), ..Default::default() });
            }
            Ok(())
        })
        .await
    }

    /// Forgets a process that has ended, and its container with the first one. Returns how it ended.
    pub(crate) async fn delete(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<(u32, Exit), TaskError> {
        let task = self.task(id)?;
        let pid = task.pid();
        if exec_id.is_empty() {
            return through(Arc::clone(self).delete_task(task)).await.map(|exit| (pid, exit));
        }
        let process = task.process(exec_id)?;
        let exit = match process.state() {
            State::Created => Exit::now(0),
            State::Stopped(exit) => exit,
            state => return Err(TaskError::state("delete", &state)),
        };
        if !task.remove(exec_id) {
            return Err(TaskError::NoProcess(exec_id.to_owned()));
        }
        through(async move {
            let _ = timeout(DRAIN_TIMEOUT, process.drained()).await;
            process.detach();
            Ok((pid, exit))
        })
        .await
    }

    /// Ends a container that containerd has lost and forgets it, however long that takes and whether or not anybody waits for it. The
    /// shim ends with its last container: nobody is left to say so.
    pub(crate) async fn delete_abandoned(self: &Arc<Self>, id: &str) -> Result<(u32, Exit), TaskError> {
        let task = self.task(id)?;
        let shim = Arc::clone(self);
        through(async move {
            if task.init.state() != State::Creating {
                // Whatever the guest answers, it has ended some time later.
                let _ =
                    kill(Arc::clone(&task), String::new(), Signal::KILL.as_raw().unsigned_abs(), true).await;
                task.init.stopped().await;
            }
            let pid = task.pid();
            let exit = Arc::clone(&shim).delete_task(task).await;
            shim.shut_down();
            exit.map(|exit| (pid, exit))
        })
        .await
    }

    async fn delete_task(self: Arc<Self>, task: Arc<Task>) -> Result<Exit, TaskError> {
        match task.init.state() {
            State::Creating => {
                task.kill();
                let gone = timeout(STOP_TIMEOUT, task.released()).await;
                return gone
                    .map(|()| Exit::now(KILLED))
                    .map_err(|_| TaskError::Deadline("the creation goes on"));
            }
            State::Created | State::Stopped(_) => {}
            state => return Err(TaskError::state("delete", &state)),
        }
        // A client that is told that there is no such container takes the shim's connection with it, so the first one is waited for.
        // When it fails, this one tries.
        let mut deleted = task.deleted.lock().await;
        if *deleted {
            return Err(TaskError::NoContainer);
        }
        let exit = self.delete_ended(&task).await?;
        *deleted = true;
        Ok(exit)
    }

    async fn delete_ended(&self, task: &Task) -> Result<Exit, TaskError> {
        let exit = self.stop_created(task).await?;
        let _ = timeout(DRAIN_TIMEOUT, task.init.drained()).await;
        let execs = task.execs();
        for process in execs.iter().map(|exec| &exec.process).chain([&task.init]) {
            process.detach();
        }
        let machine = task.machine().ok();
        let writes = machine.is_some_and(|machine| machine.pod().holds_back(&task.id));
        // What is on its way to a disk would be lost with the machine, or meet what is started from there next.
        let patience = if writes { WRITE_TIMEOUT } else { RELEASE_TIMEOUT };
        if timeout(patience, task.released()).await.is_err() {
            tracing::warn!(id = task.id, "a container is deleted that the guest has not let go of");
        }
        if self.remove(task)
            && let Some(machine) = machine
        {
            machine.end("its last container was deleted").await;
        }
        self.events.publish(&TaskDelete {
            container_id: task.id.clone(),
            pid: task.pid(),
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..Default::default()
        });
        Ok(exit)
    }

    /// Ends a container that was never started; the end of any other is there.
    async fn stop_created(&self, task: &Task) -> Result<Exit, TaskError> {
        if task.init.state() == State::Created {
            match self.kill(&task.id, "", Signal::KILL.as_raw().unsigned_abs(), true).await {
                Ok(()) | Err(TaskError::Finished) => {}
                Err(error) => return Err(error),
            }
        }
        let stopped = timeout(STOP_TIMEOUT, task.init.stopped()).await;
        stopped.map_err(|_| TaskError::Deadline("the container does not end"))
    }
}

async fn kill(task: Arc<Task>, exec_id: String, signal: u32, all: bool) -> Result<(), TaskError> {
    let process = task.process(&exec_id)?;
    if !(1..=SIGNAL_MAX).contains(&signal) {
        return Err(TaskError::Invalid(format!("the signal {signal}")));
    }
    let is_kill = signal == Signal::KILL.as_raw().unsigned_abs();
    let deadline = Instant::now() + KILL_TIMEOUT;
    if !exec_id.is_empty() {
        let mut state = process.watch();
        let started = state.wait_for(|state| *state != State::Starting);
        let _ = timeout(STARTING_TIMEOUT, started).await;
    }
    match process.state() {
        State::Creating if is_kill => {
            task.kill();
            // Its machine ends meanwhile, or the guest removes it.
            let _ = timeout(KILL_TIMEOUT, task.released()).await;
            return Ok(());
        }
        State::Creating => return Err(TaskError::BeingCreated),
        State::Created if !exec_id.is_empty() => return Err(TaskError::NotStarted),
        State::Stopped(_) => return Err(TaskError::Finished),
        _ => {}
    }
    let machine = task.machine()?;
    let sending = async {
        if all && exec_id.is_empty() {
            machine.agent().signal_all(&task.id, signal).await
        } else {
            machine.agent().signal(&process.id, signal).await
        }
    };
    let sent = if is_kill {
        let in_time = timeout_at(deadline, sending).await;
        in_time.unwrap_or(Err(AgentError::Timeout(KILL_TIMEOUT)))
    } else {
        sending.await
    };
    // Whatever the guest says: it may not do what it says, and an error of its making must not be what keeps it alive.
    if is_kill && exec_id.is_empty() {
        tokio::spawn(see_to_its_end(Arc::clone(&task), Arc::clone(machine)));
    }
    match sent {
        Ok(()) => Ok(()),
        Err(error) if error.code() == Some(Code::NOT_FOUND) => match process.state() {
            State::Starting if !exec_id.is_empty() => Err(TaskError::NotStarted),
            _ => Err(TaskError::Finished),
        },
        Err(error) if is_kill && error.code().is_none() => {
            tracing::error!(%error, id = task.id, "the guest does not take SIGKILL: its machine is ended");
            machine.end("the guest did not take SIGKILL").await;
            Ok(())
        }
        Err(error) => Err(explain(machine, error.into()).await),
    }
}

/// Ends the machine of a container that SIGKILL has not ended: the guest may have said so without doing it.
async fn see_to_its_end(task: Arc<Task>, machine: Arc<Machine>) {
    if timeout(DEATH_TIMEOUT, task.init.stopped()).await.is_err() {
        tracing::error!(id = task.id, "the container does not end of SIGKILL: its machine is ended");
        machine.end("the container did not end of SIGKILL").await;
    }
}
