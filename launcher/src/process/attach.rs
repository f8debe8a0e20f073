//! Copies between the launcher's standard streams, a container's log and the streams of a process in a container.
//!
//! Nothing is buffered here beyond one piece: whoever reads slowly slows the writer down, and an end on one side becomes an
//! end on the other.

use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_protocol::stream::{Stream, StreamHeader};
use bulkhead_sandbox::agent::ProcessId;
use bulkhead_sandbox::agent::messages::Stdio;
use bulkhead_sandbox::stream;
use bulkhead_sandbox::timing::Stamp;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::signals::Signals;
use super::stdio::HostStream;
use super::terminal;
use crate::failure::Failure;
use crate::log::LogWriter;

/// Bytes that are copied at a time.
const PIECE: usize = 64 << 10;
/// After the end of a process whose output somebody else may hold open, it is over when nothing has come for so long.
const DRAIN_IDLE: Duration = Duration::from_secs(2);
/// And when so long was spent waiting for it in all, which is all that is left to a guest that goes on for ever. The time that
/// whoever reads it takes is not counted.
const DRAIN_TOTAL: Duration = Duration::from_secs(10);

/// Where a process's input comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// It has none.
    None,
    /// The launcher's standard input.
    Host,
    /// Nowhere, but it does not end.
    Open,
}

/// Where a process's output goes.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    /// To the launcher's standard streams.
    pub(crate) host: bool,
    /// To a log.
    pub(crate) log: Option<Arc<Mutex<LogWriter>>>,
}

/// What may come of a process's output once the process has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tail {
    /// Its end: of the first process of a container nobody is left who could hold it open.
    End,
    /// Its end, or nothing for a while: an orphan in the container may hold it open.
    EndOrSilence,
}

/// What a process's standard streams are.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// One terminal instead of three streams.
    pub(crate) terminal: bool,
    /// Where its input comes from.
    pub(crate) input: Input,
    /// Where its output goes.
    pub(crate) output: Output,
}

impl Plan {
    /// What the agent is told.
    pub(crate) fn stdio(&self) -> Stdio {
        let (rows, columns) = if self.terminal { terminal::size() } else { (0, 0) };
        Stdio {
            terminal: self.terminal,
            rows: rows.into(),
            columns: columns.into(),
            stdin: self.input != Input::None,
            stdout: true,
            stderr: !self.terminal,
            ..Default::default()
        }
    }
}

/// The copying that goes on for one process.
#[derive(Debug)]
pub(crate) struct Attached {
    input: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
    ended: watch::Sender<Option<Instant>>,
    refused: Arc<Notify>,
    first_output: Arc<OnceLock<Stamp>>,
}

impl Attached {
    /// Connects the streams of a process that the agent has made, and begins to copy.
    pub(crate) async fn connect(socket: &Path, process: &ProcessId, plan: &Plan) -> Result<Self, Failure> {
        let open = |stream| {
            let header = StreamHeader {
                stream,
                container_id: process.container_id.clone(),
                exec_id: process.exec_id.clone(),
            };
            async move { stream::open(socket, &header).await }
        };
        let open_if = |wanted: bool, stream| async move {
            if wanted { open(stream).await.map(Some) } else { Ok(None) }
        };
        let (stdin, stdout, stderr) = tokio::try_join!(
            open_if(plan.input != Input::None, Stream::Stdin),
            open(Stream::Stdout),
            open_if(!plan.terminal, Stream::Stderr)
        )?;
        let (ended, watching) = watch::channel(None);
        let refused = Arc::new(Notify::new());
        let first_output = Arc::new(OnceLock::new());
        let mut outputs = Vec::new();
        for (stream, connection) in [(Stream::Stdout, Some(stdout)), (Stream::Stderr, stderr)] {
            let Some(connection) = connection else { continue };
            let host = match (plan.output.host, stream) {
                (false, _) => None,
                (true, Stream::Stderr) => Some(HostStream::stderr()?),
                (true, _) => Some(HostStream::stdout()?),
            };
            let sink = Sink { stream, host, log: plan.output.log.clone(), first: Arc::clone(&first_output) };
            let (ended, refused) = (watching.clone(), Arc::clone(&refused));
            outputs.push(tokio::spawn(async move {
                if !copy_output(connection, &sink, ended).await && sink.stream == Stream::Stdout {
                    refused.notify_one();
                }
            }));
        }
        let input = match (stdin, plan.input) {
            (Some(connection), Input::Host) => {
                Some(tokio::spawn(copy_input(HostStream::stdin()?, connection)))
            }
            (Some(connection), _) => Some(tokio::spawn(hold(connection))),
            (None, _) => None,
        };
        Ok(Self { input, outputs, ended, refused, first_output })
    }

