//! A vCPU and its thread.

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{Builder, JoinHandle};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::arch::state::{StateError, VcpuState};
use crate::board::Board;
use crate::control::message::Exit;
use crate::seccomp::{self, Thread};

/// What a vCPU's thread can be told.
enum Command {
    Run,
    /// Stand still, and answer when done.
    Pause(Sender<()>),
    Save(Arc<SaveContext>, Sender<Result<VcpuState, StateError>>),
}

/// What is the same for all vCPUs of a machine when their state is read.
#[derive(Debug)]
pub struct SaveContext {
    /// MSRs that are state on this host.
    pub msr_list: Vec<u32>,
    /// Bytes of XSAVE state on this host.
    pub xsave_len: usize,
}

/// The handle of a vCPU whose thread has been started.
#[derive(Debug)]
pub struct Vcpu {
    commands: Sender<Command>,
    immediate_exit: ImmediateExit,
    thread: JoinHandle<()>,
}

/// `kvm_run.immediate_exit` of a vCPU, which another thread may set at any time: `KVM_RUN` then returns at once. With the
/// signal that follows, no moment is left in which a vCPU could miss that it is wanted.
#[derive(Debug)]
struct ImmediateExit(*mut u8);

// SAFETY: the byte is in the vCPU's mapping, which its thread keeps until the process ends.
unsafe impl Send for ImmediateExit {}

/// Why a vCPU's thread could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the thread of vCPU {0}")]
pub struct ThreadError(u8, #[source] std::io::Error);

/// Makes the signal that interrupts `KVM_RUN` do nothing else. Once, before the first vCPU.
///
/// # Errors
/// When the host refuses the handler.
pub fn prepare_kick() -> Result<(), vmm_sys_util::errno::Error> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing)
}

impl Vcpu {
    /// Starts the thread of a vCPU, which waits to be told to run.
    ///
    /// # Errors
    /// [`ThreadError`] when the host has no more threads.
    pub fn start(id: u8, mut fd: VcpuFd, board: Arc<Board>) -> Result<Self, ThreadError> {
        let immediate_exit = ImmediateExit(&raw mut fd.get_kvm_run().immediate_exit);
        let (commands, receiver) = channel();
        let thread = Builder::new()
            .name(format!("{}{id}", Thread::Vcpu.name()))
            .spawn(move || {
                seccomp::confine(Thread::Vcpu);
                let reason = Runner { fd, board: Arc::clone(&board) }.obey(&receiver);
                board.end(reason);
            })
            .map_err(|source| ThreadError(id, source))?;
        Ok(Self { commands, immediate_exit, thread })
    }

    /// Lets the vCPU run.
    pub fn run(&self) {
        // The receiver is gone only when the machine has ended, and the process is about to.
        let _ = self.commands.send(Command::Run);
    }

    /// Asks the vCPU to stand still; the receiver hears when it does.
    pub fn pause(&self) -> Receiver<()> {
        let (done, receiver) = channel();
        let _ = self.commands.send(Command::Pause(done));
        // SAFETY: see `ImmediateExit`; KVM and the thread only ever see 0 or 1.
        unsafe { self.immediate_exit.0.write_volatile(1) };
        // SAFETY: the thread has not been joined, so its id is valid.
        unsafe { libc::pthread_kill(self.thread.as_pthread_t(), SIGRTMIN()) };
        receiver
    }

    /// Reads the state of a vCPU that stands still.
    pub fn save(&self, context: Arc<SaveContext>) -> Receiver<Result<VcpuState, StateError>> {
        let (done, receiver) = channel();
        let _ = self.commands.send(Command::Save(context, done));
        receiver
    }
}

/// The thread's side.
struct Runner {
    fd: VcpuFd,
    board: Arc<Board>,
}

impl Runner {
    /// Does what it is told until the guest ends.
    fn obey(mut self, commands: &Receiver<Command>) -> Exit {
        let mut running = false;
        loop {
            let command = if running {
                if let Some(end) = self.run() {
                    return end;
                }
                // Cleared before the look for a command: whoever sets it has sent the command first, so none is missed.
                self.fd.set_kvm_immediate_exit(0);
                match commands.try_recv() {
                    // A signal that came late, for a command that has been obeyed.
                    Err(TryRecvError::Empty) => continue,
                    other => other.ok(),
                }
            } else {
                commands.recv().ok()
            };
            match command {
                // The machine was dropped, which happens only while the process ends.
                None => return Exit::Kvm("the machine was dropped".to_owned()),
                Some(Command::Run) => running = true,
                Some(Command::Pause(done)) => {
                    running = false;
                    // The guest's watchdogs must not count the time that it stands still. A guest that has not set up its
                    // clock yet has no watchdogs either: KVM then says EINVAL.
                    let _ = self.fd.kvmclock_ctrl();
                    let _ = done.send(());
                }
                Some(Command::Save(context, done)) => {
                    let _ = done.send(VcpuState::save(&self.fd, &context.msr_list, context.xsave_len));
                }
            }
        }
    }

    /// Runs the guest until another thread wants something (None) or the guest ends.
    fn run(&mut self) -> Option<Exit> {
        loop {
            let exit = match self.fd.run() {
                Ok(exit) => exit,
                Err(error) if error.errno() == libc::EINTR => return None,
                Err(error) if error.errno() == libc::EAGAIN => continue,
                Err(error) => return Some(Exit::Kvm(format!("KVM_RUN: {error}"))),
            };
            match exit {
                VcpuExit::MmioWrite(address, data) => self.board.write_memory(address, data),
                VcpuExit::MmioRead(_, data) => data.fill(0xff),
                VcpuExit::IoIn(port, data) => self.board.read_port(port, data),
                VcpuExit::IoOut(port, data) => {
                    if let Some(end) = self.board.write_port(port, data) {
                        return Some(end);
                    }
                }
                VcpuExit::Shutdown => return Some(Exit::TripleFault),
                VcpuExit::FailEntry(reason, cpu) => {
                    return Some(Exit::Kvm(format!(
                        "KVM_EXIT_FAIL_ENTRY: hardware reason {reason:#x} on CPU {cpu}"
                    )));
                }
                other => return Some(Exit::Kvm(format!("unexpected exit {other:?}"))),
            }
        }
    }
}
