//! Standard streams: pipes and terminals on the container's side, vsock connections on the host's.
//!
//! A process never has a socket for a stream, since `/dev/stdout` of a socket cannot be opened. Bytes go through one
//! buffer that exists only while there are some, so what is not read on one side is not read from the other.
//!
//! - Input: the host's `SHUTDOWN(SEND)` closes the pipe; a terminal it leaves alone.
//! - Output: the end of the pipe or terminal is passed on as `SHUTDOWN(SEND)`. The connection stays until the host hangs
//!   up, so nothing that was written is lost. A host that hangs up first closes the pipe, and the process gets SIGPIPE
//!   when it writes, or SIGHUP when it has a terminal.
//! - A stream that no connection has claimed within [`STREAM_CONNECT_TIMEOUT_S`] is read and discarded, or, for input,
//!   at its end: nobody asked for it, and the process must not wait for somebody who does not come.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bulkhead_protocol::agent::Stdio;
use bulkhead_protocol::limits::STREAM_CONNECT_TIMEOUT_S;
use bulkhead_protocol::stream::{PREFIX_LEN, Stream, StreamHeader};
use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::Interest;
use tokio::sync::Notify;

use crate::descriptor::{Descriptor, nonblocking};

/// Bytes that are under way between the two sides of a stream at a time.
const BUFFER: usize = 64 << 10;

/// The agent's ends of a process's streams, until connections claim them.
#[derive(Default)]
pub(crate) struct Streams {
    ends: Mutex<Ends>,
    close_input: Notify,
}

#[derive(Default)]
struct Ends {
    input: Option<Arc<Descriptor>>,
    output: Option<Arc<Descriptor>>,
    error: Option<Arc<Descriptor>>,
    /// For its size; whoever copies keeps it open.
    terminal: Weak<Descriptor>,
}

/// What the process gets.
pub(crate) type ProcessEnds = [Option<OwnedFd>; 3];

impl Streams {
    /// Makes pipes for the streams that are asked for. A terminal comes later, from the process.
    ///
    /// # Errors
    /// When the agent is out of descriptors or the kernel out of memory.
    pub(crate) fn new(stdio: &Stdio) -> io::Result<(Self, ProcessEnds)> {
        let mut ends = Ends::default();
        let mut theirs = [const { None }; 3];
        if !stdio.terminal {
            if stdio.stdin {
                let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
                ends.input = Some(Arc::new(nonblocking(write)?));
                theirs[0] = Some(read);
            }
            for (asked, end, n) in [(stdio.stdout, &mut ends.output, 1), (stdio.stderr, &mut ends.error, 2)] {
                if asked {
                    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
                    *end = Some(Arc::new(nonblocking(read)?));
                    theirs[n] = Some(write);
                }
            }
        }
        Ok((Self { ends: Mutex::new(ends), close_input: Notify::new() }, theirs))
    }

