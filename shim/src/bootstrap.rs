//! What containerd says on the standard input of `start`, and what it is answered.

use std::io::{IsTerminal, Read};

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::Message;
use serde::Serialize;

use crate::args::Args;

/// Most that is read of standard input, in bytes.
const INPUT_MAX: u64 = 4 << 20;

/// Which version of the protocol of shims the answer is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    /// What every containerd and CRI-O takes; 1.7 takes nothing else.
    Two,
    /// As of containerd 2.3, which says so by the form of its input.
    Three,
}

/// What containerd said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bootstrap {
    /// The version to answer with.
    pub(crate) version: Version,
    /// The directory that the socket is to be made in.
    pub(crate) socket_dir: Option<String>,
    /// Say more in the log.
    pub(crate) debug: bool,
}

impl Bootstrap {
    /// Reads standard input. A person's terminal is not read.
    pub(crate) fn read(args: &Args) -> Self {
        let mut input = Vec::new();
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            // What cannot be read is as good as empty: versions before 2.3 say nothing that is needed here.
            let _ = stdin.lock().take(INPUT_MAX).read_to_end(&mut input);
        }
        Self::parse(&input, args)
    }

    /// Before 2.3 the input is an envelope with options, whose fields have the same numbers as the first two of the parameters: only
    /// if these say what the command line does are they the parameters.
    fn parse(input: &[u8], args: &Args) -> Self {
        let old = Self { version: Version::Two, socket_dir: None, debug: false };
        match BootstrapParams::parse_from_bytes(input) {
            Ok(params)
                if !params.instance_id.is_empty()
                    && params.instance_id == args.id
                    && params.namespace == args.namespace =>
            {
                // INFO is 0, more is below.
                Self {
                    version: Version::Three,
                    socket_dir: params.socket_dir,
                    debug: params.log_level.value() < 0,
                }
            }
            _ => old,
        }
    }
}

/// The answer, on one line without its end.
pub(crate) fn reply(version: Version, address: &str) -> String {
    #[derive(Serialize)]
    struct Reply<'a> {
        version: u32,
        address: &'a str,
        protocol: &'a str,
    }
    match version {
        // The address alone: older versions of CRI-O know nothing else.
        Version::Two => address.to_owned(),
        Version::Three => {
            let reply = Reply { version: 3, address, protocol: "ttrpc" };
            serde_json::to_string(&reply).unwrap_or_else(|_| address.to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use protobuf::well_known_types::any::Any;

    use super::*;

    fn args() -> Args {
        Args::parse(["-namespace", "k8s.io", "-id", "web", "start"].map(str::to_owned)).unwrap()
    }

    #[test]
    fn only_who_sends_parameters_gets_version_three() {
        let params = BootstrapParams {
            instance_id: "web".into(),
            namespace: "k8s.io".into(),
            socket_dir: Some("/s".into()),
            ..Default::default()
        };
        let bootstrap = Bootstrap::parse(&params.write_to_bytes().unwrap(), &args());
        assert_eq!((bootstrap.version, bootstrap.socket_dir.as_deref()), (Version::Three, Some("/s")));
        let options = Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: b"k8s.io".into(),
            ..Default::default()
        };
        for old in [options.write_to_bytes().unwrap(), Vec::new(), vec![0xff; 10]] {
            assert_eq!(Bootstrap::parse(&old, &args()).version, Version::Two);
        }
    }

    #[test]
    fn the_answer_is_the_bare_address_or_json() {
        assert_eq!(reply(Version::Two, "unix:///s/a"), "unix:///s/a");
        assert_eq!(
            reply(Version::Three, "unix:///s/a"),
            r#"{"version":3,"address":"unix:///s/a","protocol":"ttrpc"}"#
        );
    }

    proptest! {
        #[test]
        fn any_input_is_taken(input in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(Bootstrap::parse(&input, &args()).version, Version::Two);
        }
    }
}
