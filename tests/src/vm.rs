//! A VMM as its owner sees it: started, configured and steered by the control socket alone.

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use bulkhead_protocol::status;
use bulkhead_sandbox::agent::Agent;
use bulkhead_sandbox::disk::Disk;
use bulkhead_vmm::console_ring;
use bulkhead_vmm::control::message::{
    Block, BlockLayout, Boot, Device, Event, Exit, Fd, FromOwner, FromVmm, Host, Reply, Request, Restore,
};
use bulkhead_vmm::control::socket::{ControlSocket, SocketError};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::time::{TimeVal, TimeValLike};

/// What a test returns.
pub type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// The command line that a guest boots with; the VMM adds the slots.
pub const CMDLINE: &str = "console=hvc0 root=/dev/vda rootfstype=erofs ro init=/agent reboot=k panic=-1";

pub const SLOT_ROOT: u8 = 0;
pub const SLOT_VSOCK: u8 = 1;
pub const SLOT_RNG: u8 = 2;
pub const SLOT_CONSOLE: u8 = 3;
pub const SLOT_BALLOON: u8 = 4;

/// How long a VMM may say nothing before its guest is taken to hang, in seconds.
const PATIENCE_S: i64 = 120;
/// What is said then.
pub const SILENT: &str = "the VMM has said nothing for two minutes";

/// Where the installed artifacts are.
pub fn artifact(name: &str) -> PathBuf {
    let prefix =
        std::env::var_os("BULKHEAD_PREFIX").map_or_else(|| PathBuf::from("/usr/local"), PathBuf::from);
    prefix.join(name)
}

/// The uid and gid of jailed VMMs.
pub const JAIL_ID: u32 = 64001;

/// Fails with a text unless the condition holds.
///
/// # Errors
/// That text.
pub fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result {
    if holds { Ok(()) } else { Err(otherwise().into()) }
}

/// How a machine is made.
#[derive(Clone, Debug)]
pub struct Plan {
    pub memory_mib: u32,
    pub vcpus: u8,
    pub vcpus_max: u8,
    pub cmdline: String,
    pub kernel: PathBuf,
    pub root: PathBuf,
    pub serial: bool,
    pub jailed: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            memory_mib: 256,
            vcpus: 1,
            vcpus_max: 1,
            cmdline: CMDLINE.to_owned(),
            kernel: artifact("share/bulkhead/vmlinux"),
            root: artifact("share/bulkhead/guest.erofs"),
            serial: false,
            jailed: true,
        }
    }
}

/// A running VMM.
pub struct Vm {
    child: Process,
    control: ControlSocket,
    console: File,
    directory: tempfile::TempDir,
    next_id: u32,
    events: Vec<Event>,
    running: Option<Reply>,
}

