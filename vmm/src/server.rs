//! The VMM's side of the control socket: requests in, replies out, until the owner is gone.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::time::{ClockId, clock_gettime};

use crate::control::message::{Boot, FromOwner, FromVmm, Host, Reply, Request, Restore};
use crate::control::socket::{ControlSocket, SocketError};
use crate::devices::factory::{FactoryError, Fds};
use crate::machine::{Machine, MachineError};
use crate::snapshot::{self, SnapshotError};

/// Why a request failed. The owner gets the whole chain as text.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    Fd(#[from] FactoryError),
    #[error("the machine has not been made yet: the first request must be Boot or Restore")]
    NoMachine,
    #[error("the machine has been made already")]
    Made,
    #[error("the machine must be paused for that")]
    NotPaused,
}

/// What the VMM is steering.
struct Server {
    owner: Arc<ControlSocket>,
    started_ns: u64,
    machine: Option<Machine>,
    paused: bool,
}

/// Obeys the owner until it closes the socket, says stop, or breaks the protocol. `started_ns` is when the process began, in
/// nanoseconds of `CLOCK_MONOTONIC`.
///
/// # Errors
/// [`SocketError`] when the owner breaks the protocol; its mere end is no error.
pub fn serve(owner: ControlSocket, started_ns: u64) -> Result<(), SocketError> {
    let owner = Arc::new(owner);
    let mut server = Server { owner: Arc::clone(&owner), started_ns, machine: None, paused: false };
    loop {
        let (FromOwner { id, request }, fds) = match owner.receive() {
            Ok(packet) => packet,
            Err(SocketError::Closed) => return Ok(()),
            Err(error) => return Err(error),
        };
        if request == Request::Stop {
            return Ok(());
        }
        let reply = server.handle(request, fds).map_err(|error| chain(&error));
        let starts = matches!(reply, Ok(Reply::Running { .. }));
        owner.send(&FromVmm::Reply { id, reply }, &[])?;
        if starts {
            // Not before: a guest that ends at once ends this process, and the owner would not get its reply.
            server.machine.iter().for_each(Machine::run);
        }
    }
}

/// The time of `CLOCK_MONOTONIC` in nanoseconds.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the clock exists");
    u64::try_from(now.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or(0)
}

/// An error and its causes on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

impl Server {
    fn handle(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Reply, RequestError> {
        let mut fds = Fds::new(fds);
        match request {
            Request::Boot(boot) => self.boot(&boot, &mut fds),
            Request::Restore(restore) => self.restore(&restore, &mut fds),
            Request::Plug { slot, device } => {
                self.machine()?.plug(slot, &device, &mut fds)?;
                Ok(Reply::Done)
            }
            Request::Unplug { slot } => {
                self.machine()?.unplug(slot)?;
                Ok(Reply::Done)
            }
            Request::AddVcpus { count } => {
                self.machine()?.add_vcpus(count)?;
                Ok(Reply::Done)
            }
            Request::Pause => {
                self.machine()?.pause()?;
                self.paused = true;
                Ok(Reply::Done)
            }
            Request::Resume => {
                self.machine()?.run();
                self.paused = false;
                Ok(Reply::Done)
            }
            Request::Save { file } => {
                if !self.paused {
                    return Err(RequestError::NotPaused);
                }
                let file = fds.take(file)?.into();
                self.machine()?.save(|state, memory| snapshot::write(&file, state, memory))??;
                Ok(Reply::Done)
            }
            Request::Stop => unreachable!("ends `serve`"),
        }
    }

    fn machine(&mut self) -> Result<&mut Machine, RequestError> {
        self.machine.as_mut().ok_or(RequestError::NoMachine)
    }

    fn boot(&mut self, boot: &Boot, fds: &mut Fds) -> Result<Reply, RequestError> {
        self.start(|owner| Ok(Machine::boot(boot, fds, owner)?))
    }

    fn restore(&mut self, restore: &Restore, fds: &mut Fds) -> Result<Reply, RequestError> {
        let host: &Host = &restore.host;
        self.start(|owner| {
            let (state, memory) = snapshot::open(fds.take(restore.file)?.into())?;
            Ok(Machine::restore(&state, memory, (host, &restore.devices), fds, owner)?)
        })
    }

    fn start(
        &mut self,
        make: impl FnOnce(Arc<ControlSocket>) -> Result<Machine, RequestError>,
    ) -> Result<Reply, RequestError> {
        if self.machine.is_some() {
            return Err(RequestError::Made);
        }
        let configured_ns = now_ns();
        let machine = make(Arc::clone(&self.owner))?;
        let entered_ns = now_ns();
        self.machine = Some(machine);
        Ok(Reply::Running { started_ns: self.started_ns, configured_ns, entered_ns })
    }
}
