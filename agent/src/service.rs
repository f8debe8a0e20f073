//! The calls of `agent.proto`: each checks its bounds here, at the edge, and passes on what it was asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bulkhead_protocol::agent::{
    AddEntropyRequest, BindSlotRequest, BindSlotResponse, CloseStdinRequest, CreateContainerRequest,
    CreateContainerResponse, Empty, ExecProcessRequest, ExecProcessResponse, GetGuestDetailsRequest,
    GuestDetails, OnlineCpusRequest, OnlineCpusResponse, PauseContainerRequest, RemoveContainerRequest,
    ResizeTerminalRequest, ResumeContainerRequest, SetClockRequest, SetClockResponse, SetHostnameRequest,
    ShutdownRequest, SignalProcessRequest, StartContainerRequest, StatsContainerRequest,
    StatsContainerResponse, Stdio, UnbindSlotRequest, UpdateContainerRequest, WaitProcessRequest,
    WaitProcessResponse, WatchOomRequest, WatchOomResponse,
};
use bulkhead_protocol::agent_ttrpc::Agent;
use bulkhead_protocol::limits::{
    ERROR_TEXT_MAX, HOSTNAME_MAX, LAYERS_MAX, SEED_MAX, SPEC_MAX, USER_MAX, is_valid_id,
};
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, get_status};

use crate::cgroup::Cgroup;
use crate::lifecycle::{self, Lifecycle};
use crate::process::{self, State};
use crate::zygote::protocol::{Failure, FailureKind};
use crate::{chain, fault, guest};

/// The agent as the host sees it.
pub(crate) struct Service {
    lifecycle: Arc<Lifecycle>,
    ready_after_boot_ns: AtomicU64,
}

impl Service {
    pub(crate) fn new(lifecycle: Arc<Lifecycle>) -> Self {
        Self { lifecycle, ready_after_boot_ns: AtomicU64::new(0) }
    }

    /// Notes when the agent said that it is ready.
    pub(crate) fn ready(&self, after_boot_ns: u64) {
        self.ready_after_boot_ns.store(after_boot_ns, Ordering::Relaxed);
    }
}

fn status(code: Code, text: impl Into<String>) -> ttrpc::Error {
    let mut text = text.into();
    if text.len() > ERROR_TEXT_MAX {
        let end = (0..=ERROR_TEXT_MAX).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        text.truncate(end);
    }
    ttrpc::Error::RpcStatus(get_status(code, text))
}

fn invalid(text: impl Into<String>) -> ttrpc::Error {
    status(Code::INVALID_ARGUMENT, text)
}

impl From<guest::Error> for ttrpc::Error {
    fn from(error: guest::Error) -> Self {
        let code = match error {
            guest::Error::NoSlot(_) | guest::Error::NoCpu(..) | guest::Error::NoPartition(..) => {
                Code::INVALID_ARGUMENT
            }
            guest::Error::NoDevice(_) | guest::Error::SlotInUse(_) => Code::FAILED_PRECONDITION,
            _ => Code::INTERNAL,
        };
        status(code, chain(&error))
    }
}

impl From<process::Error> for ttrpc::Error {
    fn from(error: process::Error) -> Self {
        use process::Error as E;
        let code = match error {
            E::NoContainer(_) | E::NoProcess(..) | E::Ended(..) => Code::NOT_FOUND,
            E::ContainerExists(_) | E::ProcessExists(..) => Code::ALREADY_EXISTS,
            E::Full(_) => Code::RESOURCE_EXHAUSTED,
            E::State(..) | E::Paused(_) => Code::FAILED_PRECONDITION,
        };
        status(code, chain(&error))
    }
}

impl From<Failure> for ttrpc::Error {
    fn from(failure: Failure) -> Self {
        let code = match failure.kind {
            FailureKind::CommandNotFound => Code::NOT_FOUND,
            FailureKind::CommandNotExecutable => Code::PERMISSION_DENIED,
            FailureKind::Invalid => Code::INVALID_ARGUMENT,
            FailureKind::Precondition => Code::FAILED_PRECONDITION,
            FailureKind::Timeout => Code::DEADLINE_EXCEEDED,
            FailureKind::Internal => Code::INTERNAL,
        };
        status(code, failure.text)
    }
}

