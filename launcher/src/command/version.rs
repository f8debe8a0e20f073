//! `version`: what is installed.

use bulkhead_protocol::limits::PROTOCOL_VERSION;
use bulkhead_sandbox::artifacts::Artifacts;
use bulkhead_sandbox::config::Config;

use super::check::vmm_says;
use super::table::table;
use crate::failure::Failure;
use crate::message;

/// Shows versions and places.
pub(crate) fn version() -> Result<u8, Failure> {
    let config = Config::from_environment()?;
    let artifacts = Artifacts::locate(&config.paths)?;
    let kernel = artifacts.kernel_version().unwrap_or_else(|| "not installed".into());
    let vmm = vmm_says(&artifacts.vmm).unwrap_or_else(|_| "cannot be run".into());
    let row = |name: &str, value: String| vec![name.to_owned(), value];
    message::result(&table(&[
        row("bulkhead", env!("CARGO_PKG_VERSION").into()),
        row("agent protocol", PROTOCOL_VERSION.to_string()),
        row("VMM", format!("{} ({vmm})", artifacts.vmm.display())),
        row("guest kernel", format!("{} ({kernel})", artifacts.kernel.display())),
        row("guest image", artifacts.guest_image.display().to_string()),
    ]));
    Ok(0)
}
