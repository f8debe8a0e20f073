//! How a command fails: an exit code as Docker uses it, and one chain of reasons for the user.

use std::error::Error;
use std::fmt;

/// Our own failure.
pub(crate) const EXIT_FAILURE: u8 = 125;
/// The command cannot be executed.
pub(crate) const EXIT_NOT_EXECUTABLE: u8 = 126;
/// The command was not found.
pub(crate) const EXIT_NOT_FOUND: u8 = 127;

/// Why a command failed, and the code it exits with.
#[derive(Debug)]
pub(crate) struct Failure {
    /// The exit code.
    pub(crate) code: u8,
    message: String,
}

impl Failure {
    /// Our own failure, in words.
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { code: EXIT_FAILURE, message: message.into() }
    }

    /// What became of a command that said so itself.
    pub(crate) fn with_code(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// The same, with what was attempted before it.
    pub(crate) fn context(mut self, attempt: &str) -> Self {
        self.message = format!("{attempt}: {}", self.message);
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl<E: Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::new(chain(&error))
    }
}

/// An error and its causes on one line. A cause that its effect has quoted already is not said twice.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {}", cause_text.trim_end());
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn causes_are_told_once() {
        let failure = Failure::from(Outer(std::io::Error::other("inner")));
        assert_eq!((failure.to_string().as_str(), failure.code), ("outer: inner", EXIT_FAILURE));
        assert_eq!(failure.context("cannot run").to_string(), "cannot run: outer: inner");
        assert_eq!(Failure::from(Outer(std::io::Error::other("outer"))).to_string(), "outer");
    }
}
