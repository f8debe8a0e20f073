//! A command on the user's terminal: its size, its keys, its end.

use std::fs::File;
use std::io::{Read, Write};
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};

use bulkhead_tests::bulkhead::{bulkhead, detach, eventually, expect_code, run_command};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("terminal: a command has the user's size and keys, and gives the terminal back", run),
        trial("terminal: an exec has one of its own", exec),
    ]
}

/// A terminal and what has appeared on it.
struct Terminal {
    keyboard: File,
    screen: Arc<Mutex<String>>,
    line: File,
}

impl Terminal {
    fn new() -> Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let name = ptsname(&master, Vec::new())?;
        let line = File::options().read(true).write(true).open(name.to_str()?)?;
        let keyboard = File::from(master);
        let screen = Arc::new(Mutex::new(String::new()));
        let (mut output, shown) = (keyboard.try_clone()?, Arc::clone(&screen));
        std::thread::spawn(move || {
            let mut piece = [0; 1000];
            while let Ok(count @ 1..) = output.read(&mut piece) {
                let text = String::from_utf8_lossy(&piece[..count]);
                shown.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
            }
        });
        Ok(Self { keyboard, screen, line })
    }

    fn resize(&self, rows: u16, columns: u16) -> Result {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(&self.keyboard, size)?)
    }

    fn start(&self, command: &mut std::process::Command) -> Result<Child> {
        let end = || self.line.try_clone();
        Ok(command.stdin(end()?).stdout(end()?).stderr(end()?).spawn()?)
    }

    fn shows(&self, text: &str) -> Result {
        let screen = || self.screen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        eventually(text, || Ok(screen().contains(text)))
            .map_err(|error| format!("{error}: {}", screen()).into())
    }

    fn press(&self, keys: &str) -> Result {
        Ok((&self.keyboard).write_all(keys.as_bytes())?)
    }

    fn is_raw(&self) -> Result<bool> {
        Ok(!tcgetattr(&self.line)?.local_modes.contains(LocalModes::ICANON))
    }
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
