//! How things are measured: once for the caches, then as often as it takes for a median.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use bulkhead_tests::vm::{Result, ensure};

/// How often everything is measured.
pub(crate) const RUNS: usize = 5;

/// Measures [`RUNS`] times, after one that fills the caches and does not count.
pub(crate) fn repeat<T>(mut once: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
    once()?;
    (0..RUNS).map(|_| once()).collect()
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
