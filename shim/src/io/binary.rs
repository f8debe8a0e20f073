//! Loggers: programs that containerd names, which get a process's output on descriptors 3 and 4 and say on descriptor 5 that they are
//! ready.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bulkhead_sandbox::watch::watch;
use rustix::io::{fcntl_dupfd_cloexec, read};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::fifo::Pipe;
use super::target::Program;
use super::{IoError, Owner};

/// How long a logger may take to get ready: containerd gives a container's creation no less.
const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long it may take to end after SIGTERM; what runc's shim gives it.
const END_TIMEOUT: Duration = Duration::from_secs(12);
/// The first of its three descriptors.
const FIRST: i32 = 3;
/// Descriptors from this one on are not in the way of its own.
const CLEAR: i32 = 10;

/// A logger that runs. Dropped, it is told to end.
#[derive(Debug)]
pub(super) struct Logger {
    /// Dropped to say that it is over.
    _over: oneshot::Sender<()>,
}

impl Logger {
    /// Starts a logger and waits until it is ready. Returns what standard output and standard error are to be written to.
    pub(super) async fn start(program: &Program, owner: Owner<'_>) -> Result<(Self, Pipe, Pipe), IoError> {
        let failed = |error| IoError::Logger(program.path.clone(), error);
        let (theirs, ours) = pipes().map_err(failed)?;
        let child = spawn(program, owner, &theirs).map_err(failed)?;
        drop(theirs);
        let (over, is_over) = oneshot::channel();
        attend(child, is_over).map_err(failed)?;
        let logger = Self { _over: over };
        let [stdout, stderr, ready] = ours;
        let not_ready = |error| IoError::NotReady(program.path.clone(), error);
        let waiting = timeout(READY_TIMEOUT, until_ready(ready, program.says_ready));
        waiting.await.map_err(|_| not_ready(io::ErrorKind::TimedOut.into()))?.map_err(not_ready)?;
        let pipe = |fd| Pipe::new(fd).map_err(failed);
        Ok((logger, pipe(stdout)?, pipe(stderr)?))
    }
}

