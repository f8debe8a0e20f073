//! The Task service, as containerd calls it.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::{Task, create_task};
use protobuf::{EnumOrUnknown, MessageField};
use ttrpc::asynchronous::{Service, TtrpcContext as Context};

use crate::any::pack;
use crate::errors::TaskError;
use crate::io::Stdio;
use crate::metrics::metrics;
use crate::process::{Exit, State};
use crate::shim::{Shim, explain};

/// The names under which containerd 1.7 and 2 look for the service; the messages are the same.
const NAMES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// Metadata that our own `delete` has in its Delete: the container is to be ended first, and the shim with the last one.
pub(crate) const ABANDONED: &str = "bulkhead-abandoned";

/// The services of a shim.
pub(crate) fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let named = |name: &str| {
        let service = TaskService { shim: Arc::clone(shim) };
        let mut made = create_task(Arc::new(service) as Arc<dyn Task + Send + Sync>).into_values();
        made.next().map(|service| (name.to_owned(), service))
    };
    NAMES.iter().filter_map(|name| named(name)).collect()
}

struct TaskService {
    shim: Arc<Shim>,
}

type Reply<T> = ttrpc::Result<T>;

fn empty((): ()) -> api::Empty {
    api::Empty::new()
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &Context, request: api::StateRequest) -> Reply<api::StateResponse> {
        let task = self.shim.task(&request.id)?;
        let process = task.process(&request.exec_id)?;
        let state = process.state();
        let exit = state.exit();
        // All that a frozen container has is shown as frozen with it, be it created or stopped: so does runc's shim.
        let shown = match task.init.state() {
            frozen @ (State::Pausing | State::Paused) => frozen,
            _ => state,
        };
        // An exec that has not been started has no process yet.
        let has_process = process.id.exec_id.is_empty() || state != State::Created;
        Ok(api::StateResponse {
            id: if request.exec_id.is_empty() { request.id } else { request.exec_id.clone() },
            exec_id: request.exec_id,
            bundle: task.bundle.display().to_string(),
            pid: if has_process { task.pid() } else { 0 },
            status: EnumOrUnknown::new(shown.status()),
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| exit.at.into()).into(),
            ..Default::default()
        })
    }

    async fn create(&self, _: &Context, request: api::CreateTaskRequest) -> Reply<api::CreateTaskResponse> {
        let id = request.id.clone();
        match self.shim.create(request).await {
            Ok(pid) => Ok(api::CreateTaskResponse { pid, ..Default::default() }),
            Err(error) => {
                tracing::error!(id, error = %crate::errors::chain(&error), "the container was not created");
                Err(error.into())
            }
        }
    }

    async fn start(&self, _: &Context, request: api::StartRequest) -> Reply<api::StartResponse> {
        let pid = self.shim.start(&request.id, &request.exec_id).await?;
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, context: &Context, request: api::DeleteRequest) -> Reply<api::DeleteResponse> {
        let (pid, exit) = if context.metadata.contains_key(ABANDONED) {
            self.shim.delete_abandoned(&request.id).await?
        } else {
            self.shim.delete(&request.id, &request.exec_id).await?
        };
        Ok(api::DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &Context, request: api::PidsRequest) -> Reply<api::PidsResponse> {
        let task = self.shim.task(&request.id)?;
        // The VMM stands for every process, and for a container that has ended too: containerd, when it is restarted, takes a shim
        // without a process for one that was left behind, and would not hear of the exit.
        let process = |info| api::ProcessInfo { pid: task.pid(), info, ..Default::default() };
        let mut processes = vec![process(MessageField::none())];
        for exec in task.execs().iter().filter(|exec| exec.process.state().is_alive()) {
            let details = ProcessDetails { exec_id: exec.process.id.exec_id.clone(), ..Default::default() };
            processes.push(process(MessageField::some(pack(&details))));
        }
        Ok(api::PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &Context, request: api::PauseRequest) -> Reply<api::Empty> {
        Ok(self.shim.pause(&request.id).await.map(empty)?)
    }

    async fn resume(&self, _: &Context, request: api::ResumeRequest) -> Reply<api::Empty> {
        Ok(self.shim.resume(&request.id).await.map(empty)?)
    }

    async fn checkpoint(&self, _: &Context, request: api::CheckpointTaskRequest) -> Reply<api::Empty> {
        self.shim.task(&request.id)?;
        Err(TaskError::Unsupported("checkpoints of containers in virtual machines").into())
    }

    async fn kill(&self, _: &Context, request: api::KillRequest) -> Reply<api::Empty> {
        let killed = self.shim.kill(&request.id, &request.exec_id, request.signal, request.all).await;
        Ok(killed.map(empty)?)
    }

    async fn exec(&self, _: &Context, request: api::ExecProcessRequest) -> Reply<api::Empty> {
        let stdio = Stdio {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let spec = request.spec.into_option().unwrap_or_default().value;
        Ok(self.shim.exec(&request.id, &request.exec_id, stdio, spec).map(empty)?)
    }

    async fn resize_pty(&self, _: &Context, request: api::ResizePtyRequest) -> Reply<api::Empty> {
        let task = self.shim.task(&request.id)?;
        let process = task.process(&request.exec_id)?;
        let state = process.state();
        if state.exit().is_some() {
            return Err(TaskError::state("resize", &state).into());
        }
        let cells = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        let (rows, columns) = (cells(request.height), cells(request.width));
        process.set_size((rows, columns));
        // One that has no terminal has no size, which is no error of the client's; one that is not there yet gets it with its start.
        let is_there = state.is_alive() && state != State::Starting || request.exec_id.is_empty();
        if process.stdio.terminal && is_there {
            let machine = task.machine()?;
            let resized = machine.agent().resize(&process.id, rows, columns).await;
            if let Err(error) = resized {
                return Err(explain(machine, error.into()).await.into());
            }
        }
        Ok(api::Empty::new())
    }

    async fn close_io(&self, _: &Context, request: api::CloseIORequest) -> Reply<api::Empty> {
        let task = self.shim.task(&request.id)?;
        let process = task.process(&request.exec_id)?;
        if request.stdin {
            process.close_input();
        }
        Ok(api::Empty::new())
    }

    async fn update(&self, _: &Context, request: api::UpdateTaskRequest) -> Reply<api::Empty> {
        let resources = request.resources.into_option().unwrap_or_default().value;
        Ok(self.shim.update(&request.id, &resources).await.map(empty)?)
    }

    async fn wait(&self, _: &Context, request: api::WaitRequest) -> Reply<api::WaitResponse> {
        let process = self.shim.task(&request.id)?.process(&request.exec_id)?;
        let Exit { status, at } = process.stopped().await;
        Ok(api::WaitResponse {
            exit_status: status,
            exited_at: MessageField::some(at.into()),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &Context, request: api::StatsRequest) -> Reply<api::StatsResponse> {
        let task = self.shim.task(&request.id)?;
        if task.init.state().exit().is_some() {
            return Err(TaskError::NoCgroup.into());
        }
        let machine = task.machine()?;
        match machine.agent().stats(&task.id).await {
            Ok(stats) => {
                let stats = MessageField::some(pack(&metrics(&stats)));
                Ok(api::StatsResponse { stats, ..Default::default() })
            }
            Err(error) => Err(explain(machine, error.into()).await.into()),
        }
    }

    async fn connect(&self, _: &Context, request: api::ConnectRequest) -> Reply<api::ConnectResponse> {
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            // As runc's shim does it, a container that is not there is no error here.
            task_pid: self.shim.task(&request.id).map_or(0, |task| task.pid()),
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &Context, _: api::ShutdownRequest) -> Reply<api::Empty> {
        self.shim.shut_down();
        Ok(api::Empty::new())
    }
}
