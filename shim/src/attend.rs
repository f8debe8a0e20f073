//! What goes on beside the requests: the ends of processes, and memory that runs out.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bulkhead_sandbox::agent::messages::WaitProcessResponse;
use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use protobuf::MessageField;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::machine::{Machine, WRITE_TIMEOUT};
use crate::process::{Exit, KILLED, Process, State};
use crate::shim::Shim;
use crate::task::Task;

/// How long the end of a process waits for its output to be passed on. Whoever reads it late gets it later: the copying goes on until
/// the process is deleted. A process that somebody else's copy of its output outlives is told of after this.
pub(crate) const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a container's end waits for the ends of its execs, which the guest has killed by then.
const EXECS_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the guest may take to let go of a container that writes to no disk.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a machine whose agent is gone may take to be known as ended.
const LOST_TIMEOUT: Duration = Duration::from_secs(2);
/// The shortest time between two out-of-memory events of a container: containerd tells everybody of each.
const OOM_PAUSE: Duration = Duration::from_secs(1);
/// The exit status of a process of which the guest says something that cannot be.
const UNKNOWN: u32 = 255;
/// Most that an exit status can be.
const STATUS_MAX: u32 = 255;

/// Attends to a container's first process until the guest holds nothing of the container any more.
pub(crate) async fn init(shim: Arc<Shim>, task: Arc<Task>, machine: Arc<Machine>) {
    let ended = end(&machine, &task.init).await;
    task.init_ended.store(true, Ordering::Relaxed);
    if ended.oom_killed && !task.oom_told.swap(true, Ordering::Relaxed) {
        shim.events.publish(&TaskOOM { container_id: task.id.clone(), ..Default::default() });
    }
    let exit = Exit::now(ended.exit_status);
    until_told(&task.init).await;
    let deadline = Instant::now() + EXECS_TIMEOUT;
    for exec in task.execs() {
        if !exec.process.state().is_alive() {
            continue;
        }
        if timeout_at(deadline, exec.process.stopped()).await.is_err() {
            tracing::warn!(
                id = task.id,
                exec = exec.process.id.exec_id,
                "the guest does not tell of a process's end"
            );
            publish(&shim, &task, &exec.process, Exit::now(KILLED));
        }
    }
    publish(&shim, &task, &task.init, exit);

    // The exit is out; what follows keeps nobody waiting but the deletion.
    task.init.drained().await;
    let is_over = shim.is_over();
    let writes = machine.pod().holds_back(&task.id);
    // What a machine that is to end has of the host goes with it: only the container's disks are to be written.
    if machine.is_usable() && (!is_over || writes) {
        let patience = if writes { WRITE_TIMEOUT } else { REMOVE_TIMEOUT };
        if timeout(patience, machine.remove(&task.id, is_over)).await.is_err() {
            tracing::warn!(id = task.id, "the guest does not let go of the container");
        }
    }
    if is_over {
        machine.end("its containers have ended").await;
    }
    task.release();
}

/// Attends to an exec until its end.
pub(crate) async fn exec(shim: Arc<Shim>, task: Arc<Task>, process: Arc<Process>, machine: Arc<Machine>) {
    let ended = end(&machine, &process).await;
    let exit = Exit::now(ended.exit_status);
    until_told(&process).await;
    publish(&shim, &task, &process, exit);
}

/// Tells of memory that has run out, for as long as the guest answers.
pub(crate) async fn oom(shim: Arc<Shim>, task: Arc<Task>, machine: Arc<Machine>) {
    let (mut kills, mut next) = (0, Instant::now());
    loop {
        let watching = async {
            // The guest says how often it happens, but not how often it is told.
            sleep_until(next).await;
            machine.agent().watch_oom(&task.id, kills).await
        };
        let more = tokio::select! {
            more = watching => more,
            _ = machine.over() => return,
            _ = task.init.stopped() => return,
        };
        match more {
            Ok(more) if more > kills => kills = more,
            _ => return,
        }
        next = Instant::now() + OOM_PAUSE;
        task.oom_told.store(true, Ordering::Relaxed);
        shim.events.publish(&TaskOOM { container_id: task.id.clone(), ..Default::default() });
    }
}

/// Waits for a process's end. One whose machine is gone was killed.
async fn end(machine: &Machine, process: &Process) -> WaitProcessResponse {
    let killed = || WaitProcessResponse { exit_status: KILLED, ..Default::default() };
    let answer = tokio::select! {
        answer = machine.agent().wait(&process.id) => answer,
        _ = machine.over() => return killed(),
    };
    match answer {
        Ok(answer) if answer.exit_status <= STATUS_MAX => answer,
        Ok(answer) => {
            tracing::warn!(status = answer.exit_status, "the guest tells of an exit status that cannot be");
            WaitProcessResponse { exit_status: UNKNOWN, ..Default::default() }
        }
        Err(error) if error.code().is_some() => {
            tracing::warn!(%error, "the guest does not know of a process");
            WaitProcessResponse { exit_status: UNKNOWN, ..Default::default() }
        }
        Err(error) => {
            if timeout(LOST_TIMEOUT, machine.over()).await.is_err() {
                tracing::error!(%error, "the virtual machine is ended: nothing is heard of its containers any more");
                machine.end("its agent was gone").await;
            }
            killed()
        }
    }
}

/// Waits until the start of a process has been told, then, in bounds, until its output has been passed on.
async fn until_told(process: &Process) {
    // The sender is the process's own.
    let _ = process.watch().wait_for(|state| !matches!(state, State::Starting | State::Creating)).await;
    if timeout(DRAIN_TIMEOUT, process.drained()).await.is_err() {
        tracing::debug!(id = process.id.container_id, "the output of a process goes on after its end");
    }
}

/// Ends a process for everybody.
fn publish(shim: &Shim, task: &Task, process: &Process, exit: Exit) {
    if !process.stop(exit) {
        return;
    }
    let exec_id = &process.id.exec_id;
    shim.events.publish(&TaskExit {
        container_id: task.id.clone(),
        id: if exec_id.is_empty() { task.id.clone() } else { exec_id.clone() },
        pid: task.pid(),
        exit_status: exit.status,
        exited_at: MessageField::some(exit.at.into()),
        ..Default::default()
    });
}