impl Vm {
    /// Starts a VMM that waits for its first request.
    pub fn spawn(plan: &Plan) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let (control, theirs) = ControlSocket::pair()?;
        setsockopt(&control, ReceiveTimeout, &TimeVal::seconds(PATIENCE_S))?;
        let theirs = OwnedFd::from(theirs);
        let mut command = Command::new(artifact("libexec/bulkhead/bulkhead-vmm"));
        command.args(["--control-fd", &theirs.as_raw_fd().to_string()]).stdin(Stdio::null());
        if plan.jailed {
            let root = directory.path().join("root");
            std::fs::create_dir(&root)?;
            let id = JAIL_ID.to_string();
            command.args(["--uid", &id, "--gid", &id, "--root"]).arg(root);
        }
        let fd = theirs.as_raw_fd();
        // SAFETY: between fork and exec only one system call is made.
        unsafe {
            command.pre_exec(move || {
                fcntl(BorrowedFd::borrow_raw(fd), FcntlArg::F_SETFD(FdFlag::empty()))?;
                Ok(())
            });
        }
        let child = Process(Some(command.spawn()?));
        let console = File::from(memfd_create(c"console", MFdFlags::MFD_CLOEXEC)?);
        console.set_len(console_ring::FILE_SIZE as u64)?;
        Ok(Self { child, control, console, directory, next_id: 0, events: Vec::new(), running: None })
    }

    /// Starts a VMM and boots a machine with the four devices that every sandbox has, and a console.
    pub fn boot(plan: &Plan) -> Result<Self> {
        let mut vm = Self::spawn(plan)?;
        let kernel = File::open(&plan.kernel)?;
        let root = File::open(&plan.root)?;
        let listener = vm.listen()?;
        let kvm = kvm()?;
        let console = vm.console.try_clone()?;
        let request = Request::Boot(Boot {
            host: Host { kvm: Fd(0), console: Fd(1), status_port: status::PORT },
            memory_mib: plan.memory_mib,
            vcpus: plan.vcpus,
            vcpus_max: plan.vcpus_max,
            kernel: Fd(2),
            cmdline: plan.cmdline.clone(),
            devices: devices(Fd(3), Fd(4)),
            serial: plan.serial,
        });
        let fds = [kvm.as_fd(), console.as_fd(), kernel.as_fd(), root.as_fd(), listener.as_fd()];
        vm.running = Some(vm.request(request, &fds)?);
        Ok(vm)
    }

    /// Boots a machine and waits until its agent is ready.
    pub fn ready(plan: &Plan) -> Result<Self> {
        let mut vm = Self::boot(plan)?;
        vm.wait_ready()?;
        Ok(vm)
    }

    /// Makes the machine that is in `file`.
    pub fn restore(plan: &Plan, file: &File) -> Result<Self> {
        let mut vm = Self::spawn(plan)?;
        let root = File::open(&plan.root)?;
        let listener = vm.listen()?;
        let kvm = kvm()?;
        let console = vm.console.try_clone()?;
        let request = Request::Restore(Restore {
            host: Host { kvm: Fd(0), console: Fd(1), status_port: status::PORT },
            file: Fd(2),
            devices: devices(Fd(3), Fd(4)),
        });
        vm.request(request, &[kvm.as_fd(), console.as_fd(), file.as_fd(), root.as_fd(), listener.as_fd()])?;
        Ok(vm)
    }

    fn listen(&self) -> Result<UnixListener> {
        Ok(UnixListener::bind(self.vsock_path())?)
    }

    /// The Unix socket that leads to the guest's vsock.
    pub fn vsock_path(&self) -> PathBuf {
        self.directory.path().join("vsock")
    }

    /// Sends a request and waits for its reply. Events that come first are kept.
    pub fn request(&mut self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<Reply> {
        let id = self.next_id;
        self.next_id += 1;
        self.control.send(&FromOwner { id, request }, fds)?;
        loop {
            match self.receive()? {
                FromVmm::Event(event) => self.events.push(event),
                FromVmm::Reply { id: answered, reply } if answered == id => return Ok(reply?),
                FromVmm::Reply { id: other, .. } => {
                    return Err(format!("reply to {other}, not to {id}").into());
                }
            }
        }
    }

    /// The next event.
    pub fn event(&mut self) -> Result<Event> {
        if !self.events.is_empty() {
            return Ok(self.events.remove(0));
        }
        match self.receive()? {
            FromVmm::Event(event) => Ok(event),
            other @ FromVmm::Reply { .. } => Err(format!("expected an event, got {other:?}").into()),
        }
    }

    fn receive(&self) -> Result<FromVmm> {
        let reason = match self.control.receive() {
            Ok((message, _)) => return Ok(message),
            Err(SocketError::Closed) => "the VMM is gone",
            Err(SocketError::Io(Errno::EAGAIN)) => SILENT,
            Err(error) => return Err(error.into()),
        };
        Err(format!("{reason}; console:\n{}", self.console()?).into())
    }

    /// Waits until the agent says that it is ready.
    ///
    /// # Errors
    /// With the console, when something else happens.
    pub fn wait_ready(&mut self) -> Result {
        match self.event()? {
            Event::Status(status::READY) => Ok(()),
            other => Err(format!("{other:?} instead of ready; console:\n{}", self.console()?).into()),
        }
    }

    /// Waits for the machine's end.
    pub fn wait_exit(&mut self) -> Result<Exit> {
        loop {
            if let Event::Exited(exit) = self.event()? {
                return Ok(exit);
            }
        }
    }

    /// What the guest has printed.
    pub fn console(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&console_ring::read(&self.console)?).into_owned())
    }

    /// When the machine came to run.
    pub fn running(&self) -> Reply {
        self.running.expect("a machine that was booted")
    }

    /// Fills a slot with a disk.
    pub fn plug(&mut self, slot: u8, disk: &Disk) -> Result {
        let fds: Vec<BorrowedFd<'_>> = disk.files.iter().map(AsFd::as_fd).collect();
        let block = Block {
            files: (0..).map(Fd).take(fds.len()).collect(),
            layout: disk.layout,
            read_only: disk.read_only,
            serial: "plugged".to_owned(),
        };
        self.request(Request::Plug { slot, device: Device::Block(block) }, &fds).map(drop)
    }

    /// Calls the agent over a connection of its own.
    ///
    /// # Errors
    /// When the agent cannot be reached, or those of the calls.
    pub fn agent<T>(&self, calls: impl AsyncFnOnce(&Agent) -> Result<T>) -> Result<T> {
        block_on(async { calls(&Agent::connect(&self.vsock_path()).await?).await })
    }

    /// Closes the control socket and lets go of the process.
    pub fn abandon(self) -> Child {
        let Self { mut child, .. } = self;
        child.0.take().expect("it is taken only here")
    }

    /// The VMM's process.
    pub fn pid(&self) -> u32 {
        self.child.0.as_ref().map_or(0, Child::id)
    }
}

/// Runs asynchronous calls to their end.
pub fn block_on<T>(calls: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(calls)
}

/// A process that does not outlive its handle.
struct Process(Option<Child>);

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn devices(root: Fd, vsock: Fd) -> Vec<(u8, Device)> {
    let root =
        Block { files: vec![root], layout: BlockLayout::Whole, read_only: true, serial: "guest".to_owned() };
    vec![
        (SLOT_ROOT, Device::Block(root)),
        (SLOT_VSOCK, Device::Vsock { listener: vsock, cid: 3 }),
        (SLOT_RNG, Device::Rng),
        (SLOT_CONSOLE, Device::Console),
        (SLOT_BALLOON, Device::Balloon),
    ]
}

pub fn kvm() -> Result<File> {
    Ok(OpenOptions::new().read(true).write(true).open("/dev/kvm")?)
}

/// A file of `/proc/PID` of a process.
pub fn proc_file(pid: u32, name: &str) -> Result<String> {
    Ok(std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join(name))?)
}
