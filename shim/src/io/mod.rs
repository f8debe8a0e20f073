//! A process's standard streams between the guest and what containerd names: fifos, files, loggers, or nothing.
//!
//! - [`target`]: what the names mean
//! - [`fifo`], [`file`], [`binary`]: the host's ends
//! - [`copy`]: what goes on between them and the guest

mod binary;
mod copy;
mod fifo;
mod file;
mod target;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_sandbox::agent::Code;
use bulkhead_sandbox::agent::messages;
use bulkhead_sandbox::stream::StreamError;

pub(crate) use copy::Attached;
use target::Target;

/// Bytes of a stream that are held at most.
const PIECE: usize = 64 << 10;

/// Why a stream cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IoError {
    /// No such scheme.
    #[error("unknown STDIO scheme {0}")]
    Scheme(String),
    /// A name that means nothing.
    #[error("the standard stream {0:?} cannot be used: {1}")]
    Name(String, &'static str),
    /// It cannot be opened.
    #[error("cannot open {0} for a standard stream")]
    Open(PathBuf, #[source] io::Error),
    /// The logger cannot be started.
    #[error("cannot start the logging binary {0}")]
    Logger(PathBuf, #[source] io::Error),
    /// The logger did not say that it is ready.
    #[error("the logging binary {0} did not get ready")]
    NotReady(PathBuf, #[source] io::Error),
    /// The guest's end is not to be had.
    #[error(transparent)]
    Guest(#[from] StreamError),
}

impl IoError {
    /// As which a client gets to know it.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::Scheme(_) | Self::Name(..) => Code::INVALID_ARGUMENT,
            Self::Open(..) | Self::Logger(..) | Self::NotReady(..) => Code::UNKNOWN,
            Self::Guest(StreamError::Timeout) => Code::DEADLINE_EXCEEDED,
            Self::Guest(_) => Code::UNAVAILABLE,
        }
    }
}

/// What containerd wants a process's standard streams to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stdio {
    /// One terminal for all three.
    pub(crate) terminal: bool,
    /// Name of a fifo, or empty.
    pub(crate) stdin: String,
    /// Name of a fifo or file, a URI, or empty.
    pub(crate) stdout: String,
    /// The same. Not used with a terminal.
    pub(crate) stderr: String,
}

impl Stdio {
    /// What the agent is asked for. A terminal has its output read even when nobody wants it.
    pub(crate) fn asked(&self, (rows, columns): (u16, u16)) -> messages::Stdio {
        let both = Target::is_for_both(&self.stdout);
        messages::Stdio {
            terminal: self.terminal,
            rows: rows.into(),
            columns: columns.into(),
            stdin: !self.stdin.is_empty(),
            stdout: self.terminal || !self.stdout.is_empty(),
            stderr: !self.terminal && (both || !self.stderr.is_empty()),
            ..Default::default()
        }
    }
}

/// Whose streams they are, as loggers are told.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner<'a> {
    /// containerd's namespace.
    pub(crate) namespace: &'a str,
    /// The container, or the exec.
    pub(crate) id: &'a str,
}

/// The host's ends of a process's streams.
#[derive(Debug, Default)]
pub(crate) struct HostEnds {
    stdin: Option<fifo::Input>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<binary::Logger>,
    wanted: messages::Stdio,
}

/// Where output goes.
#[derive(Debug)]
enum Sink {
    Null,
    Fifo(fifo::Output),
    File(Arc<file::Appended>),
    Logger(fifo::Pipe),
}

impl HostEnds {
    /// Opens them. Nobody waits for a reader or a writer of a fifo, only for a logger to get ready.
    pub(crate) async fn open(stdio: &Stdio, owner: Owner<'_>) -> Result<Self, IoError> {
        let mut ends = Self { wanted: stdio.asked((0, 0)), ..Self::default() };
        if !stdio.stdin.is_empty() {
            ends.stdin = Some(fifo::Input::open(&target::input(&stdio.stdin)?)?);
        }
        match Target::parse(&stdio.stdout)? {
            Target::Null if stdio.terminal => ends.stdout = Some(Sink::Null),
            Target::Null => {}
            Target::Path(path) => ends.stdout = Some(Sink::open(&path)?),
            Target::File(path) => {
                let file = Arc::new(file::Appended::create(&path)?);
                ends.stderr = (!stdio.terminal).then(|| Sink::File(Arc::clone(&file)));
                ends.stdout = Some(Sink::File(file));
                return Ok(ends);
            }
            Target::Binary(program) => {
                let (logger, stdout, stderr) = binary::Logger::start(&program, owner).await?;
                ends.logger = Some(logger);
                ends.stdout = Some(Sink::Logger(stdout));
                ends.stderr = (!stdio.terminal).then_some(Sink::Logger(stderr));
                return Ok(ends);
            }
        }
        if stdio.terminal || stdio.stderr.is_empty() {
            return Ok(ends);
        }
        ends.stderr = match Target::parse(&stdio.stderr)? {
            Target::Null => None,
            // Two descriptors with positions of their own would write over each other.
            Target::Path(_) if stdio.stderr == stdio.stdout && matches!(ends.stdout, Some(Sink::File(_))) => {
                match &ends.stdout {
                    Some(Sink::File(file)) => Some(Sink::File(Arc::clone(file))),
                    _ => None,
                }
            }
            Target::Path(path) => Some(Sink::open(&path)?),
            Target::File(path) => Some(Sink::File(Arc::new(file::Appended::create(&path)?))),
            Target::Binary(_) => {
                return Err(IoError::Name(stdio.stderr.clone(), "a logging binary is for both streams"));
            }
        };
        Ok(ends)
    }
}

impl Sink {
    /// A fifo, or a file to append to.
    fn open(path: &Path) -> Result<Self, IoError> {
        match fifo::Output::open(path)? {
            Some(fifo) => Ok(Self::Fifo(fifo)),
            None => Ok(Self::File(Arc::new(file::Appended::open(path)?))),
        }
    }
}
