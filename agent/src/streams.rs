//! Standard streams: pipes and terminals on the container's side, vsock connections on the host's.
//!
//! A process never has a socket for a stream, since `/dev/stdout` of a socket cannot be opened. Bytes go through one
//! buffer that exists only while there are some, so what is not read on one side is not read from the other.
//!
//! - Input: the host's `SHUTDOWN(SEND)` closes the pipe; a terminal it leaves alone.
//! - Output: the end of the pipe or terminal is passed on as `SHUTDOWN(SEND)`. The connection stays until the host hangs
//!   up, so nothing that was written is lost. A host that hangs up first closes the pipe, and the process gets SIGPIPE
//!   when it writes, or SIGHUP when it has a terminal.
//! - A terminal that nobody has open any more may be opened again: its output ends when its process has ended, too.
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
use tokio::io::unix::AsyncFdReadyGuard;
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use crate::descriptor::{Descriptor, nonblocking};

/// Bytes that are under way between the two sides of a stream at a time.
const BUFFER: usize = 64 << 10;
/// How long a terminal is left alone that no process has open, and one that was so before when it has nothing to read or no room.
const CLOSED_TERMINAL_PAUSE: Duration = Duration::from_millis(50);
/// How long it is left alone at last while no process opens it.
const CLOSED_TERMINAL_PAUSE_MAX: Duration = Duration::from_millis(500);

/// The agent's ends of a process's streams, until connections claim them.
#[derive(Default)]
pub(crate) struct Streams {
    ends: Mutex<Ends>,
    close_input: Notify,
    /// Whether the process has ended.
    ended: watch::Sender<bool>,
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
        Ok((Self { ends: Mutex::new(ends), ..Self::default() }, theirs))
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

    /// Lets a terminal's output end, now that its process has.
    pub(crate) fn process_ended(&self) {
        self.ended.send_replace(true);
    }

