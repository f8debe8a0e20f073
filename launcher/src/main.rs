//! `bulkhead`: runs containers, each in a virtual machine of its own.

mod cli;
mod command;
mod container;
mod failure;
mod log;
mod message;
mod process;
mod progress;
mod run;
mod runtime;
mod signal;
mod spec;

use std::process::ExitCode;

use bulkhead_sandbox::timing::Stamp;
use clap::Parser;
use clap::error::ErrorKind;

use cli::{Cli, Command};
use failure::{EXIT_FAILURE, Failure};

fn main() -> ExitCode {
    let started = Stamp::now();
    std::panic::set_hook(Box::new(panicked));
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to standard output, complaints to standard error; a reader that has gone is no error.
            let _ = error.print();
            let asked = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            return ExitCode::from(if asked { 0 } else { EXIT_FAILURE });
        }
    };
    log_if_asked();
    match dispatch(&cli.command, started) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            message::error(&failure.to_string());
            ExitCode::from(failure.code)
        }
    }
}

fn dispatch(command: &Command, started: Stamp) -> Result<u8, Failure> {
    match command {
        Command::Run(args) => run::run(args, started),
        Command::Supervise(args) => run::supervise(args, started),
        Command::Exec(args) => command::exec::exec(args),
        Command::Ps(args) => command::ps::ps(args),
        Command::Logs(args) => command::logs::logs(args),
        Command::Stop(args) => command::end::stop(args),
        Command::Kill(args) => command::end::kill(args),
        Command::Rm(args) => command::end::rm(args),
        Command::Image(command) => command::image::image(command),
        Command::Config(command) => command::config::config(command),
        Command::Check(args) => command::check::check(args),
        Command::Version => command::version::version(),
    }
}

/// `BULKHEAD_LOG` names the least level that is told.
fn log_if_asked() {
    let level = std::env::var("BULKHEAD_LOG").ok().and_then(|level| level.parse::<tracing::Level>().ok());
    if let Some(level) = level {
        tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).init();
    }
}

/// A mistake of ours: the user's terminal comes first, then one line that can be reported.
fn panicked(info: &std::panic::PanicHookInfo<'_>) {
    process::terminal::restore();
    message::error(&format!("internal error, please report it: {info}").replace('\n', " "));
    std::process::exit(EXIT_FAILURE.into());
}
