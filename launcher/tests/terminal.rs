//! `run -it` and `exec -it` on a terminal: raw while the command has it, as before when it has not.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};
use support::{Host, until};

/// A terminal and what has appeared on it.
struct Terminal {
    keyboard: File,
    screen: Arc<Mutex<String>>,
    line: File,
    before: Termios,
}

impl Terminal {
    fn new(rows: u16, columns: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let line = File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
        let keyboard = File::from(master);
        let screen = Arc::new(Mutex::new(String::new()));
        let (mut output, shown) = (keyboard.try_clone().unwrap(), Arc::clone(&screen));
        std::thread::spawn(move || {
            let mut piece = [0; 1000];
            while let Ok(count @ 1..) = output.read(&mut piece) {
                shown.lock().unwrap().push_str(&String::from_utf8_lossy(&piece[..count]));
            }
        });
        let terminal = Self { keyboard, screen, before: tcgetattr(&line).unwrap(), line };
        terminal.resize(rows, columns);
        terminal
    }

    fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&self.keyboard, size).unwrap();
    }

    fn run(&self, command: &mut Command) -> Child {
        let end = || self.line.try_clone().unwrap();
        command.stdin(end()).stdout(end()).stderr(end()).spawn().unwrap()
    }

    fn shows(&self, text: &str) {
        until(text, || self.screen.lock().unwrap().contains(text));
    }

    fn press(&self, keys: &str) {
        (&self.keyboard).write_all(keys.as_bytes()).unwrap();
    }

    fn is_as_before(&self) -> bool {
        let now = tcgetattr(&self.line).unwrap();
        let before = &self.before;
        (now.input_modes, now.output_modes, now.local_modes)
            == (before.input_modes, before.output_modes, before.local_modes)
    }
}

#[test]
fn a_command_gets_a_terminal_of_the_users_size_and_follows_its_changes() {
    let host = Host::new();
    let terminal = Terminal::new(33, 111);
    let script =
        "echo $(tty | cut -c1-9) $(stty size); while [ \"$(stty size)\" = '33 111' ]; do sleep 0.05; done
                  echo now $(stty size); read line; echo got $line; exit 5";
    let mut child = terminal.run(&mut host.run(&["--rm", "-it"], &["/bin/sh", "-c", script]));
    terminal.shows("/dev/pts/ 33 111");
    until("it is raw", || !terminal.is_as_before());
    terminal.resize(44, 122);
    kill_process(Pid::from_child(&child), Signal::WINCH).unwrap();
    terminal.shows("now 44 122");
    terminal.press("word\r");
    terminal.shows("got word");
    assert_eq!(child.wait().unwrap().code(), Some(5));
    assert!(terminal.is_as_before());
}

#[test]
fn an_interrupt_travels_to_the_command_as_a_key() {
    let host = Host::new();
    let terminal = Terminal::new(24, 80);
    let script = "trap 'exit 8' INT; echo ready; while :; do sleep 0.05; done";
    let mut child = terminal.run(&mut host.run(&["--rm", "-it"], &["/bin/sh", "-c", script]));
    terminal.shows("ready");
    terminal.press("\x03");
    assert_eq!(child.wait().unwrap().code(), Some(8));
    assert!(terminal.is_as_before());
}

#[test]
fn the_terminal_is_given_back_when_the_machine_ends_and_when_the_launcher_is_told_to() {
    let host = Host::new();
    let terminal = Terminal::new(24, 80);
    let mut child =
        terminal.run(&mut host.run(&["-it", "--name", "x"], &["/bin/sh", "-c", "echo ready; sleep 60"]));
    terminal.shows("ready");
    until("it is raw", || !terminal.is_as_before());
    let rows: serde_json::Value = serde_json::from_str(&host.output(&["ps", "--json"])).unwrap();
    let vmm = Pid::from_raw(i32::try_from(rows[0]["vmm_pid"].as_i64().unwrap()).unwrap()).unwrap();
    kill_process(vmm, Signal::KILL).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(125));
    assert!(terminal.is_as_before());

    let script = "trap 'exit 9' HUP; echo again; while :; do sleep 0.05; done";
    let mut child = terminal.run(&mut host.run(&["--rm", "-it"], &["/bin/sh", "-c", script]));
    terminal.shows("again");
    kill_process(Pid::from_child(&child), Signal::HUP).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(9));
    assert!(terminal.is_as_before());
}

#[test]
fn exec_has_a_terminal_of_its_own() {
    let host = Host::new();
    let id = host.detached(&[], &["/bin/sleep", "60"]);
    let terminal = Terminal::new(20, 70);
    let script = "echo $(tty | cut -c1-9) $(stty size); read line; echo got $line; exit 5";
    let mut child = terminal.run(&mut host.bulkhead(&["exec", "-it", &id, "/bin/sh", "-c", script]));
    terminal.shows("/dev/pts/ 20 70");
    terminal.press("word\r");
    terminal.shows("got word");
    assert_eq!(child.wait().unwrap().code(), Some(5));
    assert!(terminal.is_as_before());
}
