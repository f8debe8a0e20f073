//! `run -d`: the container's life in a process of its own, which this one leaves when the container has started.

use std::env;
use std::fs::File;
use std::io::Read;
use std::process::{Command, Stdio};

use rustix::process::setsid;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::container::name::ID_LENGTH;
use crate::failure::{EXIT_FAILURE, Failure};
use crate::message;

/// Starts the process in the background with the same arguments and waits for what it has to say: the id of the container, or
/// nothing, when it has told the user itself what went wrong.
pub(crate) fn detach() -> Result<u8, Failure> {
    let executable = env::current_exe()?;
    let mut command = Command::new(executable);
    // The words after `bulkhead run`: there are no options before the command.
    command.arg("supervise").args(env::args_os().skip(2));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let mut id = String::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(ID_LENGTH as u64 + 1).read_to_string(&mut id)?;
    }
    if id.len() > ID_LENGTH {
        message::result(&id);
        return Ok(0);
    }
    let code = child.wait()?.code();
    // What failed in the background has been reported from there.
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(EXIT_FAILURE))
}

/// Leaves the terminal's session, in the background.
pub(crate) fn leave_session() -> Result<(), Failure> {
    setsid()?;
    Ok(())
}

/// Says that the container has started, and lets go of everything that belongs to the user's session.
pub(crate) fn report(id: &str) -> Result<(), Failure> {
    use std::io::Write;

    let told = std::io::stdout().write_all(format!("{id}\n").as_bytes());
    told.map_err(|e| Failure::from(e).context("the command that started this container was interrupted"))?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    env::set_current_dir("/")?;
    Ok(())
}
