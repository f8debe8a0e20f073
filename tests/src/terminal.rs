//! A user's terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::bulkhead::eventually;
use crate::vm::Result;

/// A terminal and what has appeared on it.
pub struct Terminal {
    keyboard: File,
    screen: Arc<Mutex<String>>,
    line: File,
}

impl Terminal {
    pub fn new() -> Result<Self> {
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

    pub fn resize(&self, rows: u16, columns: u16) -> Result {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(tcsetwinsize(&self.keyboard, size)?)
    }

    pub fn start(&self, command: &mut std::process::Command) -> Result<Child> {
        let end = || self.line.try_clone();
        Ok(command.stdin(end()?).stdout(end()?).stderr(end()?).spawn()?)
    }

    pub fn shows(&self, text: &str) -> Result {
        let screen = || self.screen.lock().unwrap_or_else(PoisonError::into_inner).clone();
        eventually(text, || Ok(screen().contains(text)))
            .map_err(|error| format!("{error}: {}", screen()).into())
    }

    pub fn press(&self, keys: &str) -> Result {
        Ok((&self.keyboard).write_all(keys.as_bytes())?)
    }

    pub fn is_raw(&self) -> Result<bool> {
        Ok(!tcgetattr(&self.line)?.local_modes.contains(LocalModes::ICANON))
    }
}
