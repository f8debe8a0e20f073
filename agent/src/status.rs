//! The status port: how the VMM hears of the agent before vsock works and after all else has failed.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt as _;

use bulkhead_protocol::status;

/// Writes one byte of [`status`] to the port.
///
/// # Errors
/// When `/dev/port` cannot be opened or written.
pub(crate) fn report(byte: u8) -> io::Result<()> {
    OpenOptions::new().write(true).open("/dev/port")?.write_all_at(&[byte], status::PORT.into())
}

/// Logs what went wrong, reports [`status::FAILED`] and ends this process; when it is PID 1 the kernel then panics.
pub(crate) fn fail(what: &dyn std::fmt::Display) -> ! {
    tracing::error!("fatal: {what}");
    // Whether or not the VMM heard it, there is nothing else left to do.
    let _ = report(status::FAILED);
    std::process::exit(1)
}
