//! What the lab's QEMU does to a guest now and then, which is no fault of the guest's (docs/lab.md).

use crate::vm::{Result, SILENT};

/// In the words of those who notice.
const LOST: [&str; 4] = ["triple fault", "TripleFault", "does not answer within", SILENT];

/// Runs a test, and once more if the lab has lost its guest, which is said. On any other machine a test has one try.
///
/// # Errors
/// What the test says.
pub fn unless_lost(name: &str, test: impl Fn() -> Result) -> std::result::Result<(), String> {
    match test().map_err(|error| error.to_string()) {
        Err(error) if in_lab() && LOST.iter().any(|lost| error.contains(lost)) => {
            eprintln!("\nonce more, because the lab lost the guest: {name}: {error}");
            test().map_err(|error| error.to_string())
        }
        result => result,
    }
}

/// True in the lab, whose kernel is told so.
fn in_lab() -> bool {
    std::fs::read_to_string("/proc/cmdline").is_ok_and(|cmdline| cmdline.contains("lab.boot="))
}
