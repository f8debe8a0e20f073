//! What the name of a standard stream means: nothing, a path, or a URI.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use percent_encoding::percent_decode_str;

use super::IoError;

/// Where output is to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Nowhere.
    Null,
    /// A fifo, or whatever else is there.
    Path(PathBuf),
    /// A file that is appended to; for both streams.
    File(PathBuf),
    /// A program that is given the output; for both streams.
    Binary(Program),
}

/// A logging program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Program {
    /// The executable.
    pub(super) path: PathBuf,
    /// What it is called with.
    pub(super) args: Vec<String>,
    /// True when only a byte says that it is ready, as of containerd 2.2; otherwise the end of file does too.
    pub(super) says_ready: bool,
}

impl Target {
    /// Reads a name.
    pub(super) fn parse(name: &str) -> Result<Self, IoError> {
        if name.is_empty() {
            return Ok(Self::Null);
        }
        let Some((scheme, rest)) = name.split_once("://") else { return Ok(Self::Path(path(name, name)?)) };
        // A URI of these schemes has no host: what follows is the path at once.
        let (location, query) = rest.split_once('?').unwrap_or((rest, ""));
        let decoded = OsString::from_vec(percent_decode_str(location).collect());
        match scheme {
            "fifo" => Ok(Self::Path(path(name, decoded)?)),
            "file" => Ok(Self::File(path(name, decoded)?)),
            "binary" | "binary-v2" => Ok(Self::Binary(Program {
                path: path(name, decoded)?,
                args: arguments(query),
                says_ready: scheme == "binary-v2",
            })),
            other => Err(IoError::Scheme(other.to_owned())),
        }
    }

    /// True for a name of standard output that takes standard error as well.
    pub(super) fn is_for_both(name: &str) -> bool {
        ["file://", "binary://", "binary-v2://"].iter().any(|scheme| name.starts_with(scheme))
    }
}

/// Where input comes from: a fifo, by its path.
pub(super) fn input(name: &str) -> Result<PathBuf, IoError> {
    match Target::parse(name)? {
        Target::Path(path) => Ok(path),
        _ => Err(IoError::Name(name.to_owned(), "standard input comes from a fifo")),
    }
}

fn path(name: &str, path: impl Into<PathBuf>) -> Result<PathBuf, IoError> {
    let path = path.into();
    if !path.is_absolute() {
        return Err(IoError::Name(name.to_owned(), "it is not an absolute path"));
    }
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(IoError::Name(name.to_owned(), "it has a zero byte"));
    }
    Ok(path)
}

/// Each key of a query is an argument, and so is its value if it has one. Of several values, the first holds.
fn arguments(query: &str) -> Vec<String> {
    let mut args = Vec::new();
    let mut keys = Vec::new();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        if keys.contains(&key) || key.contains('\0') || value.contains('\0') {
            continue;
        }
        args.push(key.clone().into_owned());
        if !value.is_empty() {
            args.push(value.into_owned());
        }
        keys.push(key);
    }
    args
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_nothing_paths_and_uris() {
        assert_eq!(Target::parse("").unwrap(), Target::Null);
        assert_eq!(Target::parse("/run/a").unwrap(), Target::Path("/run/a".into()));
        assert_eq!(Target::parse("fifo:///run/a").unwrap(), Target::Path("/run/a".into()));
        assert_eq!(Target::parse("file:///var/a%20b").unwrap(), Target::File("/var/a b".into()));
        let program = Program {
            path: "/usr/bin/logger".into(),
            args: ["a", "b c", "flag"].map(str::to_owned).into(),
            says_ready: false,
        };
        let binary = Target::parse("binary:///usr/bin/logger?a=b+c&flag&a=d").unwrap();
        assert_eq!(binary, Target::Binary(program.clone()));
        let binary = Target::parse("binary-v2:///usr/bin/logger?a=b%20c&flag=").unwrap();
        assert_eq!(binary, Target::Binary(Program { says_ready: true, ..program }));
    }

    #[test]
    fn what_means_nothing_is_refused() {
        assert!(matches!(Target::parse("http://a/b"), Err(IoError::Scheme(scheme)) if scheme == "http"));
        for bad in ["relative", "file://relative", "binary://host/path", "file:///a%00b"] {
            assert!(matches!(Target::parse(bad), Err(IoError::Name(..))), "{bad}");
        }
        assert!(matches!(input("file:///a"), Err(IoError::Name(..))));
    }

    proptest! {
        #[test]
        fn every_name_is_refused_or_has_an_absolute_path(name in "(file|fifo|binary|x)?(://)?/?\\PC{0,40}") {
            match Target::parse(&name) {
                Ok(Target::Path(path) | Target::File(path)) => prop_assert!(path.is_absolute()),
                Ok(Target::Binary(program)) => prop_assert!(program.path.is_absolute()),
                Ok(Target::Null) => prop_assert!(name.is_empty()),
                Err(_) => {}
            }
        }
    }
}
