//! What a runtime for container engines needs besides: shares, limits that change, pausing, namespaces of other containers.

mod control;
mod engines;
mod namespaces;
mod shares;

use bulkhead_protocol::agent::Stdio;

/// Standard output and error, no input.
fn output() -> Stdio {
    Stdio { stdout: true, stderr: true, ..Stdio::default() }
}