    /// Takes the master of the process's terminal, which stands for the streams that were asked for. One that nobody
    /// asked for is read all the same.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub(crate) fn set_terminal(&self, master: OwnedFd, stdio: &Stdio) -> io::Result<()> {
        let master = Arc::new(nonblocking(master)?);
        let mut ends = self.lock();
        ends.terminal = Arc::downgrade(&master);
        if stdio.stdin {
            ends.input = Some(Arc::clone(&master));
        }
        ends.output = Some(master);
        Ok(())
    }

    /// Sets the size of the terminal; false when there is none, or no longer.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn resize(&self, rows: u16, columns: u16) -> io::Result<bool> {
        let Some(terminal) = self.lock().terminal.upgrade() else { return Ok(false) };
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(terminal.get_ref(), size)?;
        Ok(true)
    }

    /// Ends the process's input after what has arrived of it. A terminal's input has no end.
    pub(crate) fn close_input(&self) {
        let mut ends = self.lock();
        if ends.terminal.strong_count() == 0 {
            ends.input = None;
            self.close_input.notify_one();
        }
    }

    /// Gives up on connections that have not come, after [`STREAM_CONNECT_TIMEOUT_S`].
    pub(crate) async fn expire(self: Arc<Self>) {
        tokio::time::sleep(Duration::from_secs(STREAM_CONNECT_TIMEOUT_S)).await;
        let (output, error) = {
            let mut ends = self.lock();
            ends.input = None;
            (ends.output.take(), ends.error.take())
        };
        let discard = |end: Option<Arc<Descriptor>>| async move {
            if let Some(end) = end {
                discard(&end).await;
            }
        };
        tokio::join!(discard(output), discard(error));
    }

    /// Carries a stream over `connection` until both ends are done with it. The second connection for a stream, and one
    /// for a stream that does not exist, is closed.
    pub(crate) async fn carry(&self, stream: Stream, connection: Descriptor) {
        let end = {
            let mut ends = self.lock();
            match stream {
                Stream::Stdin => ends.input.take(),
                Stream::Stdout => ends.output.take(),
                Stream::Stderr => ends.error.take(),
            }
        };
        let Some(end) = end else { return };
        let result = match stream {
            Stream::Stdin => self.carry_input(&connection, end).await,
            Stream::Stdout | Stream::Stderr => carry_output(end, &connection).await,
        };
        if let Err(error) = result {
            tracing::info!("{stream:?} ended: {error}");
        }
    }

    async fn carry_input(&self, connection: &Descriptor, end: Arc<Descriptor>) -> io::Result<()> {
        let closed = self.close_input.notified();
        tokio::pin!(closed);
        let mut buffer = Vec::new();
        loop {
            tokio::select! {
                biased;
                read = fill(&mut buffer, connection, receive) => read?,
                () = &mut closed => return Ok(()),
                // The process has closed its end: nobody will read what comes.
                gone = end.ready(Interest::ERROR) => return gone.map(drop),
            }
            if buffer.is_empty() {
                return Ok(());
            }
            drain(&mut buffer, &end, |fd, bytes| rustix::io::write(fd, bytes)).await?;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn carry_output(end: Arc<Descriptor>, connection: &Descriptor) -> io::Result<()> {
    let hung_up = hung_up(connection);
    tokio::pin!(hung_up);
    let mut buffer = Vec::new();
    loop {
        tokio::select! {
            biased;
            read = fill(&mut buffer, &end, take) => read?,
            () = &mut hung_up => return Ok(()),
        }
        if buffer.is_empty() {
            break;
        }
        tokio::select! {
            biased;
            written = drain(&mut buffer, connection, |fd, bytes| send(fd, bytes, SendFlags::NOSIGNAL)) => written?,
            () = &mut hung_up => return Ok(()),
        }
    }
    // The process may have closed this stream and have others, or a terminal: that end goes now.
    drop(end);
    shutdown(connection.get_ref(), Shutdown::Write)?;
    ended(connection).await;
    Ok(())
}

/// Completes when the host has hung up, so that it will not read. That it will not send looks the same at first, and
/// means nothing here; sending tells them apart, even of nothing (`vsock_connectible_sendmsg` looks at the peer before
/// the length). After that a hang-up shows when something is written.
async fn hung_up(connection: &Descriptor) {
    ended(connection).await;
    if send(connection.get_ref(), &[], SendFlags::NOSIGNAL).is_ok() {
        std::future::pending::<()>().await;
    }
}

/// Completes when the host will send no more. What it does send is dropped: nothing is expected.
async fn ended(connection: &Descriptor) {
    loop {
        let Ok(mut ready) = connection.readable().await else { return };
        match recv(connection.get_ref(), &mut [0; 64][..], RecvFlags::DONTWAIT) {
            Ok((1.., _)) | Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => ready.clear_ready(),
            Ok((0, _)) | Err(_) => return,
        }
    }
}

async fn discard(end: &Descriptor) {
    let mut buffer = Vec::new();
    while fill(&mut buffer, end, take).await.is_ok() && !buffer.is_empty() {
        buffer.clear();
    }
}

/// Waits until there is something and reads it into `buffer`, which is empty; if it still is then, that was the end.
async fn fill(
    buffer: &mut Vec<u8>,
    from: &Descriptor,
    read: impl Fn(&OwnedFd, &mut Vec<u8>) -> Result<usize, Errno>,
) -> io::Result<()> {
    loop {
        let mut ready = from.readable().await?;
        buffer.reserve_exact(BUFFER);
        match read(from.get_ref(), buffer) {
            Ok(_) => return Ok(()),
            Err(Errno::AGAIN) => {
                ready.clear_ready();
                // An idle stream costs no buffer.
                *buffer = Vec::new();
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn receive(from: &OwnedFd, buffer: &mut Vec<u8>) -> Result<usize, Errno> {
    recv(from, spare_capacity(buffer), RecvFlags::DONTWAIT).map(|(length, _)| length)
}

/// Reads a pipe, or a terminal's master, which says EIO when the last process has closed its side.
fn take(from: &OwnedFd, buffer: &mut Vec<u8>) -> Result<usize, Errno> {
    match rustix::io::read(from, spare_capacity(buffer)) {
        Err(Errno::IO) => Ok(0),
        other => other,
    }
}

/// Writes all of `buffer` and empties it.
async fn drain(
    buffer: &mut Vec<u8>,
    to: &Descriptor,
    write: impl Fn(&OwnedFd, &[u8]) -> Result<usize, Errno>,
) -> io::Result<()> {
    let mut written = 0;
    while written < buffer.len() {
        let mut ready = to.writable().await?;
        match write(to.get_ref(), &buffer[written..]) {
            Ok(length) => written += length,
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    buffer.clear();
    Ok(())
}

/// Reads the header of a new connection.
///
/// # Errors
/// When it ends early or is no header.
pub(crate) async fn header(connection: &Descriptor) -> io::Result<StreamHeader> {
    let mut prefix = [0; PREFIX_LEN];
    read_exact(connection, &mut prefix).await?;
    let (stream, id, exec) = StreamHeader::decode_prefix(prefix).map_err(io::Error::other)?;
    let mut ids = vec![0; id + exec];
    read_exact(connection, &mut ids).await?;
    let exec = ids.split_off(id);
    StreamHeader::from_parts(stream, ids, exec).map_err(io::Error::other)
}

async fn read_exact(connection: &Descriptor, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        let mut ready = connection.readable().await?;
        match recv(connection.get_ref(), &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((length, _)) => buffer = &mut buffer[length..],
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    fn only_output() -> Stdio {
        Stdio { stdout: true, ..Stdio::default() }
    }

    fn only_input() -> Stdio {
        Stdio { stdin: true, ..Stdio::default() }
    }

    fn all() -> Stdio {
        Stdio { stdin: true, stdout: true, stderr: true, ..Stdio::default() }
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    fn connection() -> (Descriptor, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (nonblocking(ours.into()).unwrap(), theirs)
    }

    fn file(end: Option<OwnedFd>) -> std::fs::File {
        end.unwrap().into()
    }

    #[test]
    fn every_byte_goes_through_in_both_directions() {
        run(async {
            let (streams, [stdin, stdout, stderr]) = Streams::new(&all()).unwrap();
            drop(stderr);
            let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
            // The process copies its input to its output.
            let process = thread::spawn(|| std::io::copy(&mut file(stdin), &mut file(stdout)).unwrap());
            let ((to, mut input), (from, mut output)) = (connection(), connection());
            let sent = bytes.clone();
            let sender = thread::spawn(move || {
                input.write_all(&sent).unwrap();
                input.shutdown(std::net::Shutdown::Write).unwrap();
                input
            });
            let receiver = thread::spawn(move || {
                let mut received = Vec::new();
                output.read_to_end(&mut received).unwrap();
                received
            });
            tokio::join!(streams.carry(Stream::Stdin, to), streams.carry(Stream::Stdout, from));
            drop(sender.join().unwrap());
            assert_eq!(process.join().unwrap(), bytes.len() as u64);
            assert!(receiver.join().unwrap() == bytes, "the bytes differ");
        });
    }

    #[test]
    fn output_written_before_the_end_arrives_after_it() {
        run(async {
            let (streams, [_, stdout, _]) = Streams::new(&only_output()).unwrap();
            file(stdout).write_all(b"last words").unwrap();
            let (from, mut output) = connection();
            let reader = thread::spawn(move || {
                let mut text = String::new();
                output.read_to_string(&mut text).unwrap();
                text
            });
            streams.carry(Stream::Stdout, from).await;
            assert_eq!(reader.join().unwrap(), "last words");
        });
    }

    #[test]
    fn a_host_that_hangs_up_closes_the_pipe() {
        run(async {
            let (streams, [_, stdout, _]) = Streams::new(&only_output()).unwrap();
            let (from, output) = connection();
            drop(output);
            streams.carry(Stream::Stdout, from).await;
            // The test's main thread ignores SIGPIPE, as every Rust program does.
            let error = file(stdout).write_all(b"x").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        });
    }

    #[test]
    fn a_host_that_only_sends_nothing_is_not_one_that_hangs_up() {
        run(async {
            let (streams, [_, stdout, _]) = Streams::new(&only_output()).unwrap();
            let (from, mut output) = connection();
            output.shutdown(std::net::Shutdown::Write).unwrap();
            let process = thread::spawn(move || file(stdout).write_all(&vec![7; 200_000]).unwrap());
            let reader = thread::spawn(move || {
                let mut bytes = Vec::new();
                output.read_to_end(&mut bytes).unwrap();
                bytes.len()
            });
            streams.carry(Stream::Stdout, from).await;
            process.join().unwrap();
            assert_eq!(reader.join().unwrap(), 200_000);
        });
    }

    #[test]
    fn a_process_that_closes_its_input_ends_the_connection() {
        run(async {
            let (streams, [stdin, ..]) = Streams::new(&only_input()).unwrap();
            let (to, mut input) = connection();
            drop(stdin);
            streams.carry(Stream::Stdin, to).await;
            assert_eq!(input.read(&mut [0]).unwrap(), 0);
        });
    }

    #[test]
    fn closed_input_ends_after_what_has_arrived() {
        run(async {
            let (streams, [stdin, ..]) = Streams::new(&only_input()).unwrap();
            let (to, mut input) = connection();
            input.write_all(b"all of it").unwrap();
            streams.close_input();
            streams.carry(Stream::Stdin, to).await;
            // It had been closed before the connection came, so there was nothing to carry it to.
            let mut text = String::new();
            file(stdin).read_to_string(&mut text).unwrap();
            assert_eq!(text, "");

            let (streams, [stdin, ..]) = Streams::new(&only_input()).unwrap();
            let (to, mut input) = connection();
            input.write_all(b"all of it").unwrap();
            tokio::join!(streams.carry(Stream::Stdin, to), async { streams.close_input() });
            file(stdin).read_to_string(&mut text).unwrap();
            assert_eq!(text, "all of it");
        });
    }

    #[test]
    fn a_stream_is_had_once() {
        run(async {
            let (streams, [_, stdout, _]) = Streams::new(&only_output()).unwrap();
            drop(stdout);
            let ((first, one), (second, mut two)) = (connection(), connection());
            drop(one);
            streams.carry(Stream::Stdout, first).await;
            streams.carry(Stream::Stdout, second).await;
            assert_eq!(two.read(&mut [0]).unwrap(), 0);
        });
    }

    #[test]
    fn streams_that_nobody_claims_are_discarded() {
        run(async {
            tokio::time::pause();
            let (streams, [stdin, stdout, _]) = Streams::new(&all()).unwrap();
            // More than a pipe holds: the process goes on because somebody reads.
            let process = thread::spawn(move || file(stdout).write_all(&vec![1; 1 << 20]).unwrap());
            Arc::new(streams).expire().await;
            process.join().unwrap();
            assert_eq!(file(stdin).read(&mut [0]).unwrap(), 0);
        });
    }

    #[test]
    fn headers_are_read_in_whatever_pieces_they_come() {
        run(async {
            let sent =
                StreamHeader { stream: Stream::Stderr, container_id: "web".into(), exec_id: "x1".into() };
            let bytes = sent.encode().unwrap();
            let (connection, mut host) = connection();
            let writer = thread::spawn(move || {
                for byte in bytes {
                    host.write_all(&[byte]).unwrap();
                }
            });
            assert_eq!(header(&connection).await.unwrap(), sent);
            writer.join().unwrap();
            // The host has closed after the header: there is no second one.
            assert!(header(&connection).await.is_err());
        });
    }
}
