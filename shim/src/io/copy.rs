//! Copies between the guest's streams and the host's ends. One piece of a stream is held at a time: whoever reads slowly slows
//! the writer down, and an end on one side becomes an end on the other.

use std::path::Path;
use std::sync::{Arc, Weak};

use bulkhead_protocol::stream::{Stream, StreamHeader};
use bulkhead_sandbox::agent::ProcessId;
use bulkhead_sandbox::stream::{self, StreamError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::{HostEnds, IoError, PIECE, Sink, binary, fifo};

/// The copying that goes on for one process. Dropped, it ends, and with it the host's ends are closed.
#[derive(Debug)]
pub(crate) struct Attached {
    tasks: Vec<AbortHandle>,
    outputs: watch::Sender<usize>,
    /// Gone when the input has ended.
    stdin: Weak<fifo::Input>,
    _logger: Option<binary::Logger>,
}

impl Attached {
    /// Connects the streams of a process that the agent has made, and begins to copy.
    pub(crate) async fn connect(socket: &Path, process: &ProcessId, ends: HostEnds) -> Result<Self, IoError> {
        let open_if = |wanted: bool, stream| async move {
            if !wanted {
                return Ok(None);
            }
            let (container_id, exec_id) = (process.container_id.clone(), process.exec_id.clone());
            let header = StreamHeader { stream, container_id, exec_id };
            stream::open(socket, &header).await.map(Some)
        };
        let HostEnds { stdin, stdout, stderr, logger, wanted } = ends;
        let (guest_stdin, guest_stdout, guest_stderr) = tokio::try_join!(
            open_if(wanted.stdin, Stream::Stdin),
            open_if(wanted.stdout, Stream::Stdout),
            open_if(wanted.stderr, Stream::Stderr)
        )
        .map_err(|error: StreamError| IoError::Guest(error))?;

        let mut attached =
            Self { tasks: Vec::new(), outputs: watch::Sender::new(0), stdin: Weak::new(), _logger: logger };
        for (connection, sink) in [(guest_stdout, stdout), (guest_stderr, stderr)] {
            if let (Some(connection), Some(sink)) = (connection, sink) {
                attached.copy_output(connection, sink);
            }
        }
        if let (Some(connection), Some(stdin)) = (guest_stdin, stdin) {
            let stdin = Arc::new(stdin);
            attached.stdin = Arc::downgrade(&stdin);
            attached.tasks.push(tokio::spawn(copy_input(stdin, connection)).abort_handle());
        }
        Ok(attached)
    }

    fn copy_output(&mut self, connection: UnixStream, sink: Sink) {
        self.outputs.send_modify(|running| *running += 1);
        let outputs = self.outputs.clone();
        let copying = tokio::spawn(async move {
            copy_output(connection, sink).await;
            outputs.send_modify(|running| *running = running.saturating_sub(1));
        });
        self.tasks.push(copying.abort_handle());
    }

    /// From here on the process's input, unless it has ended, outlives its writers.
    pub(crate) fn hold_stdin(&self) {
        if let Some(stdin) = self.stdin.upgrade() {
            stdin.hold();
        }
    }

    /// From here on the process's input ends with its last writer, if there is any.
    pub(crate) fn close_stdin(&self) {
        if let Some(stdin) = self.stdin.upgrade() {
            stdin.close();
        }
    }

    /// Waits until all output has come and has been passed on.
    pub(crate) async fn drained(&self) {
        // The sender is our own: it is not gone.
        let _ = self.outputs.subscribe().wait_for(|running| *running == 0).await;
    }

    /// Ends the copying and closes the host's ends; whoever waits for the rest of the output does so no longer.
    pub(crate) fn cut(&self) {
        for task in &self.tasks {
            task.abort();
        }
        self.outputs.send_replace(0);
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.cut();
    }
}

async fn copy_output(mut connection: UnixStream, sink: Sink) {
    let mut piece = vec![0; PIECE];
    let mut complained = false;
    loop {
        // An error is as final as the end.
        let count = connection.read(&mut piece).await.unwrap_or(0);
        if count == 0 {
            return;
        }
        let written = match &sink {
            Sink::Null => Ok(()),
            Sink::Fifo(fifo) => fifo.write_all(&piece[..count]).await,
            Sink::Logger(pipe) => pipe.write_all(&piece[..count]).await,
            Sink::File(file) => file.write_all(piece[..count].to_vec()).await,
        };
        // A full disk or a logger that has died must not end the container: what it writes is read on.
        if let Err(error) = written
            && !std::mem::replace(&mut complained, true)
        {
            tracing::warn!(%error, "output of a container is lost");
        }
    }
}

/// Copies until the end of the input, which becomes the end of the process's input, or until the process takes no more.
async fn copy_input(input: Arc<fifo::Input>, connection: UnixStream) {
    let mut piece = vec![0; PIECE];
    let (mut guest, mut process) = connection.into_split();
    let mut nothing = [0; 1];
    loop {
        let count = tokio::select! {
            biased;
            read = input.read(&mut piece) => read.unwrap_or(0),
            // Standard input carries nothing in this direction: whatever comes, or an error, is its end.
            _ = guest.read(&mut nothing) => return,
        };
        if count == 0 {
            break;
        }
        if process.write_all(&piece[..count]).await.is_err() {
            return;
        }
    }
    drop((input, piece));
    // Shut down, not closed: closing would hang the stream up.
    if process.shutdown().await.is_ok() {
        let _ = guest.read(&mut nothing).await;
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::fs::OpenOptionsExt;
    use std::path::PathBuf;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;
    use crate::io::{Owner, Stdio};

    fn fifo(directory: &Path, name: &str) -> String {
        let path = directory.join(name);
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        path.to_str().unwrap().to_owned()
    }

    async fn ends(stdio: &Stdio) -> HostEnds {
        HostEnds::open(stdio, Owner { namespace: "ns", id: "a" }).await.unwrap()
    }

    #[tokio::test]
    async fn eight_mebibytes_in_a_burst_arrive_whole_and_then_the_end() {
        let directory = tempfile::tempdir().unwrap();
        let stdout = fifo(directory.path(), "out");
        let ends = ends(&Stdio { stdout: stdout.clone(), ..Default::default() }).await;
        let (mut guest, connection) = UnixStream::pair().unwrap();
        let copying = tokio::spawn(copy_output(connection, ends.stdout.unwrap()));
        let reading = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            File::open(stdout).unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        });
        let sent: Vec<u8> = (0..8_u32 << 20).map(|n| u8::try_from(n % 251).unwrap()).collect();
        guest.write_all(&sent).await.unwrap();
        drop(guest);
        copying.await.unwrap();
        assert!(reading.await.unwrap() == sent);
    }

    #[tokio::test]
    async fn a_reader_that_never_reads_stops_the_process_and_costs_no_memory() {
        let directory = tempfile::tempdir().unwrap();
        let stdout = fifo(directory.path(), "out");
        let ends = ends(&Stdio { stdout, ..Default::default() }).await;
        let (guest, connection) = UnixStream::pair().unwrap();
        let copying = tokio::spawn(copy_output(connection, ends.stdout.unwrap()));
        let piece = vec![0; 4096];
        let mut taken = 0;
        // Until the copier is stuck and the socket is full: 32 yields let it run whenever it can.
        let mut idle = 0;
        while idle < 32 {
            if let Ok(count) = guest.try_write(&piece) {
                (taken, idle) = (taken + count, 0);
            } else {
                idle += 1;
                tokio::task::yield_now().await;
            }
        }
        // The fifo holds 64 KiB, the copier a piece, the socket what the kernel allows.
        assert!((64 << 10..1 << 20).contains(&taken), "{taken}");
        assert!(!copying.is_finished());
        copying.abort();
    }

    #[tokio::test]
    async fn input_that_is_held_ends_when_it_is_closed_and_after_what_was_written() {
        let directory = tempfile::tempdir().unwrap();
        let stdin = fifo(directory.path(), "in");
        let ends = ends(&Stdio { stdin: stdin.clone(), ..Default::default() }).await;
        let (mut guest, connection) = UnixStream::pair().unwrap();
        let input = Arc::new(ends.stdin.unwrap());
        let copying = tokio::spawn(copy_input(Arc::clone(&input), connection));
        input.hold();
        for words in ["all ", "of it"] {
            let mut writer = File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&stdin).unwrap();
            writer.write_all(words.as_bytes()).unwrap();
        }
        input.close();
        drop(input);
        let mut received = Vec::new();
        guest.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"all of it");
        drop(guest);
        copying.await.unwrap();
    }

    #[tokio::test]
    async fn a_process_that_takes_no_input_ends_the_copying() {
        let directory = tempfile::tempdir().unwrap();
        let stdin = fifo(directory.path(), "in");
        let ends = ends(&Stdio { stdin, ..Default::default() }).await;
        let (guest, connection) = UnixStream::pair().unwrap();
        drop(guest);
        let input = Arc::new(ends.stdin.unwrap());
        input.hold();
        copy_input(input, connection).await;
    }

    #[tokio::test]
    async fn output_for_a_full_disk_is_read_on() {
        let stdio = Stdio { stdout: "/dev/full".into(), ..Default::default() };
        let ends = ends(&stdio).await;
        let (mut guest, connection) = UnixStream::pair().unwrap();
        let copying = tokio::spawn(copy_output(connection, ends.stdout.unwrap()));
        guest.write_all(&vec![0; 1 << 20]).await.unwrap();
        drop(guest);
        copying.await.unwrap();
    }

    #[tokio::test]
    async fn both_streams_share_one_file() {
        let directory = tempfile::tempdir().unwrap();
        let path: PathBuf = directory.path().join("logs/log");
        let stdio = Stdio { stdout: format!("file://{}", path.display()), ..Default::default() };
        assert!(stdio.asked((0, 0)).stderr);
        let ends = ends(&stdio).await;
        for (sink, text) in [(ends.stdout.unwrap(), b"out "), (ends.stderr.unwrap(), b"err ")] {
            let (mut guest, connection) = UnixStream::pair().unwrap();
            guest.write_all(text).await.unwrap();
            drop(guest);
            copy_output(connection, sink).await;
        }
        assert_eq!(std::fs::read_to_string(path).unwrap(), "out err ");
    }
}