    /// Waits until nobody reads the launcher's standard output any more.
    pub(crate) async fn refused(&self) {
        self.refused.notified().await;
    }

    /// The process has ended: takes what it has still written, and returns when that is over or a signal wants no more of it.
    /// When the first output came.
    pub(crate) async fn drain(mut self, tail: Tail, signals: &mut Signals) -> Option<Stamp> {
        if tail == Tail::EndOrSilence {
            self.ended.send_replace(Some(Instant::now()));
        }
        let over = async {
            for output in &mut self.outputs {
                // A copy that failed has nothing more to say.
                let _ = output.await;
            }
        };
        tokio::select! {
            () = over => {}
            signal = signals.next() => tracing::debug!(signal, "the rest of the output is left out"),
        }
        self.first_output.get().copied()
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        for task in self.input.iter().chain(&self.outputs) {
            task.abort();
        }
    }
}

struct Sink {
    stream: Stream,
    host: Option<HostStream>,
    log: Option<Arc<Mutex<LogWriter>>>,
    first: Arc<OnceLock<Stamp>>,
}

impl Sink {
    /// False when nobody takes the output any more.
    async fn take(&self, output: &[u8]) -> bool {
        self.first.get_or_init(Stamp::now);
        if let Some(log) = &self.log
            && let Err(error) = log.lock().unwrap_or_else(PoisonError::into_inner).write(self.stream, output)
        {
            // A full disk must not end the container.
            tracing::warn!(%error, "output is missing from the log");
        }
        match &self.host {
            Some(host) => host.write_all(output).await.is_ok(),
            None => true,
        }
    }
}

/// Copies until the end of the output. When nobody takes it any more, the connection closes, and the process meets a broken
/// pipe as it would have without a container; the answer is then false.
async fn copy_output(
    mut connection: UnixStream,
    sink: &Sink,
    mut ended: watch::Receiver<Option<Instant>>,
) -> bool {
    let mut piece = vec![0; PIECE];
    let mut patience = DRAIN_TOTAL;
    loop {
        let began = Instant::now();
        let idle = async {
            // A sender that is gone takes this task with it.
            let _ = ended.wait_for(Option::is_some).await;
            sleep(DRAIN_IDLE.min(patience)).await;
        };
        let count = tokio::select! {
            biased;
            read = connection.read(&mut piece) => read.unwrap_or(0),
            () = idle => 0,
        };
        if let Some(ended) = *ended.borrow() {
            patience = patience.saturating_sub(began.max(ended).elapsed());
        }
        if count == 0 || patience.is_zero() {
            return true;
        }
        if !sink.take(&piece[..count]).await {
            return false;
        }
    }
}

/// Copies until the end of the input, which becomes the end of the process's input, or until the process takes no more.
async fn copy_input(host: HostStream, mut connection: UnixStream) {
    let mut piece = vec![0; PIECE];
    loop {
        let count = host.read(&mut piece).await.unwrap_or(0);
        if count == 0 || connection.write_all(&piece[..count]).await.is_err() {
            break;
        }
    }
    // Shut down, not closed: closing would hang the stream up.
    if connection.shutdown().await.is_ok() {
        hold(connection).await;
    }
}

/// Keeps a connection until the guest closes it.
async fn hold(mut connection: UnixStream) {
    let mut nothing = [0; 1];
    // Standard input carries nothing in this direction: whatever comes, or an error, is its end.
    let _ = connection.read(&mut nothing).await;
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::log::CURRENT;

    fn sink(directory: &Path) -> Sink {
        let log = LogWriter::create(directory).unwrap();
        Sink {
            stream: Stream::Stdout,
            host: None,
            log: Some(Arc::new(Mutex::new(log))),
            first: Arc::default(),
        }
    }

    #[tokio::test]
    async fn an_end_that_an_orphan_holds_back_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (mut guest, connection) = UnixStream::pair().unwrap();
        let (_ended, watching) = watch::channel(Some(Instant::now()));
        guest.write_all(b"last words").await.unwrap();
        assert!(copy_output(connection, &sink(dir.path()), watching).await);
        assert!(fs::read_to_string(dir.path().join(CURRENT)).unwrap().ends_with(" last words\n"));
        drop(guest);
    }

    #[tokio::test]
    async fn output_that_drips_for_ever_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let (mut guest, connection) = UnixStream::pair().unwrap();
        let (_ended, watching) = watch::channel(Some(Instant::now()));
        let dripping = tokio::spawn(async move {
            while guest.write_all(b"x").await.is_ok() {
                sleep(Duration::from_millis(50)).await;
            }
        });
        assert!(copy_output(connection, &sink(dir.path()), watching).await);
        dripping.await.unwrap();
    }
}
