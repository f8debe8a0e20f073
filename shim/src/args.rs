//! The command line, in the syntax of Go's `flag` package: `-x value`, `-x=value`, `--x`, the first argument that is no flag ends them.

use std::os::fd::RawFd;
use std::path::PathBuf;

/// What a person is told who runs the program by hand.
pub(crate) const USAGE: &str = "\
containerd-shim-bulkhead-v2 runs containerd's tasks in virtual machines. containerd starts it; there is nothing to run by hand:

    ctr run --runtime io.containerd.bulkhead.v2 IMAGE ID COMMAND

Actions (containerd's interface for shims):
    start     serve a container's task in the background, and print the address
    delete    clean up after a shim that is gone
Flags:
    -namespace NAME -id ID -address SOCKET -publish-binary FILE -bundle DIRECTORY -debug
    -info     print what this runtime can do, as a protobuf message
    -v        print the version
    -h        print this
";

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Serve in the background.
    Start,
    /// Clean up.
    Delete,
    /// What `start` begins: serve, here. `directory` is the pod's.
    Serve {
        /// The listening socket, inherited.
        listener: RawFd,
        /// The lock that says that this shim lives, inherited.
        lock: RawFd,
    },
    /// Say what the runtime can do.
    Info,
    /// Say which version this is.
    Version,
    /// Say how it is used.
    Help,
}

/// The command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Args {
    /// What is to be done.
    pub(crate) action: Action,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// The container.
    pub(crate) id: String,
    /// containerd's gRPC socket.
    pub(crate) address: String,
    /// The container's bundle; the working directory when it is not given.
    pub(crate) bundle: PathBuf,
    /// Say more in the log.
    pub(crate) debug: bool,
}

/// What is wrong with a command line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ArgsError {
    /// No such flag.
    #[error("flag provided but not defined: -{0}")]
    Unknown(String),
    /// A flag without its value.
    #[error("flag needs an argument: -{0}")]
    NoValue(String),
    /// A value of the wrong kind.
    #[error("invalid value {value:?} for flag -{flag}")]
    Value {
        /// The flag.
        flag: String,
        /// Its value.
        value: String,
    },
    /// Neither `start` nor `delete`.
    #[error("unknown action {0:?}: containerd asks for start or delete")]
    Action(String),
    /// No action.
    #[error("no action: containerd asks for start or delete")]
    NoAction,
    /// A flag that the action needs.
    #[error("{0} needs the flag -{1}")]
    Missing(&'static str, &'static str),
}

impl Args {
    /// Reads a command line, without the program's name.
    pub(crate) fn parse(args: impl IntoIterator<Item = String>) -> Result<Self, ArgsError> {
        let mut args = args.into_iter();
        let mut parsed = Self {
            action: Action::Help,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: PathBuf::new(),
            debug: false,
        };
        let (mut listener, mut lock, mut positional) = (None, None, None);
        while let Some(arg) = args.next() {
            if arg == "--" {
                positional = args.next();
                break;
            }
            let Some(flag) =
                arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')).filter(|f| !f.is_empty())
            else {
                positional = Some(arg);
                break;
            };
            let (name, given) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let mut value =
                || given.clone().or_else(|| args.next()).ok_or_else(|| ArgsError::NoValue(name.to_owned()));
            match name {
                "namespace" => parsed.namespace = value()?,
                "id" => parsed.id = value()?,
                "address" => parsed.address = value()?,
                "bundle" => parsed.bundle = value()?.into(),
                // What others of containerd's shims know and this one has no use for.
                "publish-binary" | "socket" => drop(value()?),
                "listener-fd" => listener = Some(descriptor(name, &value()?)?),
                "lock-fd" => lock = Some(descriptor(name, &value()?)?),
                "debug" => parsed.debug = switch(name, given.as_deref())?,
                "info" if switch(name, given.as_deref())? => return Ok(parsed.with(Action::Info)),
                "v" | "version" if switch(name, given.as_deref())? => return Ok(parsed.with(Action::Version)),
                "h" | "help" if switch(name, given.as_deref())? => return Ok(parsed.with(Action::Help)),
                "info" | "v" | "version" | "h" | "help" => {}
                other => return Err(ArgsError::Unknown(other.to_owned())),
            }
        }
        parsed.action = match (positional.as_deref(), listener, lock) {
            (Some("start"), ..) => Action::Start,
            (Some("delete"), ..) => Action::Delete,
            (Some("help"), ..) => return Ok(parsed),
            (Some(other), ..) => return Err(ArgsError::Action(other.to_owned())),
            (None, Some(listener), Some(lock)) => Action::Serve { listener, lock },
            (None, ..) => return Err(ArgsError::NoAction),
        };
        parsed.check()
    }

