//! One container's life: its machine, its process, and what is left in the end, which is nothing but its record and its log.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bulkhead_sandbox::agent::messages::CreateContainerRequest;
use bulkhead_sandbox::agent::{Agent, AgentError, Code, ProcessId};
use bulkhead_sandbox::process::Place;
use bulkhead_sandbox::sandbox::{DEATH_TIMEOUT, Sandbox, SandboxConfig, console_text};
use bulkhead_sandbox::size::Size;
use bulkhead_sandbox::storage::Storage;
use bulkhead_sandbox::timing::Stamp;
use bulkhead_sandbox::uid::UidLease;
use bulkhead_sandbox::vmm::Jail;
use rustix::process::geteuid;
use tokio::time::timeout;

use super::detach;
use super::request::Request;
use super::timings::Timings;
use crate::container::claim::Claim;
use crate::container::record::{Outcome, now_ns};
use crate::container::registry::Registry;
use crate::failure::{EXIT_FAILURE, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND, Failure};
use crate::log::LogWriter;
use crate::message;
use crate::process::attach::{Attached, Input, Output, Plan, Tail};
use crate::process::attend::{Attended, attend, exit_code};
use crate::process::signals::Signals;
use crate::process::terminal::RawTerminal;
use crate::progress;

/// How long a machine whose agent is gone may take to be known as ended: longer than its VMM may take to be, so that its end is
/// told, and not only that the agent is gone.
const END_TIMEOUT: Duration = DEATH_TIMEOUT.saturating_add(Duration::from_secs(5));

/// Where a container's life takes place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// In the user's terminal.
    Foreground,
    /// In a process that the user has left.
    Background,
}

/// How a container that had started ended.
struct Ended {
    exit_code: u8,
    /// What the user should know besides.
    error: Option<String>,
}

/// Makes a container, runs it to its end and cleans up.
pub(crate) async fn supervise(request: Request, mode: Mode, started: Stamp) -> Result<u8, Failure> {
    let mut signals = Signals::forwarded()?;
    let claim = Registry::open(&request.paths)?.create(&request.record, request.named)?;
    let mut timings = Timings::new(started);
    let ended = live(&request, &claim, mode, &mut signals, &mut timings).await;
    let outcome = match &ended {
        Ok(ended) if !request.record.auto_remove => {
            Some(Outcome { exit_code: ended.exit_code, finished_at_ns: now_ns(), error: ended.error.clone() })
        }
        // What has never started is not kept.
        Ok(_) | Err(_) => None,
    };
    let cleaned = claim.finish(&request.record, outcome);
    let ended = ended?;
    cleaned?;
    if let Some(error) = &ended.error {
        message::error(error);
    }
    timings.mark("done");
    if let Some(format) = request.timings {
        message::result_on_stderr(&timings.show(format));
    }
    Ok(ended.exit_code)
}

async fn live(
    request: &Request,
    claim: &Claim,
    mode: Mode,
    signals: &mut Signals,
    timings: &mut Timings,
) -> Result<Ended, Failure> {
    let record = &request.record;
    let (sandbox, storage) = tokio::select! {
        booted = boot(request, claim) => booted?,
        signal = signals.next() => return Err(interrupted(signal)),
    };
    timings.booted(sandbox.times());
    let agent = sandbox.agent().await?;
    timings.connected(agent.details());

    let process = ProcessId::init(&record.id);
    let plan = plan(request, claim, mode)?;
    let creating = create(request, &storage, &agent, &process, &plan);
    let created = tokio::select! {
        created = progress::during("creating the container", creating) => created,
        signal = signals.next() => return Err(interrupted(signal)),
    };
    if let Err(error) = created {
        return Err(explain(&sandbox, error).await);
    }
    timings.mark("container created");
    let raw = if request.terminal && plan.input == Input::Host { Some(RawTerminal::enter()?) } else { None };
    let attaching = Attached::connect(sandbox.socket(), &process, &plan);
    let (attached, ()) = tokio::join!(attaching, give_cpus(request, &sandbox, &agent));
    let attached = attached?;
    // From here on the command may run, and signals are for it.
    if let Err(error) = agent.start_container(&process.container_id).await {
        return Err(explain(&sandbox, error).await);
    }
    timings.mark("container started");
    claim.running(Some(sandbox.vmm_pid()))?;
    if mode == Mode::Background {
        detach::report(&record.id)?;
    }
    let attended = attend(&agent, &process, &attached, signals, raw.is_some()).await?;
    timings.mark("exit");
    let ended = match attended {
        Attended::Exited(response) => {
            let error = response
                .oom_killed
                .then(|| "the container ran out of memory: give it more with --memory".into());
            Ok(Ended { exit_code: exit_code(&response), error })
        }
        Attended::Lost(error) => Err(explain(&sandbox, error).await),
        Attended::Unanswered => Err(Failure::new(
            "the container was killed, and its machine too: the guest did not say that it ended",
        )),
    };
    // Nothing but the machine's end surely ends the output of a guest that has failed.
    let sandbox = ended.is_ok().then_some(sandbox);
    timings.first_output(attached.drain(Tail::End, signals).await);
    drop(raw);
    if let Some(sandbox) = sandbox {
        sandbox.stop();
    }
    // A container that had started has ended, whatever ended it.
    ended.or_else(|failure| Ok(Ended { exit_code: EXIT_FAILURE, error: Some(failure.to_string()) }))
}

