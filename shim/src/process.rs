//! One process of a container: its first one, or an exec.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bulkhead_sandbox::agent::ProcessId;
use containerd_shim_protos::api::Status;
use tokio::sync::watch;

use crate::errors::TaskError;
use crate::io::{Attached, Stdio};

/// The exit status of a process whose machine is gone: that of a SIGKILL.
pub(crate) const KILLED: u32 = 137;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Its exit code, or 128 and the signal's number.
    pub(crate) status: u32,
    /// When the shim heard of it: the guest's clock is the guest's.
    pub(crate) at: SystemTime,
}

impl Exit {
    /// An end of now.
    pub(crate) fn now(status: u32) -> Self {
        Self { status, at: SystemTime::now() }
    }
}

/// Where a process is in its life. `Creating`, `Pausing` and `Paused` are states of a container's first process alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// The machine and the container are being made.
    Creating,
    /// It can be started.
    Created,
    /// It is being started.
    Starting,
    /// It runs.
    Running,
    /// The container is being frozen.
    Pausing,
    /// The container is frozen.
    Paused,
    /// It has ended, and its end has been published.
    Stopped(Exit),
}

impl State {
    /// As containerd calls it.
    pub(crate) fn status(&self) -> Status {
        match self {
            Self::Creating | Self::Created | Self::Starting => Status::CREATED,
            Self::Running => Status::RUNNING,
            Self::Pausing => Status::PAUSING,
            Self::Paused => Status::PAUSED,
            Self::Stopped(_) => Status::STOPPED,
        }
    }

    /// How it ended, if it has.
    pub(crate) fn exit(&self) -> Option<Exit> {
        match self {
            Self::Stopped(exit) => Some(*exit),
            _ => None,
        }
    }

    /// True while the guest has it running.
    pub(crate) fn is_alive(&self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Pausing | Self::Paused)
    }
}

/// A process.
#[derive(Debug)]
pub(crate) struct Process {
    /// What the agent calls it.
    pub(crate) id: ProcessId,
    /// Its program, for messages.
    pub(crate) program: Mutex<String>,
    /// What its standard streams are.
    pub(crate) stdio: Stdio,
    state: watch::Sender<State>,
    streams: Mutex<Streams>,
    /// Rows and columns of its terminal, as last told.
    size: Mutex<(u16, u16)>,
}

/// What goes on with a process's streams.
#[derive(Debug, Default)]
struct Streams {
    /// The copying, while it goes on.
    attached: Option<Arc<Attached>>,
    /// The client has closed the input, perhaps before there was any copying.
    input_closed: bool,
}

impl Process {
    /// A process that nothing has been done for yet.
    pub(crate) fn new(id: ProcessId, stdio: Stdio, state: State) -> Self {
        Self {
            id,
            program: Mutex::default(),
            stdio,
            state: watch::Sender::new(state),
            streams: Mutex::default(),
            size: Mutex::default(),
        }
    }

    /// Its state.
    pub(crate) fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Its state, to be waited for.
    pub(crate) fn watch(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Goes from one of the states that `from` allows to `to`.
    ///
    /// # Errors
    /// In any other state, in runc's words for `verb`.
    pub(crate) fn enter(&self, verb: &str, from: fn(&State) -> bool, to: State) -> Result<(), TaskError> {
        let mut refused = None;
        self.state.send_if_modified(|state| {
            if !from(state) {
                refused = Some(TaskError::state(verb, state));
                return false;
            }
            *state = to;
            true
        });
        refused.map_or(Ok(()), Err)
    }

    /// Goes from `from` to `to` if it is still there.
    pub(crate) fn advance(&self, from: State, to: State) -> bool {
        self.state.send_if_modified(|state| {
            let is_there = *state == from;
            if is_there {
                *state = to;
            }
            is_there
        })
    }

    /// Ends it; false when it had ended before.
    pub(crate) fn stop(&self, exit: Exit) -> bool {
        self.state.send_if_modified(|state| {
            let lives = state.exit().is_none();
            if lives {
                *state = State::Stopped(exit);
            }
            lives
        })
    }

    /// Waits for its end.
    pub(crate) async fn stopped(&self) -> Exit {
        let mut state = self.watch();
        match state.wait_for(|state| state.exit().is_some()).await {
            Ok(state) => state.exit().unwrap_or_else(|| Exit::now(KILLED)),
            // The sender is our own.
            Err(_) => Exit::now(KILLED),
        }
    }

    /// Takes the copying of its streams.
    pub(crate) fn attach(&self, attached: Attached) {
        let mut streams = self.streams();
        if streams.input_closed {
            attached.close_stdin();
        }
        streams.attached = Some(Arc::new(attached));
    }

    /// From its start on its input outlives the clients that write it, unless it is closed.
    pub(crate) fn hold_input(&self) {
        if let Some(attached) = &self.streams().attached {
            attached.hold_stdin();
        }
    }

    /// Ends its input with the last client that writes it, now or as soon as it has one.
    pub(crate) fn close_input(&self) {
        let mut streams = self.streams();
        streams.input_closed = true;
        if let Some(attached) = &streams.attached {
            attached.close_stdin();
        }
    }

    /// Ends the copying of its streams and closes the host's ends.
    pub(crate) fn detach(&self) {
        if let Some(attached) = self.streams().attached.take() {
            attached.cut();
        }
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all of its output has been passed on.
    pub(crate) async fn drained(&self) {
        let attached = self.streams().attached.clone();
        if let Some(attached) = attached {
            attached.drained().await;
        }
    }

    /// The size of its terminal.
    pub(crate) fn size(&self) -> (u16, u16) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers the size of its terminal.
    pub(crate) fn set_size(&self, size: (u16, u16)) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = size;
    }

    /// Its program.
    pub(crate) fn program(&self) -> String {
        self.program.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Remembers its program.
    pub(crate) fn set_program(&self, program: String) {
        *self.program.lock().unwrap_or_else(PoisonError::into_inner) = program;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(state: State) -> Process {
        Process::new(ProcessId::init("a"), Stdio::default(), state)
    }

    #[test]
    fn a_process_enters_a_state_only_from_one_that_allows_it() {
        let process = process(State::Created);
        let is_created = |state: &State| *state == State::Created;
        process.enter("start", is_created, State::Starting).unwrap();
        assert!(process.enter("start", is_created, State::Starting).is_err());
        assert!(process.advance(State::Starting, State::Running));
        assert!(!process.advance(State::Starting, State::Running));
        assert_eq!(process.state(), State::Running);
    }

    #[tokio::test]
    async fn a_process_ends_once_and_everybody_hears_of_it() {
        let process = Arc::new(process(State::Running));
        let waiters = [0; 3].map(|_| {
            let process = Arc::clone(&process);
            tokio::spawn(async move { process.stopped().await })
        });
        let exit = Exit::now(3);
        assert!(process.stop(exit));
        assert!(!process.stop(Exit::now(4)));
        for waiter in waiters {
            assert_eq!(waiter.await.unwrap(), exit);
        }
        assert!(!process.advance(State::Running, State::Paused));
        assert_eq!(process.stopped().await, exit);
    }
}
