//! A machine from its first process to its last.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_protocol::status;
use bulkhead_vmm::control::message::{BlockLayout, Boot, Device, Event, Host, Reply, Request};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::agent::{Agent, AgentError};
use crate::artifacts::{Artifacts, ArtifactsError};
use crate::cmdline::{STATUS_PORT, Verbosity, cmdline};
use crate::console::Console;
use crate::control::{Control, ControlError};
use crate::disk::{Descriptors, Disk};
use crate::end::{End, Evidence};
use crate::slots;
use crate::timing::{BootTimes, Stamp};
use crate::vmm::{Jail, VmmError, VmmProcess};

/// How long a guest may take until its agent is ready.
const BOOT_TIMEOUT: Duration = Duration::from_secs(90);
/// How long a VMM that has closed its control socket may take to be gone. That it ends is certain by then, and told after this; how it
/// ended only if the host has torn the machine down in time.
pub const DEATH_TIMEOUT: Duration = Duration::from_secs(1);
/// Lines of the console that go with a failure.
const CONSOLE_LINES: usize = 20;
/// The guest's context id. Each VMM has a device of its own, so all guests may have the same.
const GUEST_CID: u32 = 3;

/// What a machine is made from.
#[derive(Debug)]
pub struct SandboxConfig<'a> {
    /// VMM, kernel and guest image.
    pub artifacts: &'a Artifacts,
    /// KVM's device.
    pub kvm: &'a Path,
    /// Memory of the machine, in MiB.
    pub memory_mib: u32,
    /// CPUs that the guest may get. It starts with one; [`Sandbox::add_cpus`] brings the others.
    pub cpus: u8,
    /// How the VMM is locked up.
    pub jail: Jail<'a>,
    /// Where the socket for connections to the guest is made. Nobody else may have access to its directory.
    pub socket: &'a Path,
    /// Disks besides the guest's image, each with its slot.
    pub disks: &'a [(u8, Disk)],
    /// The socket to a file server, if the guest shares files of the host.
    pub shares: Option<&'a OwnedFd>,
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// KVM cannot be used.
    #[error("cannot open {0}; `bulkhead check` says what to do")]
    Kvm(PathBuf, #[source] io::Error),
    /// The kernel or the guest image cannot be used.
    #[error(transparent)]
    Artifacts(#[from] ArtifactsError),
    /// No console memory.
    #[error("cannot make the memory for the guest's console")]
    Console(#[source] io::Error),
    /// No socket.
    #[error("cannot make the socket {0} for connections to the guest")]
    Listen(PathBuf, #[source] io::Error),
    /// The VMM does not start.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The control socket cannot be watched.
    #[error("cannot watch the VMM's control socket")]
    Watch(#[source] io::Error),
    /// The VMM cannot make the machine.
    #[error("the virtual machine cannot be made; `bulkhead check` says whether this host can run one")]
    Refused(#[source] ControlError),
    /// The machine ended before its agent was ready.
    #[error("the virtual machine did not start: {end}{}", console_text(.console))]
    Boot {
        /// How it ended.
        end: End,
        /// The last lines of its console.
        console: Vec<String>,
    },
    /// The agent never got ready.
    #[error("the virtual machine did not start within {BOOT_TIMEOUT:?}{}", console_text(.0))]
    NotReady(Vec<String>),
}

/// The lines of a console as they go below a message.
pub fn console_text(lines: &[String]) -> String {
    if lines.is_empty() {
        return "; its console is empty".into();
    }
    format!("; the end of its console:\n    {}", lines.join("\n    "))
}

/// A machine whose agent is ready. Dropped, it is gone.
#[derive(Debug)]
pub struct Sandbox {
    control: Control,
    console: Console,
    socket: PathBuf,
    vmm_pid: u32,
    times: BootTimes,
    end: watch::Receiver<Option<End>>,
    watcher: JoinHandle<()>,
}

impl Sandbox {
    /// Boots a machine and waits until its agent is ready. A guest that ends without a word is booted a second time, with the
    /// kernel told to speak early, so that the error can say what went wrong.
    ///
    /// # Errors
    /// [`SandboxError`]; of a machine that did not start nothing is left.
    pub async fn boot(config: &SandboxConfig<'_>) -> Result<Self, SandboxError> {
        match Self::boot_once(config, Verbosity::Quiet).await {
            Err(SandboxError::Boot { end, console }) if console.is_empty() && guest_failed(&end) => {
                tracing::warn!(%end, "the guest ended without a word: once more with earlyprintk");
            }
            Err(SandboxError::NotReady(console)) if console.is_empty() => {
                tracing::warn!("the guest did nothing: once more with earlyprintk");
            }
            other => return other,
        }
        Self::boot_once(config, Verbosity::Early).await
    }

    async fn boot_once(config: &SandboxConfig<'_>, verbosity: Verbosity) -> Result<Self, SandboxError> {
        let kvm = OpenOptions::new().read(true).write(true).open(config.kvm);
        let kvm = kvm.map_err(|e| SandboxError::Kvm(config.kvm.to_owned(), e))?;
        let kernel = config.artifacts.open_kernel()?;
        let guest_image = Disk {
            files: vec![config.artifacts.open_guest_image()?],
            layout: BlockLayout::Whole,
            read_only: true,
        };
        let console = Console::new().map_err(SandboxError::Console)?;
        let listener =
            listen(config.socket).map_err(|e| SandboxError::Listen(config.socket.to_owned(), e))?;

        let spawn = Stamp::now();
        let (mut process, socket) = VmmProcess::spawn(&config.artifacts.vmm, &config.jail)?;
        let vmm_pid = process.pid();
        let (control, mut events) = Control::new(socket).map_err(SandboxError::Watch)?;
        let mut evidence = Evidence::default();

        let mut descriptors = Descriptors::default();
        let mut devices = vec![
            (slots::GUEST_IMAGE, descriptors.add_disk(&guest_image)),
            (slots::VSOCK, descriptors.add_vsock(&listener, GUEST_CID)),
            (slots::RNG, Device::Rng),
            (slots::CONSOLE, Device::Console),
            (slots::BALLOON, Device::Balloon),
        ];
        devices.extend(config.shares.map(|server| (slots::FS, descriptors.add_shares(server))));
        devices.extend(config.disks.iter().map(|(slot, disk)| (*slot, descriptors.add_disk(disk))));
        let boot = Boot {
            host: Host {
                kvm: descriptors.add(&kvm),
                console: descriptors.add(console.file()),
                status_port: STATUS_PORT,
            },
            memory_mib: config.memory_mib,
            vcpus: 1,
            vcpus_max: config.cpus,
            kernel: descriptors.add(&kernel),
            cmdline: cmdline(verbosity),
            devices,
            serial: verbosity == Verbosity::Early,
        };
        let reply = control.request(Request::Boot(boot), descriptors.as_slice()).await;
        // A VMM that has ended is asked no more, but judged by its end.
        if let Err(error @ (ControlError::Refused { .. } | ControlError::Protocol(_))) = reply {
            return Err(SandboxError::Refused(error));
        }
        if let Err(ControlError::Timeout(..)) = reply {
            return Err(SandboxError::NotReady(console.tail(CONSOLE_LINES)));
        }
        match timeout(BOOT_TIMEOUT, until_ready(&mut events, &mut evidence)).await {
            Ok(true) => {}
            Ok(false) => {
                let end = conclude(evidence, &mut process).await;
                return Err(SandboxError::Boot { end, console: console.tail(CONSOLE_LINES) });
            }
            Err(_) => return Err(SandboxError::NotReady(console.tail(CONSOLE_LINES))),
        }
        let Reply::Running { started_ns, configured_ns, entered_ns } =
            reply.map_err(SandboxError::Refused)?
        else {
            let error = ControlError::Protocol("its answer to boot is not that the machine runs");
            return Err(SandboxError::Refused(error));
        };
        let times = BootTimes {
            spawn,
            vmm_started: Stamp(started_ns),
            configured: Stamp(configured_ns),
            entered: Stamp(entered_ns),
            ready: Stamp::now(),
        };
        let (sender, end) = watch::channel(None);
        let watcher = tokio::spawn(async move {
            while until_event(&mut events, &mut evidence).await {}
            sender.send_replace(Some(conclude(evidence, &mut process).await));
        });
        Ok(Self { control, console, socket: config.socket.to_owned(), vmm_pid, times, end, watcher })
    }

    /// Connects to the agent.
    ///
    /// # Errors
    /// [`AgentError`] when it cannot be reached or is of another build.
    pub async fn agent(&self) -> Result<Agent, AgentError> {
        Agent::connect(&self.socket).await
    }

    /// Gives the guest CPUs until it has `count`.
    ///
    /// # Errors
    /// When the VMM cannot make them or the agent cannot bring them online.
    pub async fn add_cpus(&self, agent: &Agent, count: u8) -> Result<(), GrowError> {
        self.control.request(Request::AddVcpus { count }, &[]).await?;
        Ok(agent.online_cpus(count.into()).await?)
    }

    /// Plugs a disk into an empty slot and has the guest take it.
    ///
    /// # Errors
    /// When the VMM or the agent refuses.
    pub async fn plug(&self, agent: &Agent, slot: u8, disk: &Disk) -> Result<(), GrowError> {
        let mut descriptors = Descriptors::default();
        let device = descriptors.add_disk(disk);
        self.control.request(Request::Plug { slot, device }, descriptors.as_slice()).await?;
        Ok(agent.bind_slot(slot).await?)
    }

    /// Plugs the fs device, by way of which the guest reaches a file server, into an empty slot and has the guest take it.
    ///
    /// # Errors
    /// When the VMM or the agent refuses.
    pub async fn plug_shares(&self, agent: &Agent, slot: u8, server: &OwnedFd) -> Result<(), GrowError> {
        let mut descriptors = Descriptors::default();
        let device = descriptors.add_shares(server);
        self.control.request(Request::Plug { slot, device }, descriptors.as_slice()).await?;
        Ok(agent.bind_slot(slot).await?)
    }

    /// Has the guest let go of a slot and empties it.
    ///
    /// # Errors
    /// When the VMM or the agent refuses, the latter also while the disk is mounted.
    pub async fn unplug(&self, agent: &Agent, slot: u8) -> Result<(), GrowError> {
        agent.unbind_slot(slot).await?;
        Ok(self.control.request(Request::Unplug { slot }, &[]).await.map(drop)?)
    }

    /// Waits for the machine's end.
    pub async fn ended(&self) -> End {
        let mut end = self.end.clone();
        match end.wait_for(Option::is_some).await {
            Ok(end) => end.clone().expect("waited for"),
            Err(_) => End::VmmEnded { code: None, message: String::new() },
        }
    }

    /// Ends the machine without waiting for it to be torn down.
    pub fn stop(&self) {
        self.control.stop();
    }

    /// The last lines of the guest's console, fit for a terminal.
    pub fn console_tail(&self) -> Vec<String> {
        self.console.tail(CONSOLE_LINES)
    }

    /// Where connections to the guest are made.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The VMM's process id.
    pub fn vmm_pid(&self) -> u32 {
        self.vmm_pid
    }

    /// When the machine passed the stations of its boot.
    pub fn times(&self) -> BootTimes {
        self.times
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // The VMM belongs to the watcher and is killed with it.
        self.watcher.abort();
    }
}

/// Why a running machine was not changed.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// The VMM's part failed.
    #[error(transparent)]
    Vmm(#[from] ControlError),
    /// The agent's part failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

/// True for an end whose reason the guest could have told.
fn guest_failed(end: &End) -> bool {
    matches!(end, End::Panic | End::TripleFault | End::AgentFailed | End::Kvm(_) | End::Stopped)
}

/// A listening socket at a path where an older one may be.
fn listen(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        Ok(()) | Err(_) => UnixListener::bind(path),
    }
}

/// Waits until the agent is ready; false when the machine has ended instead.
async fn until_ready(events: &mut mpsc::Receiver<Event>, evidence: &mut Evidence) -> bool {
    while until_event(events, evidence).await {
        if evidence.last_status == Some(status::READY) {
            return true;
        }
    }
    false
}

/// Takes one event into the evidence; false when there will be no other.
async fn until_event(events: &mut mpsc::Receiver<Event>, evidence: &mut Evidence) -> bool {
    match events.recv().await {
        Some(Event::Status(byte)) => evidence.last_status = Some(byte),
        Some(Event::Exited(exit)) => evidence.exit = Some(exit),
        None => return false,
    }
    evidence.exit.is_none()
}

async fn conclude(evidence: Evidence, process: &mut VmmProcess) -> End {
    let post_mortem = match evidence.exit {
        None => process.post_mortem(DEATH_TIMEOUT).await,
        Some(_) => (None, String::new()),
    };
    evidence.conclude(post_mortem)
}
