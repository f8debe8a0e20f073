//! `containerd-shim-bulkhead-v2`: containerd's runtime `io.containerd.bulkhead.v2`. One shim serves one container, or all containers of
//! a pod, which share its virtual machine.
//!
//! - [`args`], [`bootstrap`]: what containerd says when it starts the program
//! - [`start`], [`daemon`], [`address`], [`record`]: how a shim comes to be, and where it is found
//! - [`delete`], [`info`]: the other things that the program can do
//! - [`serve`], [`service`]: a shim while it serves
//! - [`shim`], [`machine`], [`task`], [`process`]: its containers and their machine
//! - [`create`], [`lifecycle`], [`update`], [`attend`]: what is done with them, and what comes by itself
//! - [`io`]: standard streams
//! - [`events`], [`metrics`], [`options`], [`errors`], [`any`]: what containerd is told, and how
//! - [`log`]: the log

mod address;
mod any;
mod args;
mod attend;
mod bootstrap;
mod create;
mod daemon;
mod delete;
mod errors;
mod events;
mod info;
mod io;
mod lifecycle;
mod log;
mod machine;
mod metrics;
mod options;
mod process;
mod record;
mod serve;
mod service;
mod shim;
mod start;
mod task;
mod update;

use std::error::Error;
use std::io::Write as _;
use std::process::ExitCode;

use containerd_shim_protos::protobuf::Message;

use args::{Action, Args};
use errors::chain;

/// What Go's `flag` package exits with.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let args = match Args::parse(std::env::args().skip(1)) {
        Ok(args) => args,
        Err(error) => {
            complain(&format!("{error}\n\n{}", args::USAGE));
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let done = match args.action {
        Action::Start => start::start(&args).map(String::into_bytes).map_err(Into::into),
        Action::Delete => delete::delete(&args).map_err(Into::into).and_then(|reply| bytes(&reply)),
        Action::Serve { listener, lock } => serve(&args, listener, lock),
        Action::Info => bytes(&info::info()),
        Action::Version => Ok(version().into_bytes()),
        Action::Help => Ok(args::USAGE.into()),
    };
    match done.and_then(|reply| Ok(std::io::stdout().write_all(&reply)?)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("{}\n", chain(error.as_ref())));
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &Args, listener: i32, lock: i32) -> Result<Vec<u8>, Box<dyn Error>> {
    // First, before anything opens a descriptor that could be taken for one that was passed on.
    let (listener, lock) = daemon::take_over(listener, lock)?;
    log::to_fifo(&args.bundle, args.debug);
    if let Err(error) = serve::serve(args, listener, lock) {
        tracing::error!(%error, "the shim fails");
        return Err(error.into());
    }
    Ok(Vec::new())
}

fn bytes(message: &impl Message) -> Result<Vec<u8>, Box<dyn Error>> {
    Ok(message.write_to_bytes()?)
}

fn version() -> String {
    format!("containerd-shim-bulkhead-v2:\n  Version: {}\n", env!("CARGO_PKG_VERSION"))
}

/// Why it failed, for containerd's error message or a person's terminal.
fn complain(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}