impl From<lifecycle::Error> for ttrpc::Error {
    fn from(error: lifecycle::Error) -> Self {
        match error {
            lifecycle::Error::Table(error) => error.into(),
            lifecycle::Error::Failed(failure) => failure.into(),
            lifecycle::Error::Limits(error) => Failure::new(error.kind(), chain(&error)).into(),
            lifecycle::Error::Namespaces(error) => invalid(chain(&error)),
            other => status(Code::INTERNAL, chain(&other)),
        }
    }
}

type Answer<T> = ttrpc::Result<T>;

/// Finishes `work` even when the host stops waiting for the answer, which drops the call at wherever it waits.
async fn finish<T: Send + 'static>(
    work: impl Future<Output = Result<T, lifecycle::Error>> + Send + 'static,
) -> Answer<T> {
    match tokio::spawn(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(status(Code::INTERNAL, error.to_string())),
    }
}

/// Has a thread of its own do what the kernel may take long over: a device that must be probed, a processor that does not
/// come up. All else goes on meanwhile.
async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, guest::Error> + Send + 'static,
) -> Answer<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(status(Code::INTERNAL, error.to_string())),
    }
}

fn check_id(what: &str, id: &str) -> Answer<()> {
    if is_valid_id(id) { Ok(()) } else { Err(invalid(format!("{what} {id:?} is no valid id"))) }
}

/// A container's id, and that of an exec or nothing.
fn check_ids(container: &str, exec: &str) -> Answer<()> {
    check_id("container id", container)?;
    if exec.is_empty() { Ok(()) } else { check_id("exec id", exec) }
}

fn check_length(what: &str, length: usize, max: usize) -> Answer<()> {
    if length <= max { Ok(()) } else { Err(invalid(format!("{what} has {length} bytes, more than {max}"))) }
}

fn check_stdio(stdio: &Stdio) -> Answer<()> {
    if stdio.terminal && stdio.stderr {
        return Err(invalid("a terminal has no stream of its own for stderr"));
    }
    terminal_size(stdio.rows, stdio.columns).map(drop)
}

fn terminal_size(rows: u32, columns: u32) -> Answer<(u16, u16)> {
    match (u16::try_from(rows), u16::try_from(columns)) {
        (Ok(rows), Ok(columns)) => Ok((rows, columns)),
        _ => Err(invalid(format!("a terminal has at most {} rows and columns", u16::MAX))),
    }
}

fn number(pid: i32) -> u32 {
    pid.unsigned_abs()
}

#[async_trait]
impl Agent for Service {
    async fn get_guest_details(&self, _: &TtrpcContext, _: GetGuestDetailsRequest) -> Answer<GuestDetails> {
        Ok(guest::details(self.ready_after_boot_ns.load(Ordering::Relaxed))?)
    }

    async fn set_clock(&self, _: &TtrpcContext, request: SetClockRequest) -> Answer<SetClockResponse> {
        let (offset_ns, stepped) = guest::set_clock(request.realtime_ns)?;
        Ok(SetClockResponse { offset_ns, stepped, ..SetClockResponse::default() })
    }

    async fn add_entropy(&self, _: &TtrpcContext, request: AddEntropyRequest) -> Answer<Empty> {
        if request.seed.is_empty() || request.seed.len() > SEED_MAX {
            return Err(invalid(format!("a seed has 1 to {SEED_MAX} bytes, not {}", request.seed.len())));
        }
        guest::add_entropy(&request.seed)?;
        Ok(Empty::default())
    }

    async fn set_hostname(&self, _: &TtrpcContext, request: SetHostnameRequest) -> Answer<Empty> {
        if request.hostname.is_empty() || request.hostname.len() > HOSTNAME_MAX {
            let length = request.hostname.len();
            return Err(invalid(format!("a hostname has 1 to {HOSTNAME_MAX} bytes, not {length}")));
        }
        guest::set_hostname(&request.hostname)?;
        Ok(Empty::default())
    }

    async fn bind_slot(&self, _: &TtrpcContext, request: BindSlotRequest) -> Answer<BindSlotResponse> {
        let block_device = beside(move || guest::bind_slot(request.slot)).await?.unwrap_or_default();
        Ok(BindSlotResponse { block_device, ..BindSlotResponse::default() })
    }

