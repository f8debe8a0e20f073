//! `run`: from the command line to the exit code of a container.
//!
//! - [`request`]: what the command line asks for, checked
//! - [`root`]: what the container's root is made of
//! - [`supervise`]: one container's life, in this process
//! - [`detach`]: the same in a process of its own
//! - [`timings`]: where the time went

mod detach;
mod request;
mod root;
mod supervise;
mod timings;

use bulkhead_sandbox::timing::Stamp;

use crate::cli::RunArgs;
use crate::failure::Failure;
use crate::process::terminal;
use crate::runtime;
use request::Request;
use supervise::Mode;
pub(crate) use supervise::refusal;

/// Runs a container in the foreground, or leaves it to a process in the background. `started` is when this program began.
pub(crate) fn run(args: &RunArgs, started: Stamp) -> Result<u8, Failure> {
    if args.detach {
        return detach::detach();
    }
    if args.process.tty && args.process.interactive {
        terminal::require()?;
    }
    let request = Request::new(args)?;
    runtime::block_on(supervise::supervise(request, Mode::Foreground, started))
}

/// The process in the background.
pub(crate) fn supervise(args: &RunArgs, started: Stamp) -> Result<u8, Failure> {
    detach::leave_session()?;
    let request = Request::new(args)?;
    runtime::block_on(supervise::supervise(request, Mode::Background, started))
}
