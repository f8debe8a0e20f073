//! A stand-in for `bulkhead-vmm` that needs no KVM, for the tests in `tests/`: it speaks the same control protocol, and in place
//! of a guest it has an agent that runs commands on the host. It is an example so that cargo builds it with the tests.
//!
//! The first bytes of the guest image tell how the boot goes, commands like `fake:panic` how the machine ends.

#![allow(clippy::unwrap_used)]

mod guest;

use std::env;
use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::process::exit;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::status;
use bulkhead_vmm::console_ring::ConsoleRing;
use bulkhead_vmm::control::message::{Boot, Device, Event, Exit, Fd, FromOwner, FromVmm, Reply, Request};
use bulkhead_vmm::control::socket::{ControlSocket, SocketError};

/// What the owner gets to hear from inside the machine.
#[derive(Clone)]
pub(crate) struct Machine {
    owner: Arc<ControlSocket>,
    console: Arc<File>,
}

impl Machine {
    /// Writes to the console.
    pub(crate) fn say(&self, text: &str) {
        ConsoleRing::new(&self.console).expect("the console is large enough").write(text.as_bytes());
    }

    /// Ends the machine, and with it this process.
    pub(crate) fn end(&self, last_status: Option<u8>, how: Exit) -> ! {
        if let Some(byte) = last_status {
            self.send(Event::Status(byte));
        }
        self.send(Event::Exited(how));
        exit(0);
    }

    fn send(&self, event: Event) {
        self.owner.send(&FromVmm::Event(event), &[]).expect("the owner listens");
    }
}

fn main() {
    let args: Vec<String> = env::args().collect();
    if args.get(1).is_some_and(|arg| arg == "--version") {
        println!("bulkhead-vmm {}", env!("CARGO_PKG_VERSION"));
        return;
    }
    assert_eq!(args[1], "--control-fd");
    // SAFETY: the owner left this descriptor open for this process, and nothing else here uses its number.
    let owner = unsafe { OwnedFd::from_raw_fd(args[2].parse().expect("a number")) };
    // What runs on the host in place of a guest must not keep it open.
    rustix::io::fcntl_setfd(&owner, rustix::io::FdFlags::CLOEXEC).expect("a descriptor");
    let owner = Arc::new(ControlSocket::from(owner));
    let mut machine = None;
    let mut survives = false;
    loop {
        let (FromOwner { id, request }, fds) = match owner.receive() {
            Ok(packet) => packet,
            Err(SocketError::Closed) => {
                if survives {
                    std::thread::sleep(Duration::from_mins(10));
                }
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let reply = match request {
            Request::Boot(boot) => match Started::new(&boot, fds, &owner) {
                Ok(started) => {
                    machine = Some(started);
                    Ok(Reply::Running { started_ns: 1, configured_ns: 2, entered_ns: 3 })
                }
                Err(why) => Err(why),
            },
            Request::AddVcpus { count: 2.. } | Request::Plug { .. } | Request::Unplug { .. } => {
                Ok(Reply::Done)
            }
            Request::Stop => return,
            other => panic!("{other:?}"),
        };
        owner.send(&FromVmm::Reply { id, reply }, &[]).expect("the owner listens");
        if let Some(started) = machine.take() {
            survives = started.directive == "survive";
            started.run();
        }
    }
}

/// A machine that has been told to boot.
struct Started {
    machine: Machine,
    listener: UnixListener,
    directive: String,
    serial: bool,
}

impl Started {
    fn new(boot: &Boot, fds: Vec<OwnedFd>, owner: &Arc<ControlSocket>) -> Result<Self, String> {
        assert!(boot.cmdline.contains("root=/dev/vda") && boot.vcpus == 1 && boot.vcpus_max >= 1, "{boot:?}");
        let mut files: Vec<Option<File>> = fds.into_iter().map(|fd| Some(File::from(fd))).collect();
        let mut take = |fd: Fd| files[usize::from(fd.0)].take().expect("each descriptor is named once");
        let (mut directive, mut listener) = (String::new(), None);
        for (slot, device) in &boot.devices {
            match device {
                Device::Block(block) => {
                    for fd in &block.files {
                        let file = take(*fd);
                        if *slot == 0 {
                            let mut text = [0; 32];
                            file.read_exact_at(&mut text, 0).expect("an image");
                            directive = String::from_utf8_lossy(&text).trim_end_matches('\0').into();
                        }
                    }
                }
                Device::Vsock { listener: fd, .. } => {
                    listener = Some(UnixListener::from(OwnedFd::from(take(*fd))));
                }
                Device::Rng | Device::Console | Device::Balloon | Device::Fs { .. } => {}
            }
        }
        if directive == "refuse" {
            return Err("no such luck".into());
        }
        let machine = Machine { owner: Arc::clone(owner), console: Arc::new(take(boot.host.console)) };
        let listener = listener.expect("there is a vsock device");
        Ok(Self { machine, listener, directive, serial: boot.serial })
    }

    fn run(self) {
        match self.directive.as_str() {
            "panic-early" => {
                if self.serial {
                    self.machine.say("no init found\nKernel panic - not syncing\n");
                }
                self.machine.end(None, Exit::Reset);
            }
            "triple-fault" => {
                self.machine.say("something\n");
                self.machine.end(None, Exit::TripleFault);
            }
            "die" => {
                eprintln!("bulkhead-vmm: lost heart");
                exit(1);
            }
            "hang" => return,
            _ => {}
        }
        self.machine.send(Event::Status(status::READY));
        guest::serve(self.listener, &self.machine);
    }
}
