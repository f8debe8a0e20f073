//! Why a request is refused, with the codes and the words of runc's shim: clients tell cases apart by both.

use std::error::Error as StdError;

use bulkhead_sandbox::agent::{AgentError, Code};

use crate::io::IoError;
use crate::options::OptionsError;
use crate::process::State;
use bulkhead_sandbox::pod::{ErrorKind, PodError};

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TaskError {
    /// No such container.
    #[error("container not created: not found")]
    NoContainer,
    /// No such exec.
    #[error("process does not exist {0}: not found")]
    NoProcess(String),
    /// The process has ended.
    #[error("process already finished: not found")]
    Finished,
    /// The container's cgroup is gone.
    #[error("cgroup does not exist: not found")]
    NoCgroup,
    /// The id is taken.
    #[error("{0}: already exists")]
    Exists(String),
    /// The container is still being created.
    #[error("container must be created: failed precondition")]
    BeingCreated,
    /// An exec that has not been started.
    #[error("process not created: failed precondition")]
    NotStarted,
    /// The container's first process has ended.
    #[error("container {0} init process is not running: failed precondition")]
    InitEnded(String),
    /// SIGKILL came before the container was there.
    #[error("the container was killed while it was created: canceled")]
    Killed,
    /// The state does not allow it. runc's shim has no code for this.
    #[error("cannot {0}")]
    State(String),
    /// The request can never be fulfilled.
    #[error("{0}: invalid argument")]
    Invalid(String),
    /// Not to be had at all.
    #[error("{0}: not implemented")]
    Unsupported(&'static str),
    /// The request's options cannot be used.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The configuration cannot be used.
    #[error("the configuration cannot be used")]
    Config(#[source] Box<dyn StdError + Send + Sync>),
    /// The bundle cannot be used.
    #[error("the bundle cannot be used")]
    Bundle(#[source] Box<dyn StdError + Send + Sync>),
    /// A standard stream cannot be used.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A program does not start.
    #[error("{0}")]
    Program(String),
    /// The machine does not do it.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// The agent does not do it.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The machine is gone.
    #[error("the container's virtual machine is gone: {0}")]
    MachineGone(String),
    /// No answer in time.
    #[error("{0}: context deadline exceeded")]
    Deadline(&'static str),
}

impl TaskError {
    /// What a state does not allow, in the words of runc's shim. `verb` is what was asked for.
    pub(crate) fn state(verb: &str, state: &State) -> Self {
        let what = match (verb, state) {
            (_, State::Creating) => return Self::BeingCreated,
            ("pause" | "resume", State::Created | State::Starting) => "task in created state",
            ("pause", State::Paused) => "a paused container",
            ("exec", State::Paused | State::Pausing) => "in a paused state",
            ("exec", _) => "in a stopped state",
            ("start" | "delete", State::Stopped(_)) => "a stopped process",
            (_, State::Stopped(_)) => "a stopped container",
            (_, State::Paused | State::Pausing) => "a paused process",
            (_, State::Created) => "a created process",
            (_, State::Starting | State::Running) => "a running process",
        };
        Self::State(format!("{verb} {what}"))
    }

    /// Why `program` does not start: Docker finds exit codes 126 and 127 by runc's words.
    pub(crate) fn program(action: &str, program: &str, missing: bool, cause: &dyn StdError) -> Self {
        tracing::info!(program, cause = %chain(cause), "the program does not start");
        let why = match (missing, program.contains('/')) {
            (true, true) => format!("stat {program}: no such file or directory"),
            (true, false) => "executable file not found in $PATH".into(),
            (false, _) => "permission denied".into(),
        };
        Self::Program(format!(
            "OCI runtime {action} failed: unable to start container process: exec: {program:?}: {why}"
        ))
    }

    /// An error of the agent that came of starting `program`.
    pub(crate) fn start(action: &str, program: &str, error: AgentError) -> Self {
        match error.code() {
            Some(Code::NOT_FOUND) => Self::program(action, program, true, &error),
            Some(Code::PERMISSION_DENIED) => Self::program(action, program, false, &error),
            _ => Self::Agent(error),
        }
    }

    /// An error of the machine that came of creating a container with `program`.
    pub(crate) fn create(program: &str, error: PodError) -> Self {
        // Only the agent knows of programs: a host's file that is missing is another matter.
        let code = match &error {
            PodError::Agent(error) => error.code(),
            _ => None,
        };
        match code {
            Some(Code::NOT_FOUND) => Self::program("create", program, true, &error),
            Some(Code::PERMISSION_DENIED) => Self::program("create", program, false, &error),
            _ => Self::Pod(error),
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NoContainer | Self::NoProcess(_) | Self::Finished | Self::NoCgroup => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::BeingCreated | Self::NotStarted | Self::InitEnded(_) | Self::Config(_) => {
                Code::FAILED_PRECONDITION
            }
            Self::Killed => Code::CANCELLED,
            // What runc's shim answers has no code of its own either.
            Self::State(_) | Self::Program(_) => Code::UNKNOWN,
            Self::Invalid(_) | Self::Options(_) | Self::Bundle(_) => Code::INVALID_ARGUMENT,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Io(error) => error.code(),
            Self::Pod(error) => match error.kind() {
                ErrorKind::InvalidArgument => Code::INVALID_ARGUMENT,
                // NOT_FOUND would be taken for a container that is not there.
                ErrorKind::NotFound | ErrorKind::PermissionDenied => Code::UNKNOWN,
                ErrorKind::AlreadyExists => Code::ALREADY_EXISTS,
                ErrorKind::ResourceExhausted => Code::RESOURCE_EXHAUSTED,
                ErrorKind::FailedPrecondition => Code::FAILED_PRECONDITION,
                ErrorKind::DeadlineExceeded => Code::DEADLINE_EXCEEDED,
                ErrorKind::Unavailable => Code::UNAVAILABLE,
                ErrorKind::Internal => Code::INTERNAL,
            },
            Self::Agent(error) => match error {
                AgentError::Timeout(_) => Code::DEADLINE_EXCEEDED,
                AgentError::Lost(_) | AgentError::Connect(_) => Code::UNAVAILABLE,
                // A guest may not have containerd believe that Bulkhead lacks a call, or that all is well.
                AgentError::Refused { code: Code::UNIMPLEMENTED | Code::OK, .. }
                | AgentError::Random(_)
                | AgentError::Version(_) => Code::INTERNAL,
                AgentError::Refused { code, .. } => *code,
            },
            Self::MachineGone(_) => Code::UNAVAILABLE,
            Self::Deadline(_) => Code::DEADLINE_EXCEEDED,
        }
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), chain(&error)))
    }
}

/// An error with its causes on one line.
pub(crate) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&in_runcs_words(error));
        cause = error.source();
    }
    text
}

