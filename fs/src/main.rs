//! `bulkhead-fs`: the file server of one guest, steered over a control socket by the process that started it. Not for use by hand.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;

use bulkhead_fs::control::SHARES_MAX;
use bulkhead_fs::host::OwnDescriptors;
use bulkhead_fs::identity::Identities;
use bulkhead_fs::jail::{Jail, set_limits};
use bulkhead_fs::seccomp::lock_down;
use bulkhead_fs::server::Server;
use bulkhead_fs::session::{Limits, Session};
use bulkhead_fs::worker::Worker;
use bulkhead_vmm::control::socket::ControlSocket;
use bulkhead_vmm::jail::no_new_privileges;
use bulkhead_vmm::server::chain;

const USAGE: &str = "usage: bulkhead-fs --requests-fd N --control-fd M [--root DIR] [--nofile N]\n       bulkhead-fs --version";

/// Descriptors, unless said otherwise, and the fewest with which anything works.
const NOFILE: u64 = 65536;
const NOFILE_MIN: u64 = 128;

/// What the command line says.
enum Invocation {
    Version,
    Serve { requests: RawFd, control: RawFd, jail: Option<Jail>, nofile: u64 },
}

fn main() -> ExitCode {
    match parse(std::env::args().skip(1)) {
        None => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
        Some(Invocation::Version) => {
            println!("bulkhead-fs {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some(Invocation::Serve { requests, control, jail, nofile }) => {
            match run(requests, control, jail.as_ref(), nofile) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("bulkhead-fs: {}", chain(error.as_ref()));
                    ExitCode::FAILURE
                }
            }
        }
    }
}

fn run(
    requests: RawFd,
    control: RawFd,
    jail: Option<&Jail>,
    nofile: u64,
) -> Result<(), Box<dyn std::error::Error>> {
    let nofile = usize::try_from(set_limits(nofile)?)?;
    let (own, identities) = if let Some(jail) = jail {
        jail.enter()?;
        (OwnDescriptors::WorkingDirectory, Identities::Any)
    } else {
        no_new_privileges()?;
        (OwnDescriptors::Proc, Identities::Own)
    };
    let worker = Worker::start()?;
    lock_down()?;
    // SAFETY: the owner has left these descriptors open for us, and nothing else here knows their numbers.
    let (requests, control) = unsafe { (OwnedFd::from_raw_fd(requests), OwnedFd::from_raw_fd(control)) };
    // What is left over is for sockets, standard streams and what is open for a moment.
    let limits = Limits { cached: nofile / 4, handles: nofile / 2, shares: SHARES_MAX.min(nofile / 8) };
    let session = Session::new(limits, own, identities);
    Ok(Server::new(session, worker, requests, ControlSocket::from(control)).run()?)
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Option<Invocation> {
    let (mut requests, mut control, mut jail, mut nofile) = (None, None, None, NOFILE);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--version" => return Some(Invocation::Version),
            "--requests-fd" => requests = Some(arguments.next()?.parse().ok().filter(|fd| *fd > 2)?),
            "--control-fd" => control = Some(arguments.next()?.parse().ok().filter(|fd| *fd > 2)?),
            "--root" => jail = Some(Jail { root: PathBuf::from(arguments.next()?) }),
            "--nofile" => nofile = arguments.next()?.parse().ok().filter(|nofile| *nofile >= NOFILE_MIN)?,
            _ => return None,
        }
    }
    let (requests, control) = (requests?, control?);
    (requests != control).then_some(Invocation::Serve { requests, control, jail, nofile })
}
