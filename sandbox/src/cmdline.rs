//! The guest kernel's command line, as far as it is not the VMM's business.

use bulkhead_protocol::status;

/// How much the guest's kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verbosity {
    /// Errors only: every line of console output costs boot time.
    Quiet,
    /// Everything, from the first instruction on, through the 16550.
    Early,
}

/// The command line for a guest whose image is the first disk.
pub(crate) fn cmdline(verbosity: Verbosity) -> String {
    // reboot=k: the only way to reset that the VMM offers is the keyboard controller's. panic=-1: reset at once.
    let base = "root=/dev/vda rootfstype=erofs ro init=/agent reboot=k panic=-1 console=hvc0";
    match verbosity {
        Verbosity::Quiet => format!("{base} quiet loglevel=4"),
        Verbosity::Early => format!("{base} earlyprintk=ttyS0 ignore_loglevel"),
    }
}

// The agent finds the port in the same crate; a change there would have to be made in the VMM's request as well, which takes
// it from here.
pub(crate) const STATUS_PORT: u16 = status::PORT;