async fn boot(request: &Request, claim: &Claim) -> Result<(Sandbox, Storage), Failure> {
    let half = Size(u64::from(request.machine.memory_mib) << 19);
    let storage = request.root.prepare(claim, request.storage, half).await?;
    let lease = if geteuid().is_root() {
        Some(UidLease::take(request.uids, &request.paths.uid_locks())?)
    } else {
        None
    };
    let (empty, socket) = (request.paths.empty()?, claim.socket());
    let config = SandboxConfig {
        artifacts: &request.artifacts,
        kvm: &request.kvm,
        memory_mib: request.machine.memory_mib,
        cpus: request.machine.cpus,
        jail: Jail { uid: lease.as_ref(), root: &empty, network: Place::Owners },
        socket: &socket,
        disks: &storage.disks,
        shares: None,
        cgroup: None,
    };
    let sandbox = progress::during("starting the virtual machine", Sandbox::boot(&config)).await?;
    Ok((sandbox, storage))
}

fn plan(request: &Request, claim: &Claim, mode: Mode) -> Result<Plan, Failure> {
    let host = mode == Mode::Foreground;
    let log = if request.keeps_log(host) {
        let log =
            LogWriter::create(&claim.data).map_err(|e| Failure::from(e).context("cannot make the log"))?;
        Some(Arc::new(Mutex::new(log)))
    } else {
        None
    };
    let input = match (request.interactive, mode) {
        (false, _) => Input::None,
        (true, Mode::Foreground) => Input::Host,
        (true, Mode::Background) => Input::Open,
    };
    Ok(Plan { terminal: request.terminal, input, output: Output { host, log } })
}

async fn create(
    request: &Request,
    storage: &Storage,
    agent: &Agent,
    process: &ProcessId,
    plan: &Plan,
) -> Result<(), AgentError> {
    let create = CreateContainerRequest {
        container_id: process.container_id.clone(),
        spec: request.spec.clone(),
        rootfs: Some(storage.rootfs.clone()).into(),
        stdio: Some(plan.stdio()).into(),
        user: request.record.user.clone(),
        ..Default::default()
    };
    agent.create_container(&create).await
}

/// Gives the machine its CPUs before the command starts, which may count them, and not while the container is created: that is one
/// thing after another, whose every change to the kernel's page tables would have to wait for the other CPUs.
async fn give_cpus(request: &Request, sandbox: &Sandbox, agent: &Agent) {
    let added = match request.machine.cpus {
        1 => Ok(()),
        count => sandbox.add_cpus(agent, count).await,
    };
    // One CPU is enough to run on.
    if let Err(error) = added {
        message::warn(&format!("the machine has only one CPU: {}", Failure::from(error)));
    }
}

/// Why a call to the agent failed, as an exit code and in words: the machine's end explains an agent that is gone.
async fn explain(sandbox: &Sandbox, error: AgentError) -> Failure {
    if let Some(code) = error.code() {
        return refusal(code, &error, "the container cannot be started");
    }
    match timeout(END_TIMEOUT, sandbox.ended()).await {
        Ok(end) => Failure::new(format!("{end}{}", console_text(&sandbox.console_tail()))),
        Err(_) => Failure::new(format!("{}{}", Failure::from(error), console_text(&sandbox.console_tail()))),
    }
}

/// What a refusal to start a process means to the user.
pub(crate) fn refusal(code: Code, error: &AgentError, what: &str) -> Failure {
    match code {
        Code::NOT_FOUND => Failure::with_code(EXIT_NOT_FOUND, error.to_string()),
        Code::PERMISSION_DENIED => Failure::with_code(EXIT_NOT_EXECUTABLE, error.to_string()),
        _ => Failure::new(format!("{what}: {error}")),
    }
}

/// A signal came before the container had started.
fn interrupted(signal: u32) -> Failure {
    Failure::with_code(
        u8::try_from(128 + signal).unwrap_or(EXIT_FAILURE),
        "interrupted before the container started",
    )
}