/// Go's words for an error of the kernel begin with a small letter and do not tell its number. Docker looks for them.
fn in_runcs_words(error: &(dyn StdError + 'static)) -> String {
    let text = error.to_string();
    let of_the_kernel =
        error.downcast_ref::<std::io::Error>().is_some_and(|error| error.raw_os_error().is_some());
    let words = text.split_once(" (os error ").map_or(text.as_str(), |(words, _)| words);
    match words.chars().next() {
        Some(first) if of_the_kernel => {
            format!("{}{}", first.to_ascii_lowercase(), &words[first.len_utf8()..])
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::process::Exit;

    fn status(error: TaskError) -> (Code, String) {
        match ttrpc::Error::from(error) {
            ttrpc::Error::RpcStatus(status) => (status.code.unwrap(), status.message),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn the_kernels_errors_are_told_in_gos_words() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot share /x")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::from_raw_os_error(2));
        assert_eq!(chain(&error), "cannot share /x: no such file or directory");
        assert_eq!(chain(&Outer(std::io::Error::other("Own words"))), "cannot share /x: Own words");
    }

    #[test]
    fn states_are_refused_in_the_words_of_runcs_shim() {
        let stopped = State::Stopped(Exit { status: 0, at: SystemTime::UNIX_EPOCH });
        let words = |verb, state| status(TaskError::state(verb, state)).1;
        assert_eq!(words("start", &State::Running), "cannot start a running process");
        assert_eq!(words("start", &stopped), "cannot start a stopped process");
        assert_eq!(words("delete", &State::Running), "cannot delete a running process");
        assert_eq!(words("delete", &State::Paused), "cannot delete a paused process");
        assert_eq!(words("pause", &State::Created), "cannot pause task in created state");
        assert_eq!(words("pause", &State::Paused), "cannot pause a paused container");
        assert_eq!(words("resume", &State::Running), "cannot resume a running process");
        assert_eq!(words("exec", &State::Paused), "cannot exec in a paused state");
        assert_eq!(words("exec", &stopped), "cannot exec in a stopped state");
        assert_eq!(words("update", &stopped), "cannot update a stopped container");
        assert_eq!(status(TaskError::state("kill", &State::Creating)).0, Code::FAILED_PRECONDITION);
        assert_eq!(status(TaskError::state("pause", &stopped)).0, Code::UNKNOWN);
    }

    #[test]
    fn a_program_that_does_not_start_is_told_in_the_words_that_docker_looks_for() {
        let refused = |code| AgentError::Refused { code, text: "why".into() };
        let (code, text) = status(TaskError::start("exec", "foo", refused(Code::NOT_FOUND)));
        assert_eq!(code, Code::UNKNOWN);
        assert!(text.ends_with("exec: \"foo\": executable file not found in $PATH"), "{text}");
        let (_, text) = status(TaskError::start("exec", "/foo", refused(Code::NOT_FOUND)));
        assert!(text.ends_with("exec: \"/foo\": stat /foo: no such file or directory"), "{text}");
        let (_, text) = status(TaskError::start("start", "foo", refused(Code::PERMISSION_DENIED)));
        assert!(text.ends_with("exec: \"foo\": permission denied"), "{text}");
        assert_eq!(status(TaskError::start("start", "a", refused(Code::INTERNAL))).0, Code::INTERNAL);
    }

    #[test]
    fn the_guest_cannot_choose_a_code_that_containerd_takes_for_something_else() {
        for code in [Code::UNIMPLEMENTED, Code::OK] {
            let error = AgentError::Refused { code, text: String::new() };
            assert_eq!(status(error.into()).0, Code::INTERNAL);
        }
        assert_eq!(status(AgentError::Timeout(Duration::ZERO).into()).0, Code::DEADLINE_EXCEEDED);
        assert_eq!(status(AgentError::Lost(String::new()).into()).0, Code::UNAVAILABLE);
    }
}