    async fn unbind_slot(&self, _: &TtrpcContext, request: UnbindSlotRequest) -> Answer<Empty> {
        beside(move || guest::unbind_slot(request.slot)).await?;
        Ok(Empty::default())
    }

    async fn online_cpus(&self, _: &TtrpcContext, request: OnlineCpusRequest) -> Answer<OnlineCpusResponse> {
        if request.count == 0 {
            return Err(invalid("a guest has at least one CPU online"));
        }
        let cpus_online = beside(move || guest::online_cpus(request.count)).await?;
        Ok(OnlineCpusResponse { cpus_online, ..OnlineCpusResponse::default() })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Answer<Empty> {
        if !self.lifecycle.table.is_empty() {
            return Err(status(Code::FAILED_PRECONDITION, "there are containers: remove them first"));
        }
        beside(guest::shutdown).await?;
        Ok(Empty::default())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Answer<CreateContainerResponse> {
        check_ids(&request.container_id, "")?;
        check_length("spec", request.spec.len(), SPEC_MAX)?;
        check_length("user", request.user.len(), USER_MAX)?;
        check_stdio(&request.stdio)?;
        if request.rootfs.lower.len() > LAYERS_MAX {
            return Err(invalid(format!("a root has at most {LAYERS_MAX} layers")));
        }
        if !request.rootfs.share.is_empty() {
            check_id("share", &request.rootfs.share)?;
        }
        for shared in &request.shared_namespaces {
            check_id("container id", &shared.container_id)?;
        }
        let pid = number(finish(Arc::clone(&self.lifecycle).create(request)).await?);
        Ok(CreateContainerResponse { pid, ..CreateContainerResponse::default() })
    }

    async fn start_container(&self, _: &TtrpcContext, request: StartContainerRequest) -> Answer<Empty> {
        check_ids(&request.container_id, "")?;
        finish(Arc::clone(&self.lifecycle).start(request.container_id)).await?;
        Ok(Empty::default())
    }

    async fn remove_container(&self, _: &TtrpcContext, request: RemoveContainerRequest) -> Answer<Empty> {
        check_ids(&request.container_id, "")?;
        finish(Arc::clone(&self.lifecycle).remove(request.container_id, request.force)).await?;
        Ok(Empty::default())
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        request: StatsContainerRequest,
    ) -> Answer<StatsContainerResponse> {
        check_ids(&request.container_id, "")?;
        self.lifecycle.table.state(&request.container_id)?;
        Ok(stats(&Cgroup::of(&request.container_id)))
    }

    async fn update_container(&self, _: &TtrpcContext, request: UpdateContainerRequest) -> Answer<Empty> {
        check_id("container id", &request.container_id)?;
        check_length("resources", request.resources.len(), SPEC_MAX)?;
        finish(Arc::clone(&self.lifecycle).update(request.container_id, request.resources)).await?;
        Ok(Empty::default())
    }

    async fn pause_container(&self, _: &TtrpcContext, request: PauseContainerRequest) -> Answer<Empty> {
        check_id("container id", &request.container_id)?;
        finish(Arc::clone(&self.lifecycle).pause(request.container_id)).await?;
        Ok(Empty::default())
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ResumeContainerRequest) -> Answer<Empty> {
        check_id("container id", &request.container_id)?;
        finish(Arc::clone(&self.lifecycle).resume(request.container_id)).await?;
        Ok(Empty::default())
    }

    async fn watch_oom(&self, _: &TtrpcContext, request: WatchOomRequest) -> Answer<WatchOomResponse> {
        check_id("container id", &request.container_id)?;
        // Not finished for its own sake: there is nothing to do when nobody waits.
        let kills = self.lifecycle.more_oom_kills(&request.container_id, request.kills).await?;
        Ok(WatchOomResponse { kills, ..WatchOomResponse::default() })
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> Answer<ExecProcessResponse> {
        check_id("container id", &request.container_id)?;
        check_id("exec id", &request.exec_id)?;
        check_length("process", request.process.len(), SPEC_MAX)?;
        check_length("user", request.user.len(), USER_MAX)?;
        check_stdio(&request.stdio)?;
        fault::when_asked(&request.process);
        let pid = number(finish(Arc::clone(&self.lifecycle).exec(request)).await?);
        Ok(ExecProcessResponse { pid, ..ExecProcessResponse::default() })
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> Answer<Empty> {
        check_ids(&request.container_id, &request.exec_id)?;
        let signal =
            i32::try_from(request.signal).ok().filter(|signal| (1..=libc::SIGRTMAX()).contains(signal));
        let signal = signal.ok_or_else(|| invalid(format!("{} is no signal", request.signal)))?;
        if request.all {
            if !request.exec_id.is_empty() {
                return Err(invalid("all processes of a container are not those of an exec"));
            }
            self.lifecycle.table.state(&request.container_id)?;
            signal_all(&Cgroup::of(&request.container_id), signal)?;
            return Ok(Empty::default());
        }
        let (id, exec) = (request.container_id, request.exec_id);
        let process = self.lifecycle.table.process(&id, &exec)?;
        if process.pid().is_none() {
            return Err(process::Error::State(id, State::Creating).into());
        }
        if process.ended().is_some() {
            return Err(process::Error::Ended(id, exec).into());
        }
        process
            .signal(signal)
            .map_err(|error| status(Code::INTERNAL, format!("send signal {signal}: {error}")))?;
        Ok(Empty::default())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: WaitProcessRequest,
    ) -> Answer<WaitProcessResponse> {
        check_ids(&request.container_id, &request.exec_id)?;
        let exit = self.lifecycle.table.process(&request.container_id, &request.exec_id)?.wait().await;
        Ok(WaitProcessResponse {
            exit_status: exit.status,
            exited_at_ns: exit.at_ns,
            oom_killed: exit.oom_killed,
            ..WaitProcessResponse::default()
        })
    }

    async fn resize_terminal(&self, _: &TtrpcContext, request: ResizeTerminalRequest) -> Answer<Empty> {
        check_ids(&request.container_id, &request.exec_id)?;
        let (rows, columns) = terminal_size(request.rows, request.columns)?;
        let process = self.lifecycle.table.process(&request.container_id, &request.exec_id)?;
        match process.streams.resize(rows, columns) {
            Ok(true) => Ok(Empty::default()),
            Ok(false) => Err(status(Code::FAILED_PRECONDITION, "the process has no terminal")),
            Err(error) => Err(status(Code::INTERNAL, format!("resize the terminal: {error}"))),
        }
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: CloseStdinRequest) -> Answer<Empty> {
        check_ids(&request.container_id, &request.exec_id)?;
        self.lifecycle.table.process(&request.container_id, &request.exec_id)?.streams.close_input();
        Ok(Empty::default())
    }
}

/// SIGKILL is the kernel's own way to end all of a group; any other signal goes to who is there now.
fn signal_all(cgroup: &Cgroup, signal: i32) -> Answer<()> {
    if signal == libc::SIGKILL {
        return cgroup.kill().map_err(|error| status(Code::INTERNAL, chain(&error)));
    }
    for pid in cgroup.processes() {
        // SAFETY: kill has no preconditions. A process that has ended since is not reaped while this runs, except by
        // the container itself.
        unsafe { libc::kill(pid, signal) };
    }
    Ok(())
}

/// Files that hold one number each.
const NUMBERS: [&str; 7] = [
    "memory.current",
    "memory.peak",
    "memory.max",
    "memory.swap.current",
    "memory.swap.max",
    "pids.current",
    "pids.max",
];

fn stats(cgroup: &Cgroup) -> StatsContainerResponse {
    let number = |file: &str| Some((file.to_owned(), cgroup.number(file)?));
    StatsContainerResponse {
        cpu: cgroup.table("cpu.stat"),
        memory: cgroup.table("memory.stat"),
        memory_events: cgroup.table("memory.events"),
        numbers: NUMBERS.into_iter().filter_map(number).collect(),
        io: cgroup.io(),
        ..StatsContainerResponse::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut() {
        let ttrpc::Error::RpcStatus(status) = status(Code::INTERNAL, "é".repeat(ERROR_TEXT_MAX)) else {
            panic!("a status");
        };
        assert_eq!(status.message.len(), ERROR_TEXT_MAX);
    }
}