    fn with(self, action: Action) -> Self {
        Self { action, ..self }
    }

    fn check(self) -> Result<Self, ArgsError> {
        let action = match self.action {
            Action::Start => "start",
            Action::Delete => "delete",
            _ => return Ok(self),
        };
        let needed = [("namespace", &self.namespace), ("id", &self.id)];
        match needed.iter().find(|(_, value)| value.is_empty()) {
            Some((flag, _)) => Err(ArgsError::Missing(action, flag)),
            None => Ok(self),
        }
    }
}

/// What Go's `strconv.ParseBool` takes.
fn switch(flag: &str, given: Option<&str>) -> Result<bool, ArgsError> {
    match given {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(ArgsError::Value { flag: flag.to_owned(), value: value.to_owned() }),
    }
}

fn descriptor(flag: &str, value: &str) -> Result<RawFd, ArgsError> {
    let number = value.parse().ok().filter(|number| *number > 2);
    number.ok_or_else(|| ArgsError::Value { flag: flag.to_owned(), value: value.to_owned() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split(' ').map(str::to_owned))
    }

    #[test]
    fn what_containerd_says_is_understood() {
        let line = "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id a -debug start";
        let args = parse(line).unwrap();
        assert_eq!((args.action, args.namespace.as_str(), args.id.as_str()), (Action::Start, "k8s.io", "a"));
        assert!(args.debug);
        let args = parse("--namespace=n --id=a -bundle /b -debug=false delete").unwrap();
        assert_eq!((args.action, args.bundle, args.debug), (Action::Delete, "/b".into(), false));
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(
            parse("-listener-fd 3 -lock-fd 4").unwrap().action,
            Action::Serve { listener: 3, lock: 4 }
        );
    }

    #[test]
    fn flags_end_with_the_first_argument_that_is_none() {
        let args = parse("-namespace n -id a start -debug").unwrap();
        assert!(!args.debug);
        let args = parse("-namespace n -id a -- start").unwrap();
        assert_eq!(args.action, Action::Start);
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(parse("-nonsense start"), Err(ArgsError::Unknown("nonsense".into())));
        assert_eq!(parse("-id"), Err(ArgsError::NoValue("id".into())));
        assert_eq!(parse("-id a start"), Err(ArgsError::Missing("start", "namespace")));
        assert_eq!(parse("-namespace n delete"), Err(ArgsError::Missing("delete", "id")));
        assert_eq!(parse("stop"), Err(ArgsError::Action("stop".into())));
        assert_eq!(Args::parse([]), Err(ArgsError::NoAction));
        assert!(matches!(parse("-debug=maybe start"), Err(ArgsError::Value { .. })));
        // Not the standard streams.
        assert!(matches!(parse("-listener-fd 1 -lock-fd 4"), Err(ArgsError::Value { .. })));
    }

    proptest! {
        #[test]
        fn no_command_line_is_too_much(args in proptest::collection::vec("(-{0,3}[a-z]{0,10}=?[a-z0-9/]{0,5})", 0..10)) {
            let _ = Args::parse(args);
        }
    }
}
