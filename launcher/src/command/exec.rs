//! `exec`: another process in a running container, over a connection of its own.

use bulkhead_sandbox::agent::messages::ExecProcessRequest;
use bulkhead_sandbox::agent::{Agent, AgentError, ProcessId};
use bulkhead_sandbox::paths::Paths;

use crate::cli::ExecArgs;
use crate::container::name;
use crate::container::registry::{Container, Registry, State};
use crate::failure::Failure;
use crate::message;
use crate::process::attach::{Attached, Input, Output, Plan, Tail};
use crate::process::attend::{Attended, attend, exit_code};
use crate::process::signals::Signals;
use crate::process::terminal::{self, RawTerminal};
use crate::run::refusal;
use crate::runtime;
use crate::spec::build::exec_process;

/// Runs a command in a container and returns its exit code.
pub(crate) fn exec(args: &ExecArgs) -> Result<u8, Failure> {
    if args.process.tty && args.process.interactive {
        terminal::require()?;
    }
    let registry = Registry::open(&Paths::from_environment())?;
    let container = registry.find(&args.container)?;
    if !matches!(container.state, State::Live(_)) {
        return Err(Failure::new(format!(
            "container {} has ended: `bulkhead ps` lists those that run",
            container.record.name
        )));
    }
    runtime::block_on(run(args, &registry, &container))
}

async fn run(args: &ExecArgs, registry: &Registry, container: &Container) -> Result<u8, Failure> {
    let mut signals = Signals::forwarded()?;
    let record = &container.record;
    let socket = registry.socket(&record.id);
    let gone = |error: AgentError| match error.code() {
        Some(code) => refusal(code, &error, "the command cannot be started"),
        None => Failure::from(error).context(&format!("container {} cannot be reached", record.name)),
    };
    let agent = Agent::connect(&socket).await.map_err(gone)?;
    // A host that was suspended has left its guests behind. A wrong clock is no reason to run nothing.
    if let Err(error) = agent.set_clock().await {
        tracing::warn!(%error, "the guest's clock is not set");
    }
    let command = match &args.command[..] {
        [first, rest @ ..] if first == "--" && !rest.is_empty() => rest,
        command => command,
    };
    let process = exec_process(&record.process, &args.process, command)?;
    let (exec_id, _) = name::generate()?;
    let id = ProcessId { container_id: record.id.clone(), exec_id };
    let plan = Plan {
        terminal: args.process.tty,
        input: if args.process.interactive { Input::Host } else { Input::None },
        output: Output { host: true, log: None },
    };
    let request = ExecProcessRequest {
        container_id: id.container_id.clone(),
        exec_id: id.exec_id.clone(),
        process: serde_json::to_vec(&process)?,
        stdio: Some(plan.stdio()).into(),
        user: args.process.user.clone().unwrap_or_else(|| record.user.clone()),
        ..Default::default()
    };
    let raw = if args.process.tty && args.process.interactive { Some(RawTerminal::enter()?) } else { None };
    agent.exec_process(&request).await.map_err(gone)?;
    let attached = Attached::connect(&socket, &id, &plan).await?;
    let attended = attend(&agent, &id, &attached, &mut signals, raw.is_some()).await?;
    attached.drain(Tail::EndOrSilence, &mut signals).await;
    drop(raw);
    match attended {
        Attended::Exited(response) => {
            if response.oom_killed {
                message::warn("the container ran out of memory");
            }
            Ok(exit_code(&response))
        }
        Attended::Lost(error) => Err(Failure::from(error).context("the container ended")),
        Attended::Unanswered => Err(Failure::new(format!(
            "the command was killed, but the guest does not say that it ended: `bulkhead kill {}` ends the container",
            record.name
        ))),
    }
}
