//! One container's life: its machine, its process, and what is left in the end, which is nothing but its record and its log.

use std::sync::{Arc, Mutex};

use bulkhead_sandbox::agent::{AgentError, Code, ProcessId};
use bulkhead_sandbox::cgroup::SandboxCgroup;
use bulkhead_sandbox::container::NewContainer;
use bulkhead_sandbox::oci;
use bulkhead_sandbox::pod::{Pod, PodConfig, PodError};
use bulkhead_sandbox::sandbox::console_text;
use bulkhead_sandbox::timing::Stamp;

use super::detach;
use super::request::{Request, Workload};
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
    let ended = Box::pin(live(&request, &claim, mode, &mut signals, &mut timings)).await;
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
    let process = ProcessId::init(&record.id);
    let plan = plan(request, claim, mode)?;
    let pod = tokio::select! {
        pod = start(request, claim, &plan) => pod?,
        signal = signals.next() => return Err(interrupted(signal)),
    };
    timings.booted(pod.times());
    timings.connected(pod.connected(), pod.agent().details());
    timings.mark("container created");
    let raw = if request.terminal && plan.input == Input::Host { Some(RawTerminal::enter()?) } else { None };
    let (attached, cpus) = tokio::join!(Attached::connect(pod.socket(), &process, &plan), pod.cpus());
    let attached = attached?;
    // One CPU is enough to run on.
    if let Err(error) = cpus {
        message::warn(&format!("the machine has only one CPU: {}", Failure::from(error)));
    }
    // From here on the command may run, and signals are for it.
    if let Err(error) = pod.start_container(&process.container_id).await {
        return Err(explain(&pod, error).await);
    }
    timings.mark("container started");
    claim.running(Some(pod.pid()))?;
    if mode == Mode::Background {
        detach::report(&record.id)?;
    }
    let attended = attend(pod.agent(), &process, &attached, signals, raw.is_some()).await?;
    timings.mark("exit");
    let ended = match attended {
        Attended::Exited(response) => {
            let error = response
                .oom_killed
                .then(|| "the container ran out of memory: give it more with --memory".into());
            Ok(Ended { exit_code: exit_code(&response), error })
        }
        Attended::Lost(error) => Err(explain(&pod, error).await),
        Attended::Unanswered => Err(Failure::new(
            "the container was killed, and its machine too: the guest did not say that it ended",
        )),
    };
    // Nothing but the machine's end surely ends the output of a guest that has failed.
    let pod = ended.is_ok().then_some(pod);
    timings.first_output(attached.drain(Tail::End, signals).await);
    drop(raw);
    if let Some(pod) = pod {
        pod.stop();
    }
    // A container that had started has ended, whatever ended it.
    ended.or_else(|failure| Ok(Ended { exit_code: EXIT_FAILURE, error: Some(failure.to_string()) }))
}

/// Makes the container, up to the point where it can be started.
async fn start(request: &Request, claim: &Claim, plan: &Plan) -> Result<Arc<Pod>, Failure> {
    let Workload { spec, bundle, network, .. } = &request.workload;
    let first = NewContainer {
        id: &request.record.id,
        spec: spec.clone(),
        bundle,
        root: request.workload.root.prepare(claim, request.storage).await?,
        stdio: plan.stdio(),
        user: &request.record.user,
        sandbox: None,
    };
    let config = PodConfig {
        config: &request.config,
        artifacts: &request.artifacts,
        paths: &request.paths,
        directory: &claim.run,
        size: request.size,
        network: network.clone(),
        cgroup: cgroup(request, claim)?,
    };
    let starting = Box::pin(Pod::start(config, first));
    let started = progress::during("starting the container", starting).await;
    started.map_err(|error| match &error {
        PodError::Agent(agent) => match agent.code() {
            Some(code) => refusal(code, agent, "the container cannot be started"),
            None => error.into(),
        },
        _ => error.into(),
    })
}

/// The host's cgroup that the container's configuration asks for. Where it says nothing, the sandbox can do without.
fn cgroup(request: &Request, claim: &Claim) -> Result<Option<SandboxCgroup>, Failure> {
    let spec = &request.workload.spec;
    if let Some(path) = oci::cgroups_path(spec) {
        return Ok(claim.make_cgroup(path, request.size, spec)?);
    }
    let parent = &request.config.cgroups.parent;
    if parent.is_empty() {
        return Ok(None);
    }
    let made = claim.make_cgroup(&format!("{parent}/{}", request.record.id), request.size, spec);
    Ok(made.unwrap_or_else(|error| {
        message::warn(&format!(
            "nothing limits on the host what this sandbox takes: {}; if that is as it should be, set cgroups.parent to \"\" \
             in the configuration",
            Failure::from(error)
        ));
        None
    }))
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

/// Why a call to the agent failed, as an exit code and in words: the machine's end explains an agent that is gone.
async fn explain(pod: &Pod, error: AgentError) -> Failure {
    if let Some(code) = error.code() {
        return refusal(code, &error, "the container cannot be started");
    }
    let failure = match pod.explain(error).await {
        PodError::Agent(error) => {
            Failure::new(format!("{}{}", Failure::from(error), console_text(&pod.console_tail())))
        }
        ended => ended.into(),
    };
    if pod.cgroup().is_some_and(|cgroup| cgroup.oom_kills() > 0) {
        return failure
            .context("the host killed the sandbox, which took more memory than its cgroup may have");
    }
    failure
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
