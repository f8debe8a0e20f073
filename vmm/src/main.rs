//! `bulkhead-vmm`: one virtual machine, steered over a control socket by the process that started it. Not for use by hand.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;

use bulkhead_vmm::control::socket::ControlSocket;
use bulkhead_vmm::jail::{Jail, no_new_privileges};
use bulkhead_vmm::seccomp::lock_down;
use bulkhead_vmm::server::{chain, now_ns, serve};

const USAGE: &str =
    "usage: bulkhead-vmm --control-fd N [--uid UID --gid GID --root DIR]\n       bulkhead-vmm --version";

/// What the command line says.
enum Invocation {
    Version,
    Serve { control: RawFd, jail: Option<Jail> },
}

fn main() -> ExitCode {
    let started_ns = now_ns();
    match parse(std::env::args().skip(1)) {
        None => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
        Some(Invocation::Version) => {
            println!("bulkhead-vmm {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some(Invocation::Serve { control, jail }) => match run(control, jail.as_ref(), started_ns) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("bulkhead-vmm: {}", chain(error.as_ref()));
                ExitCode::FAILURE
            }
        },
    }
}

fn run(control: RawFd, jail: Option<&Jail>, started_ns: u64) -> Result<(), Box<dyn std::error::Error>> {
    match jail {
        Some(jail) => jail.enter()?,
        None => no_new_privileges()?,
    }
    lock_down()?;
    // SAFETY: the owner has left this descriptor open for us, and nothing else here knows its number.
    let control = unsafe { OwnedFd::from_raw_fd(control) };
    Ok(serve(ControlSocket::from(control), started_ns)?)
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Option<Invocation> {
    let (mut control, mut uid, mut gid, mut root) = (None, None, None, None);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--version" => return Some(Invocation::Version),
            "--control-fd" => control = Some(arguments.next()?.parse().ok().filter(|fd| *fd > 2)?),
            "--uid" => uid = Some(arguments.next()?.parse().ok().filter(|uid| *uid != 0)?),
            "--gid" => gid = Some(arguments.next()?.parse().ok().filter(|gid| *gid != 0)?),
            "--root" => root = Some(PathBuf::from(arguments.next()?)),
            _ => return None,
        }
    }
    let jail = match (uid, gid, root) {
        (Some(uid), Some(gid), Some(root)) => Some(Jail { uid, gid, root }),
        (None, None, None) => None,
        _ => return None,
    };
    Some(Invocation::Serve { control: control?, jail })
}
