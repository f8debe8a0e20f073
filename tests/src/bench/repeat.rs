//! How things are measured: once for the caches, then as often as it takes for a median.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use bulkhead_tests::vm::{Result, ensure};

use crate::watchdog::watched;

/// How often everything is measured.
pub(crate) const RUNS: usize = 5;
/// How often a machine may hang before that is an error.
const ATTEMPTS: usize = 4;

/// Measures [`RUNS`] times, after one that fills the caches and does not count.
pub(crate) fn repeat<T>(mut once: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
    attempt(&mut once)?;
    (0..RUNS).map(|_| attempt(&mut once)).collect()
}

/// Does something that starts a machine, again if the machine hangs, and says so.
pub(crate) fn attempt<T>(mut once: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 1..ATTEMPTS {
        let (result, hung) = watched(&mut once);
        match result {
            Err(error) if hung => eprintln!("once more, because the guest hung: {error}"),
            result => return result,
        }
    }
    watched(&mut once).0
}

/// Runs a command, which must succeed, and tells how long it took.
pub(crate) fn timed(command: &mut Command) -> Result<(Duration, Output)> {
    let start = Instant::now();
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let took = start.elapsed();
    ensure(output.status.success(), || {
        format!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr))
    })?;
    Ok((took, output))
}

/// Runs a command, which must succeed, and returns what it wrote.
pub(crate) fn stdout_of(command: &mut Command) -> Result<String> {
    let (_, output) = timed(command)?;
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}
