//! Waits for the end of a process and passes on to it what reaches the launcher meanwhile.

use std::cell::Cell;
use std::time::Duration;

use bulkhead_sandbox::agent::messages::WaitProcessResponse;
use bulkhead_sandbox::agent::{Agent, AgentError, ProcessId};
use tokio::time::sleep;

use super::attach::Attached;
use super::signals::Signals;
use super::terminal;
use crate::failure::Failure;

const SIGKILL: u32 = 9;
/// What a shell says of a program that SIGPIPE has ended.
const EXIT_SIGPIPE: u32 = 128 + 13;
/// How long a process may go on when nobody reads its output.
const REFUSED_GRACE: Duration = Duration::from_secs(2);

/// How long after that it may take to be known as ended.
const KILLED_GRACE: Duration = Duration::from_secs(10);

/// How waiting for a process ended.
#[derive(Debug)]
pub(crate) enum Attended {
    /// The process ended.
    Exited(WaitProcessResponse),
    /// The agent cannot be asked any more.
    Lost(AgentError),
    /// The process was killed because nobody reads what it writes, and the agent does not say that it has ended.
    Unanswered,
}

/// Waits until the process ends. Signals are forwarded; with a terminal, its size too. A process that goes on although nobody
/// reads what it writes is killed: the first process of a container has no SIGPIPE that would do it.
pub(crate) async fn attend(
    agent: &Agent,
    process: &ProcessId,
    attached: &Attached,
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
    let killed = Cell::new(false);
    let refused = async {
        attached.refused().await;
        sleep(REFUSED_GRACE).await;
        killed.set(true);
        pass(agent.signal(process, SIGKILL).await);
        sleep(KILLED_GRACE).await;
    };
    tokio::pin!(wait, refused);
    loop {
        let resized = async {
            match &mut resizes {
                Some(resizes) => resizes.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = &mut wait => return Ok(match ended {
                Ok(response) if killed.get() => {
                    Attended::Exited(WaitProcessResponse { exit_status: EXIT_SIGPIPE, ..response })
                }
                Ok(response) => Attended::Exited(response),
                Err(error) => Attended::Lost(error),
            }),
            () = &mut refused => return Ok(Attended::Unanswered),
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
