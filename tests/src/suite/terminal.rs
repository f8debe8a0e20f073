//! A command on the user's terminal: its size, its keys, its end.

use bulkhead_tests::bulkhead::{bulkhead, detach, expect_code, run_command};
use bulkhead_tests::terminal::Terminal;
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("terminal: a command has the user's size and keys, and gives the terminal back", run),
        trial("terminal: an exec has one of its own", exec),
    ]
}

fn run() -> Result {
    let terminal = Terminal::new()?;
    terminal.resize(33, 111)?;
    let script = "stty size; while [ \"$(stty size)\" = '33 111' ]; do sleep 0.1; done; stty size; \
                  trap 'echo interrupted; exit 5' INT; read line; echo got $line; while :; do sleep 0.1; done";
    let mut child = terminal.start(&mut run_command(&["-it"], &["sh", "-c", script])?)?;
    terminal.shows("33 111")?;
    ensure(terminal.is_raw()?, || "the terminal is not raw".to_owned())?;
    terminal.resize(44, 122)?;
    // The test is the session's leader of nothing: a real terminal tells its foreground processes itself.
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(child.id())?),
        nix::sys::signal::Signal::SIGWINCH,
    )?;
    terminal.shows("44 122")?;
    terminal.press("typed\r")?;
    terminal.shows("got typed")?;
    terminal.press("\x03")?;
    terminal.shows("interrupted")?;
    let status = child.wait()?;
    ensure(status.code() == Some(5), || format!("{status}"))?;
    ensure(!terminal.is_raw()?, || "the terminal is still raw".to_owned())
}

fn exec() -> Result {
    detach("screened", &["--rm"], &["sleep", "1000"])?;
    let terminal = Terminal::new()?;
    terminal.resize(12, 34)?;
    let mut child =
        terminal.start(&mut bulkhead(["exec", "-it", "screened", "sh", "-c", "tty; stty size"]))?;
    terminal.shows("/dev/pts/")?;
    terminal.shows("12 34")?;
    let status = child.wait()?;
    ensure(status.success(), || format!("{status}"))?;
    expect_code(&bulkhead(["rm", "-f", "screened"]).output()?, 0)
}