/// The logger's ends, then ours, which do not block, each for standard output, standard error and readiness.
fn pipes() -> io::Result<([OwnedFd; 3], [OwnedFd; 3])> {
    let clear = |fd: OwnedFd| fcntl_dupfd_cloexec(&fd, CLEAR);
    let (stdout_theirs, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    let (stderr_theirs, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    let (ready, ready_theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    let ours = [stdout, stderr, ready];
    for fd in &ours {
        rustix::io::ioctl_fionbio(fd, true)?;
    }
    Ok(([clear(stdout_theirs)?, clear(stderr_theirs)?, clear(ready_theirs)?], ours))
}

fn spawn(program: &Program, owner: Owner<'_>, theirs: &[OwnedFd; 3]) -> io::Result<Child> {
    let mut command = Command::new(&program.path);
    command.args(&program.args).env_clear();
    command.env("CONTAINER_ID", owner.id).env("CONTAINER_NAMESPACE", owner.namespace);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // The standard library tells of a failed exec through a pipe that it makes meanwhile: that must not be one of the three.
    let mut in_the_way = Vec::new();
    loop {
        let null = OwnedFd::from(File::open("/dev/null")?);
        if null.as_raw_fd() >= FIRST + 3 {
            break;
        }
        in_the_way.push(null);
    }
    let numbers = theirs.each_ref().map(AsRawFd::as_raw_fd);
    // SAFETY: the closure runs in the forked child and makes system calls alone. `numbers` are open there: the parent closes its
    // own after `spawn`. What they replace belongs to the parent or is one of the placeholders of above.
    unsafe {
        command.pre_exec(move || {
            for (target, source) in (FIRST..).zip(numbers) {
                if libc::dup2(source, target) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let child = command.spawn();
    drop(in_the_way);
    child
}

/// Reaps the logger whenever it ends, and sees to it that it does once it is over.
fn attend(mut child: Child, over: oneshot::Receiver<()>) -> io::Result<()> {
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
    let Ok(gone) = pidfd.map_err(io::Error::from).and_then(|pidfd| watch(pidfd, Interest::READABLE)) else {
        let _ = child.kill();
        let _ = child.wait();
        return Err(io::Error::other("it cannot be watched"));
    };
    tokio::spawn(async move {
        tokio::select! {
            _ = gone.readable() => {}
            _ = over => end(&gone).await,
        }
        // It has ended, so this does not wait.
        match child.wait() {
            Ok(status) if !status.success() => tracing::warn!(%status, "a logging binary ended"),
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "a logging binary cannot be reaped"),
        }
    });
    Ok(())
}

async fn end(gone: &AsyncFd<OwnedFd>) {
    // It fails when the logger is gone, which is just as well.
    let _ = pidfd_send_signal(gone.get_ref(), Signal::TERM);
    if timeout(END_TIMEOUT, gone.readable()).await.is_err() {
        let _ = pidfd_send_signal(gone.get_ref(), Signal::KILL);
        let _ = gone.readable().await;
    }
}

async fn until_ready(ready: OwnedFd, says_ready: bool) -> io::Result<()> {
    let ready = watch(ready, Interest::READABLE)?;
    let mut byte = [0; 1];
    loop {
        let mut guard = ready.readable().await?;
        let read = guard.try_io(|fd: &AsyncFd<OwnedFd>| {
            let fd: BorrowedFd<'_> = std::os::fd::AsFd::as_fd(fd.get_ref());
            Ok(rustix::io::retry_on_intr(|| read(fd, &mut byte))?)
        });
        match read {
            Ok(Ok(0)) if says_ready => {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended without saying so"));
            }
            Ok(read) => return read.map(drop),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
#[path = "../../../sandbox/tests/support/executable.rs"]
mod executable;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    const OWNER: Owner<'_> = Owner { namespace: "ns", id: "web" };

    fn program(directory: &Path, script: &str, says_ready: bool) -> Program {
        let path = directory.join("logger");
        executable::script(&path, script);
        Program { path, args: vec!["to".into(), directory.join("log").display().to_string()], says_ready }
    }

    async fn content(path: &Path, length: usize) -> String {
        // The file belongs to another process: there is no event for its growth.
        for _ in 0..3000 {
            match fs::read_to_string(path) {
                Ok(text) if text.len() >= length => return text,
                _ => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
        panic!("never")
    }

    #[tokio::test]
    async fn a_logger_gets_both_streams_and_knows_whose_they_are() {
        let directory = tempfile::tempdir().unwrap();
        let script = "exec 5>&-; { printf \"$CONTAINER_NAMESPACE/$CONTAINER_ID \"; cat <&3; cat <&4; } >$2";
        let program = program(directory.path(), script, false);
        let (_logger, stdout, stderr) = Logger::start(&program, OWNER).await.unwrap();
        stdout.write_all(b"out ").await.unwrap();
        stderr.write_all(b"err").await.unwrap();
        drop((stdout, stderr));
        assert_eq!(content(&directory.path().join("log"), 14).await, "ns/web out err");
    }

    #[tokio::test]
    async fn a_logger_that_is_dropped_is_terminated() {
        let directory = tempfile::tempdir().unwrap();
        let script =
            "trap 'printf over >$2; exit' TERM; printf r >&5; while :; do read -r line <&3 || :; done";
        let program = program(directory.path(), script, true);
        let (logger, _stdout, _stderr) = Logger::start(&program, OWNER).await.unwrap();
        drop(logger);
        assert_eq!(content(&directory.path().join("log"), 4).await, "over");
    }

    #[tokio::test]
    async fn a_logger_that_ends_before_it_is_ready_or_does_not_exist_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let error = Logger::start(&program(directory.path(), "exit 3", true), OWNER).await.unwrap_err();
        assert!(matches!(error, IoError::NotReady(..)), "{error}");
        let missing = Program { path: "/nonexistent/logger".into(), args: Vec::new(), says_ready: false };
        let error = Logger::start(&missing, OWNER).await.unwrap_err();
        assert!(matches!(error, IoError::Logger(..)), "{error}");
    }
}
