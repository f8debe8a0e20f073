//! What the launcher itself says, on standard error, and its results, on standard output. A reader that has gone is no error.

use std::io::{self, Write};

/// A warning.
pub(crate) fn warn(text: &str) {
    let _ = writeln!(io::stderr(), "bulkhead: warning: {text}");
}

/// Why a command failed.
pub(crate) fn error(text: &str) {
    let _ = writeln!(io::stderr(), "bulkhead: {text}");
}

/// A result, which says where its lines end.
pub(crate) fn result(text: &str) {
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// The same on standard error, beside the output of a container.
pub(crate) fn result_on_stderr(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}
