//! What PID 1 and its workers say to each other. Both are this binary, so the encoding has no version.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

/// Longest answer of a worker, in bytes.
pub(crate) const REPLY_MAX: usize = 64 << 10;

/// What a worker is to do. Calls of the host are passed on as they came, so that there is one set of types.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Prepare a container up to the point where only the start of its process is left.
    Create {
        /// An encoded `CreateContainerRequest`.
        call: Vec<u8>,
        /// Where the process waits for a connection, its signal to start.
        start: String,
    },
    /// Prepare a process in a running container in the same way.
    Exec {
        /// An encoded `ExecProcessRequest`.
        call: Vec<u8>,
        /// As in `Create`.
        start: String,
        /// The container's init.
        init: i32,
    },
    /// Remove what is left of a container that has no processes, or is about to have none.
    Remove { container_id: String },
}

/// What a worker answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// The process waits to be started. A terminal's master comes with this.
    Prepared {
        pid: i32,
    },
    Removed,
    Failed(Failure),
}

/// Why a worker, or a container's process before its program ran, did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) kind: FailureKind,
    pub(crate) text: String,
}

/// What a failure means to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FailureKind {
    /// There is no such program: exit status 127.
    CommandNotFound,
    /// The program cannot be executed: exit status 126.
    CommandNotExecutable,
    /// The request cannot be fulfilled as it is.
    Invalid,
    /// The request does not fit the state of what it is about.
    Precondition,
    Timeout,
    Internal,
}

impl Failure {
    pub(crate) fn new(kind: FailureKind, text: impl Into<String>) -> Self {
        Self { kind, text: text.into() }
    }
}

/// The descriptors that a worker gets.
#[derive(Debug, Default)]
pub(crate) struct Job {
    /// A [`Failure`] of the new process is written here; it is closed by the execution of its program.
    pub(crate) outcome: Option<OwnedFd>,
    /// The process's standard streams; one that is missing is `/dev/null`.
    pub(crate) stdio: [Option<OwnedFd>; 3],
    /// Namespaces of other containers, in the order in which the call names them.
    pub(crate) namespaces: Vec<OwnedFd>,
}

impl Job {
    /// The descriptors in the order in which they are sent, the worker's socket first, and a bit for each that there is.
    pub(crate) fn into_descriptors(self, socket: OwnedFd) -> (u8, Vec<OwnedFd>) {
        let mut mask = 0;
        let mut descriptors = vec![socket];
        for (bit, descriptor) in std::iter::once(self.outcome).chain(self.stdio).enumerate() {
            if let Some(descriptor) = descriptor {
                mask |= 1 << bit;
                descriptors.push(descriptor);
            }
        }
        descriptors.extend(self.namespaces);
        (mask, descriptors)
    }

    /// The reverse: the worker's socket, when there is one, and the rest.
    pub(crate) fn from_descriptors(mask: u8, descriptors: Vec<OwnedFd>) -> (Option<OwnedFd>, Self) {
        let mut descriptors = descriptors.into_iter();
        let socket = descriptors.next();
        let mut next = |bit: u8| if mask & (1 << bit) == 0 { None } else { descriptors.next() };
        let (outcome, stdio) = (next(0), [next(1), next(2), next(3)]);
        (socket, Self { outcome, stdio, namespaces: descriptors.collect() })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd as _;

    use super::*;

    #[test]
    fn descriptors_arrive_in_their_places() {
        let open = || OwnedFd::from(File::open("/dev/null").unwrap());
        let (socket, stdout, namespace) = (open(), open(), open());
        let numbers = (socket.as_raw_fd(), stdout.as_raw_fd());
        let third = namespace.as_raw_fd();
        let (mask, descriptors) =
            Job { outcome: None, stdio: [None, Some(stdout), None], namespaces: vec![namespace] }
                .into_descriptors(socket);
        let (socket, job) = Job::from_descriptors(mask, descriptors);
        assert_eq!(socket.unwrap().as_raw_fd(), numbers.0);
        assert!(job.outcome.is_none() && job.stdio[0].is_none() && job.stdio[2].is_none());
        assert_eq!(job.stdio[1].as_ref().unwrap().as_raw_fd(), numbers.1);
        assert_eq!(job.namespaces.len(), 1);
        assert_eq!(job.namespaces[0].as_raw_fd(), third);
    }
}
