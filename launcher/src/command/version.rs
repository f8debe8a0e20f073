//! `version`: what is installed.

use std::path::Path;

use bulkhead_protocol::limits::PROTOCOL_VERSION;
use bulkhead_sandbox::artifacts::Artifacts;
use bulkhead_sandbox::config::Config;

use super::check::program_says;
use super::table::table;
use crate::failure::Failure;
use crate::message;

/// Shows versions and places.
pub(crate) fn version() -> Result<u8, Failure> {
    let config = Config::from_environment()?;
    let artifacts = Artifacts::locate(&config.paths)?;
    let kernel = artifacts.kernel_version().unwrap_or_else(|| "not installed".into());
    let program = |path: &Path| {
        let says = program_says(path).unwrap_or_else(|_| "cannot be run".into());
        format!("{} ({says})", path.display())
    };
    let row = |name: &str, value: String| vec![name.to_owned(), value];
    message::result(&table(&[
        row("bulkhead", env!("CARGO_PKG_VERSION").into()),
        row("agent protocol", PROTOCOL_VERSION.to_string()),
        row("VMM", program(&artifacts.vmm)),
        row("file server", program(&artifacts.file_server)),
        row("guest kernel", format!("{} ({kernel})", artifacts.kernel.display())),
        row("guest image", artifacts.guest_image.display().to_string()),
    ]));
    Ok(0)
}
