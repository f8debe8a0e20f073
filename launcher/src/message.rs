//! What the launcher itself says, on standard error, and its results, on standard output. A reader that has gone is no error.

use std::io::{self, Write};

use bulkhead_sandbox::console::escape;

/// A warning.
pub(crate) fn warn(text: &str) {
    say(&format!("bulkhead: warning: {}\n", printable_lines(text)));
}

/// Why a command failed.
pub(crate) fn error(text: &str) {
    say(&format!("bulkhead: {}\n", printable_lines(text)));
}

/// A result, which says where its lines end.
pub(crate) fn result(text: &str) {
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// The same on standard error, beside the output of a container.
pub(crate) fn result_on_stderr(text: &str) {
    say(text);
}

/// In one piece: standard error has no buffer, and whoever reads it is woken by each write.
fn say(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// A text that names of files, images or guests may be part of, made fit for a terminal: control characters appear as escape
/// sequences.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { escape(c.to_string().as_bytes()) } else { c.into() }).collect()
}

/// The same for a text that says where its lines end.
fn printable_lines(text: &str) -> String {
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert_eq!(printable("ä \x1b[2J\r\n\u{9b}1m"), "ä \\x1b[2J\\r\\n\\xc2\\x9b1m");
        assert_eq!(printable_lines("one\n  two\x07"), "one\n  two\\x07");
    }
}
