//! The life of containers: what PID 1 does about a call, between the table, the zygote and the kernel.
//!
//! Nothing here holds a lock while it waits, so a creation that hangs keeps no other call from being answered.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bulkhead_protocol::agent::{CreateContainerRequest, ExecProcessRequest, SharedNamespace, Stdio};
use bulkhead_protocol::limits::CREATE_TIMEOUT_S;
use protobuf::Message as _;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::cgroup::{self, Cgroup, settings};
use crate::container::{START_DIRECTORY, namespaces};
use crate::descriptor::{Descriptor, nonblocking};
use crate::process::{Error as TableError, Process, State, Table};
use crate::streams::Streams;
use crate::zygote::protocol::{Failure, FailureKind, Job, Reply, Request};
use crate::zygote::{self, Zygote};

/// How long a worker may take: a little less than the host waits for it.
const WORKER_PATIENCE: Duration = Duration::from_secs(CREATE_TIMEOUT_S - 5);
/// How long a process may take to end after SIGKILL.
const KILL_PATIENCE: Duration = Duration::from_secs(20);
/// Longest record of a failure that a process may leave, in bytes.
const OUTCOME_MAX: usize = 4096;

/// Why a call was not fulfilled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Table(#[from] TableError),
    #[error("{}", .0.text)]
    Failed(Failure),
    #[error("{0}")]
    Io(&'static str, #[source] io::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error("encode the call")]
    Encode(#[from] protobuf::Error),
    #[error(transparent)]
    Limits(#[from] settings::Error),
    #[error(transparent)]
    Namespaces(#[from] namespaces::Error),
    #[error("the processes of container {0} do not end")]
    Unkillable(String),
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// What starts a process that has been prepared.
pub(crate) struct Start {
    /// Where it waits for a connection.
    socket: String,
    /// Where it writes why it could not execute its program; executing it closes this.
    outcome: Descriptor,
}

impl Start {
    pub(crate) fn new(socket: String, outcome: Descriptor) -> Self {
        Self { socket, outcome }
    }
}

/// All that the agent does for containers.
pub(crate) struct Lifecycle {
    pub(crate) table: Table,
    zygote: Zygote,
    /// Makes names of sockets.
    next: AtomicU64,
}

impl Lifecycle {
    pub(crate) fn new(zygote: Zygote) -> Arc<Self> {
        Arc::new(Self { table: Table::default(), zygote, next: AtomicU64::new(0) })
    }

    /// The process id of the zygote.
    pub(crate) fn zygote(&self) -> i32 {
        self.zygote.pid
    }

    /// Creates a container and returns the process id of its init.
    pub(crate) async fn create(self: Arc<Self>, call: CreateContainerRequest) -> Result<i32, Error> {
        let id = call.container_id.clone();
        let shared = self.open_shared(&call.shared_namespaces)?;
        let (streams, ends) =
            Streams::new(&call.stdio).map_err(|error| Error::Io("make the streams", error))?;
        let process = Process::new(streams);
        let job = Job { stdio: ends, namespaces: shared, ..Job::default() };
        let stop = self.table.reserve(&id, Arc::clone(&process))?;
        let request =
            |start: &str| Ok(Request::Create { call: call.write_to_bytes()?, start: start.to_owned() });
        let result = self.prepare(&id, "", &process, job, &call.stdio, stop.clone(), request).await;
        if result.is_ok() {
            tokio::spawn(Arc::clone(&process.streams).expire());
        } else {
            // The worker has cleaned up after itself, unless it was killed.
            if let Err(error) = self.discard(&id).await {
                tracing::error!("clean up after container {id}: {error}");
            }
            self.table.forget(&id, "");
        }
        drop(stop);
        result
    }

    /// Opens namespaces of containers, whose processes cannot be reaped meanwhile: that is done by this thread.
    fn open_shared(&self, shared: &[SharedNamespace]) -> Result<Vec<OwnedFd>, Error> {
        let kinds = namespaces::kinds(shared)?;
        let open = |(shared, kind): (&SharedNamespace, _)| {
            let id = &shared.container_id;
            let init = self.table.process(id, "").map_err(making_a_process)?;
            let precondition = |text| Error::Failed(Failure::new(FailureKind::Precondition, text));
            let Some(pid) = init.pid() else {
                return Err(TableError::State(id.clone(), State::Creating).into());
            };
            if init.ended().is_some() {
                return Err(TableError::State(id.clone(), State::Stopped).into());
            }
            namespaces::open(kind, pid).map_err(|error| {
                precondition(format!("share the {kind} namespace of container {id}: {error}"))
            })
        };
        shared.iter().zip(kinds).map(open).collect()
    }

    /// Starts a container's process; returns when its program has been executed.
    pub(crate) async fn start(self: Arc<Self>, id: String) -> Result<(), Error> {
        self.table.advance(&id, &[State::Created], State::Starting).map_err(making_a_process)?;
        let process = self.table.process(&id, "")?;
        let started = start(&process).await;
        // It may have ended by now, or be on its way out.
        let state = if started.is_ok() { State::Running } else { State::Stopped };
        let _ = self.table.advance(&id, &[State::Starting], state);
        started
    }

    /// Runs a process in a container; returns its id when its program has been executed.
    pub(crate) async fn exec(self: Arc<Self>, call: ExecProcessRequest) -> Result<i32, Error> {
        let (id, exec) = (call.container_id.clone(), call.exec_id.clone());
        let (streams, ends) =
            Streams::new(&call.stdio).map_err(|error| Error::Io("make the streams", error))?;
        let process = Process::new(streams);
        let init = self.table.reserve_exec(&id, &exec, Arc::clone(&process)).map_err(making_a_process)?;
        let never = watch::channel(false).1;
        let request =
            |start: &str| Ok(Request::Exec { call: call.write_to_bytes()?, start: start.to_owned(), init });
        let job = Job { stdio: ends, ..Job::default() };
        let result = match self.prepare(&id, &exec, &process, job, &call.stdio, never, request).await {
            Ok(pid) => start(&process).await.map(|()| pid),
            Err(error) => Err(error),
        };
        if result.is_ok() {
            // The host connects when it has the answer, and a start may take longer than it has for that.
            tokio::spawn(Arc::clone(&process.streams).expire());
        } else {
            self.table.forget(&id, &exec);
        }
        result
    }

    /// Removes a container and all that is left of it.
    pub(crate) async fn remove(self: Arc<Self>, id: String, force: bool) -> Result<(), Error> {
        let state = self.table.state(&id)?;
        if state == State::Creating && force {
            let stop = self.table.stop_of_creation(&id)?;
            stop.send_replace(true);
            Cgroup::of(&id).kill()?;
            stop.closed().await;
            if self.table.state(&id).is_err() {
                return Ok(());
            }
        }
        let removable: &[State] = if force {
            &[State::Created, State::Starting, State::Running, State::Stopped]
        } else {
            &[State::Created, State::Stopped]
        };
        self.table.advance(&id, removable, State::Removing)?;
        let removed = self.end_and_discard(&id).await;
        match removed {
            Ok(()) => self.table.forget(&id, ""),
            // It can be tried again.
            Err(_) => drop(self.table.advance(&id, &[State::Removing], State::Stopped)),
        }
        removed
    }

    async fn end_and_discard(&self, id: &str) -> Result<(), Error> {
        Cgroup::of(id).kill()?;
        let init = self.table.process(id, "")?;
        let ended = timeout(KILL_PATIENCE, init.wait()).await;
        ended.map_err(|_| Error::Unkillable(id.to_owned()))?;
        self.discard(id).await
    }

    /// Has a worker remove what there is of a container besides its place in the table.
    async fn discard(&self, id: &str) -> Result<(), Error> {
        let request = Request::Remove { container_id: id.to_owned() };
        let never = std::future::pending();
        let removed = self.zygote.run(&request, Job::default(), WORKER_PATIENCE, never, |_, _| ()).await;
        removed.map_err(|error| Failure::from(error).into())
    }

    /// Has a worker make a process that waits for its start.
    #[allow(clippy::too_many_arguments)]
    async fn prepare(
        &self,
        id: &str,
        exec: &str,
        process: &Arc<Process>,
        mut job: Job,
        stdio: &Stdio,
        mut stop: watch::Receiver<bool>,
        request: impl FnOnce(&str) -> Result<Request, Error>,
    ) -> Result<i32, Error> {
        let socket = format!("{START_DIRECTORY}/{}", self.next.fetch_add(1, Ordering::Relaxed));
        let request = request(&socket)?;
        let (outcome, outcome_end) =
            pipe_with(PipeFlags::CLOEXEC).map_err(|error| Error::Io("make a pipe", error.into()))?;
        let outcome = nonblocking(outcome).map_err(|error| Error::Io("watch a pipe", error))?;
        job.outcome = Some(outcome_end);
        let stopped = async move {
            // The sender is in the table for as long as this container is; if it were not, nobody could stop this.
            if stop.wait_for(|&stop| stop).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let mut outcome = Some(outcome);
        let claim = |reply: Reply, terminal| {
            let Reply::Prepared { pid } = reply else { return Err(zygote::Error::Died) };
            if let Some(terminal) = terminal
                && let Err(error) = process.streams.set_terminal(terminal, stdio)
            {
                // The process will be hung up.
                tracing::error!("watch the terminal of container {id}: {error}");
            }
            if let Some(outcome) = outcome.take() {
                self.table.born(id, exec, process, pid, Start::new(socket.clone(), outcome));
            }
            Ok(pid)
        };
        let result = self.zygote.run(&request, job, WORKER_PATIENCE, stopped, claim).await.flatten();
        match result {
            Ok(pid) => Ok(pid),
            Err(error) => {
                let _ = std::fs::remove_file(&socket);
                // What the process itself said tells more than what libcontainer made of it.
                let said = outcome.as_ref().and_then(|outcome| record(&read_now(outcome)));
                Err(said.unwrap_or_else(|| error.into()).into())
            }
        }
    }
}

/// When a process is made, "not found" tells of its program and of nothing else.
fn making_a_process(error: TableError) -> Error {
    match error {
        TableError::NoContainer(_) => Failure::new(FailureKind::Precondition, error.to_string()).into(),
        other => other.into(),
    }
}

/// Lets a prepared process go on, and waits until it has executed its program. One that does not get there, because something in its
/// container has stopped it, is killed.
async fn start(process: &Process) -> Result<(), Error> {
    let precondition = |text: &str| Error::Failed(Failure::new(FailureKind::Precondition, text));
    let Start { socket, outcome } =
        process.take_start().ok_or_else(|| precondition("it was started before"))?;
    // The connection is the signal; nothing is said over it. It is made at once, for nobody else connects.
    let connected = UnixStream::connect(Path::new(&socket));
    let _ = std::fs::remove_file(&socket);
    connected.map_err(|_| precondition("the process ended before it was started"))?;
    let Ok(said) = timeout(WORKER_PATIENCE, read_all(&outcome)).await else {
        process.signal(libc::SIGKILL).map_err(|error| Error::Io("kill a process", error))?;
        let text = format!("it did not execute its program within {WORKER_PATIENCE:?}");
        return Err(Failure::new(FailureKind::Internal, text).into());
    };
    record(&said?).map_or(Ok(()), |failure| Err(failure.into()))
}

/// What comes out of a pipe until its end.
async fn read_all(pipe: &Descriptor) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    loop {
        let mut ready = pipe.readable().await.map_err(|error| Error::Io("wait for a process", error))?;
        match read_more(pipe, &mut bytes) {
            Some(true) => {}
            Some(false) => return Ok(bytes),
            None => ready.clear_ready(),
        }
    }
}

/// What a pipe holds now.
fn read_now(pipe: &Descriptor) -> Vec<u8> {
    let mut bytes = Vec::new();
    while read_more(pipe, &mut bytes) == Some(true) {}
    bytes
}

/// True when there was something, false at the end, none when there is nothing yet.
fn read_more(pipe: &Descriptor, bytes: &mut Vec<u8>) -> Option<bool> {
    let mut buffer = [0; OUTCOME_MAX];
    match rustix::io::read(pipe.get_ref(), &mut buffer[..]) {
        Ok(0) => Some(false),
        Ok(length) if bytes.len() < OUTCOME_MAX => {
            bytes.extend_from_slice(&buffer[..length]);
            Some(true)
        }
        Ok(_) => Some(true),
        Err(rustix::io::Errno::AGAIN) => None,
        Err(_) => Some(false),
    }
}

/// The first failure that was written.
fn record(bytes: &[u8]) -> Option<Failure> {
    postcard::take_from_bytes(bytes).ok().map(|(failure, _)| failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_several_records_counts() {
        let first = Failure::new(FailureKind::CommandNotFound, "first");
        let mut bytes = postcard::to_stdvec(&first).unwrap();
        bytes.extend(postcard::to_stdvec(&Failure::new(FailureKind::Internal, "second")).unwrap());
        assert_eq!(record(&bytes), Some(first));
        assert_eq!(record(b""), None);
    }
}
