//! Waits for the end of a process and passes on to it what reaches the launcher meanwhile.

use bulkhead_sandbox::agent::messages::WaitProcessResponse;
use bulkhead_sandbox::agent::{Agent, AgentError, ProcessId};

use super::signals::Signals;
use super::terminal;
use crate::failure::Failure;

/// How waiting for a process ended.
#[derive(Debug)]
pub(crate) enum Attended {
    /// The process ended.
    Exited(WaitProcessResponse),
    /// The agent cannot be asked any more.
    Lost(AgentError),
}

/// Waits until the process ends. Signals are forwarded; with a terminal, its size too.
pub(crate) async fn attend(
    agent: &Agent,
    process: &ProcessId,
    signals: &mut Signals,
    has_terminal: bool,
) -> Result<Attended, Failure> {
    let mut resizes = if has_terminal { Some(Signals::resize()?) } else { None };
    if has_terminal {
        // It may have changed since the process was made.
        let (rows, columns) = terminal::size();
        pass(agent.resize(process, rows, columns).await);
    }
    let wait = agent.wait(process);
    tokio::pin!(wait);
    loop {
        let resized = async {
            match &mut resizes {
                Some(resizes) => resizes.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = &mut wait => return Ok(ended.map_or_else(Attended::Lost, Attended::Exited)),
            signal = signals.next() => pass(agent.signal(process, signal).await),
            _ = resized => {
                let (rows, columns) = terminal::size();
                pass(agent.resize(process, rows, columns).await);
            }
        }
    }
}

/// A process that has just ended takes neither signals nor sizes.
fn pass(result: Result<(), AgentError>) {
    if let Err(error) = result {
        tracing::debug!(%error, "not passed on");
    }
}

/// The exit code of a process as the launcher's own.
pub(crate) fn exit_code(response: &WaitProcessResponse) -> u8 {
    u8::try_from(response.exit_status).unwrap_or(u8::MAX)
}