    /// Gives up on connections that have not come, after [`STREAM_CONNECT_TIMEOUT_S`].
    pub(crate) async fn expire(self: Arc<Self>) {
        sleep(Duration::from_secs(STREAM_CONNECT_TIMEOUT_S)).await;
        let (output, error) = {
            let mut ends = self.lock();
            ends.input = None;
            (ends.output.take(), ends.error.take())
        };
        tokio::join!(self.discard(output), self.discard(error));
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
            Stream::Stdout | Stream::Stderr => self.carry_output(end, &connection).await,
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

    async fn carry_output(&self, end: Arc<Descriptor>, connection: &Descriptor) -> io::Result<()> {
        let hung_up = hung_up(connection);
        tokio::pin!(hung_up);
        let mut buffer = Vec::new();
        loop {
            tokio::select! {
                biased;
                read = self.fill_with_output(&mut buffer, &end) => read?,
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

    async fn discard(&self, end: Option<Arc<Descriptor>>) {
        let Some(end) = end else { return };
        let mut buffer = Vec::new();
        while self.fill_with_output(&mut buffer, &end).await.is_ok() && !buffer.is_empty() {
            buffer.clear();
        }
    }

    /// Does what [`fill`] does with a pipe, or a terminal's master. That says EIO while no process has its other side open, which is the end
    /// only when the process has ended.
    async fn fill_with_output(&self, buffer: &mut Vec<u8>, end: &Descriptor) -> io::Result<()> {
        let mut ended = self.ended.subscribe();
        let mut pause = CLOSED_TERMINAL_PAUSE;
        loop {
            // What was written before the process ended is read after this.
            let last = *ended.borrow();
            match fill(buffer, end, |fd, buffer| rustix::io::read(fd, spare_capacity(buffer))).await {
                Err(error) if Errno::from_io_error(&error) == Some(Errno::IO) => *buffer = Vec::new(),
                other => return other,
            }
            if last {
                return Ok(());
            }
            let _ = timeout(pause, ended.wait_for(|&ended| ended)).await;
            pause = (2 * pause).min(CLOSED_TERMINAL_PAUSE_MAX);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
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

/// Waits until there is something and reads it into `buffer`, which is empty; if it still is then, that was the end.
async fn fill(
    buffer: &mut Vec<u8>,
    from: &Descriptor,
    read: impl Fn(&OwnedFd, &mut Vec<u8>) -> Result<usize, Errno>,
) -> io::Result<()> {
    loop {
        let ready = from.readable().await?;
        buffer.reserve_exact(BUFFER);
        match read(from.get_ref(), buffer) {
            Ok(_) => return Ok(()),
            Err(Errno::AGAIN) => {
                // An idle stream costs no buffer.
                *buffer = Vec::new();
                try_later(ready).await;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn receive(from: &OwnedFd, buffer: &mut Vec<u8>) -> Result<usize, Errno> {
    recv(from, spare_capacity(buffer), RecvFlags::DONTWAIT).map(|(length, _)| length)
}

/// Writes all of `buffer` and empties it.
async fn drain(
    buffer: &mut Vec<u8>,
    to: &Descriptor,
    write: impl Fn(&OwnedFd, &[u8]) -> Result<usize, Errno>,
) -> io::Result<()> {
    let mut written = 0;
    while written < buffer.len() {
        let ready = to.writable().await?;
        match write(to.get_ref(), &buffer[written..]) {
            Ok(length) => written += length,
            Err(Errno::AGAIN) => try_later(ready).await,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    buffer.clear();
    Ok(())
}

/// Has the runtime wait for the next event. It does not forget that the other side was closed, which that of a terminal need not be any more.
async fn try_later(mut ready: AsyncFdReadyGuard<'_, OwnedFd>) {
    let was_closed = ready.ready().is_read_closed() || ready.ready().is_write_closed();
    ready.clear_ready();
    drop(ready);
    if was_closed {
        sleep(CLOSED_TERMINAL_PAUSE).await;
    }
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

    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    use tokio::io::AsyncReadExt as _;

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

    /// Streams on a terminal, and what opens its other side.
    fn on_terminal() -> (Streams, impl Fn() -> std::fs::File) {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        unlockpt(&master).unwrap();
        let opener = rustix::io::dup(&master).unwrap();
        let stdio = Stdio { terminal: true, ..only_output() };
        let (streams, _) = Streams::new(&stdio).unwrap();
        streams.set_terminal(master, &stdio).unwrap();
        (streams, move || ioctl_tiocgptpeer(&opener, flags).unwrap().into())
    }

    /// Both ends of a connection, the host's for the test's own runtime.
    fn screen() -> (Descriptor, tokio::net::UnixStream) {
        let (ours, theirs) = connection();
        theirs.set_nonblocking(true).unwrap();
        (ours, tokio::net::UnixStream::from_std(theirs).unwrap())
    }

    async fn shown(screen: &mut tokio::net::UnixStream, text: &str) {
        let mut bytes = vec![0; text.len()];
        screen.read_exact(&mut bytes).await.unwrap();
        assert_eq!(bytes, text.as_bytes());
    }

    #[test]
    fn a_terminal_goes_on_when_it_is_opened_again() {
        run(async {
            let (streams, open) = on_terminal();
            let (from, mut screen) = screen();
            let process = async {
                for word in ["one", "two", "three"] {
                    open().write_all(word.as_bytes()).unwrap();
                    shown(&mut screen, word).await;
                    sleep(CLOSED_TERMINAL_PAUSE * 2).await;
                }
                let nothing = screen.try_read(&mut [0]).unwrap_err();
                assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock, "it has not ended");
                open().write_all(b"last words").unwrap();
                streams.process_ended();
                let mut rest = String::new();
                screen.read_to_string(&mut rest).await.unwrap();
                assert_eq!(rest, "last words");
                drop(screen);
            };
            tokio::join!(streams.carry(Stream::Stdout, from), process);
        });
    }

    #[test]
    fn a_terminal_that_a_child_has_open_goes_on_after_the_end_of_the_process() {
        run(async {
            let (streams, open) = on_terminal();
            let (from, mut screen) = screen();
            let process = async {
                let mut child = open();
                streams.process_ended();
                child.write_all(b"early").unwrap();
                shown(&mut screen, "early").await;
                child.write_all(b"late").unwrap();
                drop(child);
                let mut rest = String::new();
                screen.read_to_string(&mut rest).await.unwrap();
                assert_eq!(rest, "late");
                drop(screen);
            };
            tokio::join!(process, streams.carry(Stream::Stdout, from));
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
