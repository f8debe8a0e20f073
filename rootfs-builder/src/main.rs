//! `bulkhead-guest-image`: makes the guest image out of a built agent.

use std::path::PathBuf;
use std::process::ExitCode;

use bulkhead_rootfs_builder::guest_image;
use clap::Parser;

/// Make the read-only guest image: the agent and the directories it mounts on
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The statically linked agent
    #[arg(long, value_name = "PATH")]
    agent: PathBuf,
    /// The image to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match guest_image::build(&arguments.agent, &arguments.output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("bulkhead-guest-image: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                eprint!(": {error}");
                cause = error.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}
