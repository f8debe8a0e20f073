//! The options of a Create request: which configuration holds.

use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::Message;
use protobuf::well_known_types::any::Any;

use crate::any::kind;

/// The messages of `proto/runtimeoptions.proto`.
#[allow(missing_docs, unreachable_pub, unused, non_upper_case_globals)]
#[allow(clippy::all, clippy::pedantic, clippy::unwrap_used)]
mod messages {
    include!(concat!(env!("OUT_DIR"), "/runtimeoptions.rs"));
}

/// What containerd calls these messages.
const RUNTIME_OPTIONS: &str = "runtimeoptions.v1.Options";
const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";

/// Where the configuration comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The host's own file.
    Host,
    /// Another file.
    File(PathBuf),
    /// The text itself.
    Text(String),
}

/// Why options cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OptionsError {
    /// The message is damaged.
    #[error("the runtime's options cannot be decoded")]
    Decode(#[from] protobuf::Error),
    /// The text is not text.
    #[error("the configuration in the runtime's options is not UTF-8")]
    Text,
    /// The file's name is relative.
    #[error("the configuration {0:?} in the runtime's options must be an absolute path")]
    Relative(PathBuf),
}

/// Reads the options, if there are any.
pub(crate) fn source(options: Option<&Any>) -> Result<Source, OptionsError> {
    let Some(options) = options else { return Ok(Source::Host) };
    match kind(options) {
        "" | RUNC_OPTIONS => Ok(Source::Host),
        RUNTIME_OPTIONS => {
            let options = messages::Options::parse_from_bytes(&options.value)?;
            if !options.config_path.is_empty() {
                let path = PathBuf::from(options.config_path);
                return if path.is_absolute() {
                    Ok(Source::File(path))
                } else {
                    Err(OptionsError::Relative(path))
                };
            }
            match String::from_utf8(options.config_body) {
                Ok(text) if text.trim().is_empty() => Ok(Source::Host),
                Ok(text) => Ok(Source::Text(text)),
                Err(_) => Err(OptionsError::Text),
            }
        }
        other => {
            tracing::warn!(kind = other, "options of a kind that is not known are ignored");
            Ok(Source::Host)
        }
    }
}

impl Source {
    /// The file that holds the configuration, which a text is written to in `directory`; nothing for the host's own.
    pub(crate) fn file(&self, directory: &Path) -> std::io::Result<Option<PathBuf>> {
        match self {
            Self::Host => Ok(None),
            Self::File(path) => Ok(Some(path.clone())),
            Self::Text(text) => {
                let path = directory.join("config.toml");
                std::fs::write(&path, text)?;
                Ok(Some(path))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: Vec<u8>) -> Any {
        Any { type_url: type_url.into(), value, ..Default::default() }
    }

    fn options(path: &str, body: &[u8]) -> Any {
        let options =
            messages::Options { config_path: path.into(), config_body: body.into(), ..Default::default() };
        any(RUNTIME_OPTIONS, options.write_to_bytes().unwrap())
    }

    #[test]
    fn a_path_comes_before_a_text_and_a_text_before_the_hosts_own() {
        assert_eq!(source(None).unwrap(), Source::Host);
        assert_eq!(source(Some(&options("", b" \n"))).unwrap(), Source::Host);
        assert_eq!(source(Some(&options("/a", b"b"))).unwrap(), Source::File("/a".into()));
        assert_eq!(source(Some(&options("", b"b"))).unwrap(), Source::Text("b".into()));
    }

    #[test]
    fn the_options_of_runc_and_unknown_ones_are_tolerated() {
        assert_eq!(source(Some(&any(RUNC_OPTIONS, vec![1, 2, 3]))).unwrap(), Source::Host);
        assert_eq!(source(Some(&any("other", vec![0xff]))).unwrap(), Source::Host);
        assert_eq!(source(Some(&any("", vec![]))).unwrap(), Source::Host);
    }

    #[test]
    fn damaged_options_are_refused() {
        assert!(matches!(source(Some(&any(RUNTIME_OPTIONS, vec![0xff]))), Err(OptionsError::Decode(_))));
        assert!(matches!(source(Some(&options("", b"\xff"))), Err(OptionsError::Text)));
        assert!(matches!(source(Some(&options("a", b""))), Err(OptionsError::Relative(_))));
    }

    #[test]
    fn a_text_becomes_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = Source::Text("[defaults]\ncpus = 3\n".into()).file(directory.path()).unwrap().unwrap();
        assert_eq!(bulkhead_sandbox::config::Config::load(&file).unwrap().defaults.cpus, 3);
    }
}
