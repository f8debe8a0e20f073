//! A machine with the containers of a pod, or with a single one: from what containerd hands over to containers that can be started.
//!
//! Nothing here holds a lock while it waits for the guest. Dropped, the machine and its file server are gone; so is what was half made
//! when a future of this module is dropped before it is done.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::geteuid;
use tokio::runtime::Handle;
use tokio::sync::OnceCell;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use ttrpc::Code;

use crate::agent::{Agent, AgentError};
use crate::artifacts::Artifacts;
use crate::binds::SharedBinds;
use crate::cgroup::{CgroupError, SandboxCgroup};
use crate::config::{Annotations, Config};
use crate::container::{Holdings, NewContainer, Plan, Prepared};
use crate::control::ControlError;
use crate::end::End;
use crate::file_server::{FileServer, FileServerError};
use crate::handover::HandoverError;
use crate::oci::Network;
use crate::paths::{PathError, Paths};
use crate::process::Place;
use crate::sandbox::{DEATH_TIMEOUT, GrowError, Sandbox, SandboxConfig, SandboxError, console_text};
use crate::size::Size;
use crate::sizing::{MachineSize, SizeError, late_annotations};
use crate::slots::{self, Slots};
use crate::storage::StorageError;
use crate::timing::{BootTimes, Stamp};
use crate::uid::{UidError, UidLease};
use crate::vmm::Jail;

/// Name of the socket for connections to the guest, in the directory that is given for it.
pub const SOCKET_FILE: &str = "vsock";
/// How long the processes of a machine that was not made may take to be gone.
const GONE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a container waits for the removal of one of the same name, and how often it looks.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(10);
const REMOVAL_PAUSE: Duration = Duration::from_millis(20);
/// How long a machine whose agent is gone may take to be known as ended: longer than its VMM may take to be, so that its end is
/// told, and not only that the agent is gone.
const END_TIMEOUT: Duration = DEATH_TIMEOUT.saturating_add(Duration::from_secs(5));

/// What a machine is made from.
#[derive(Debug)]
pub struct PodConfig<'a> {
    /// The configuration of this host.
    pub config: &'a Config,
    /// VMM, file server, kernel and guest image.
    pub artifacts: &'a Artifacts,
    /// Where this host keeps what is Bulkhead's.
    pub paths: &'a Paths,
    /// A directory to which nobody else has access: [`SOCKET_FILE`] is made there.
    pub directory: &'a Path,
    /// How large it is.
    pub size: MachineSize,
    /// The network namespace of its VMM.
    pub network: Network,
    /// The host's cgroup that it is to be in, which has been made.
    pub cgroup: Option<SandboxCgroup>,
}

/// Why there is no pod or no container.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// What is asked for cannot be had.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// Its annotations cannot be followed.
    #[error(transparent)]
    Annotations(#[from] SizeError),
    /// The disks cannot be had.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The files cannot be served.
    #[error(transparent)]
    FileServer(#[from] FileServerError),
    /// No place for sockets.
    #[error(transparent)]
    Path(#[from] PathError),
    /// No uid for the VMM.
    #[error(transparent)]
    Uid(#[from] UidError),
    /// No cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The cgroup cannot be entered.
    #[error("cannot open the sandbox's cgroup")]
    Entrance(#[source] io::Error),
    /// The network namespace cannot be opened.
    #[error("cannot open the network namespace {0}")]
    Network(PathBuf, #[source] io::Error),
    /// The machine does not start.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The machine has ended.
    #[error("{end}{}", console_text(.console))]
    Ended {
        /// How.
        end: End,
        /// The last lines of its console.
        console: Vec<String>,
    },
    /// One of the same name was deleted before the guest had let go of it.
    #[error("the guest is still removing the container {0} of before: try again later, or use another id")]
    StillThere(String),
    /// The machine does not take a device.
    #[error(transparent)]
    Grow(#[from] GrowError),
    /// The agent refuses, or cannot be reached.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// A configuration that cannot be written.
    #[error("cannot encode the container's configuration")]
    Encode(#[from] serde_json::Error),
    /// What prepares the container has panicked.
    #[error("cannot prepare the container's root")]
    Prepare(#[from] tokio::task::JoinError),
}

/// Whose doing an error is, in the terms of gRPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// What was asked for can never be had.
    InvalidArgument,
    /// The program does not exist.
    NotFound,
    /// The program cannot be executed.
    PermissionDenied,
    /// Not in this state.
    FailedPrecondition,
    /// The id is taken.
    AlreadyExists,
    /// There are as many as there may be.
    ResourceExhausted,
    /// The guest did not answer in time.
    DeadlineExceeded,
    /// The machine is gone.
    Unavailable,
    /// Anything else.
    Internal,
}

impl AgentError {
    /// Whose doing it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Timeout(_) => ErrorKind::DeadlineExceeded,
            Self::Connect(_) | Self::Lost(_) => ErrorKind::Unavailable,
            Self::Refused { code, .. } => match code {
                Code::INVALID_ARGUMENT => ErrorKind::InvalidArgument,
                Code::NOT_FOUND => ErrorKind::NotFound,
                Code::PERMISSION_DENIED => ErrorKind::PermissionDenied,
                Code::FAILED_PRECONDITION => ErrorKind::FailedPrecondition,
                Code::ALREADY_EXISTS => ErrorKind::AlreadyExists,
                Code::RESOURCE_EXHAUSTED => ErrorKind::ResourceExhausted,
                Code::DEADLINE_EXCEEDED => ErrorKind::DeadlineExceeded,
                _ => ErrorKind::Internal,
            },
            Self::Random(_) | Self::Version(_) => ErrorKind::Internal,
        }
    }
}

impl PodError {
    /// Whose doing it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Handover(HandoverError::Share(_)) | Self::Network(..) => ErrorKind::NotFound,
            Self::Handover(_)
            | Self::Annotations(_)
            | Self::Cgroup(CgroupError::Path(_))
            | Self::Storage(StorageError::Layers(_) | StorageError::Format(_)) => ErrorKind::InvalidArgument,
            Self::Storage(StorageError::Slot(_)) => ErrorKind::ResourceExhausted,
            Self::StillThere(_) => ErrorKind::FailedPrecondition,
            Self::Agent(error) | Self::Grow(GrowError::Agent(error)) => error.kind(),
            Self::Grow(GrowError::Vmm(ControlError::Timeout(..)))
            | Self::Sandbox(SandboxError::NotReady(_))
            | Self::FileServer(FileServerError::Timeout) => ErrorKind::DeadlineExceeded,
            Self::Grow(GrowError::Vmm(_)) | Self::Ended { .. } => ErrorKind::Unavailable,
            _ => ErrorKind::Internal,
        }
    }
}

/// The cgroup of a machine that is not there yet. Dropped, as when the making of the machine is given up, it is removed.
struct Unused(Option<SandboxCgroup>);

impl Unused {
    /// Removes it. It is empty when the VMM, which has been killed, is gone.
    async fn remove(&mut self) {
        if let Some(cgroup) = self.0.take() {
            let _ = tokio::task::spawn_blocking(move || cgroup.remove(GONE_TIMEOUT)).await;
        }
    }
}

impl Drop for Unused {
    fn drop(&mut self) {
        if let (Some(cgroup), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            runtime.spawn_blocking(move || cgroup.remove(GONE_TIMEOUT));
        }
    }
}

/// A machine for the containers of one pod.
#[derive(Debug)]
pub struct Pod {
    sandbox: Sandbox,
    agent: Agent,
    size: MachineSize,
    /// What its containers may ask for themselves.
    annotations: Annotations,
    /// How much a container whose root is layers can write.
    storage: Size,
    /// Starts with the first share.
    file_server: OnceCell<FileServer>,
    /// The device of a file server may be in its slot.
    shares_plugged: AtomicBool,
    file_server_program: PathBuf,
    empty: PathBuf,
    cgroup: Option<SandboxCgroup>,
    slots: Mutex<Slots>,
    shared: Mutex<SharedBinds>,
    containers: Mutex<HashMap<String, Holdings>>,
    cpus: Mutex<Option<JoinHandle<Result<(), GrowError>>>>,
    connected: Stamp,
    _uid: Option<UidLease>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pod {
    /// Boots a machine and makes its first container in it, up to the point where it can be started. Call this from a thread that lives as
    /// long as the machine.
    ///
    /// # Errors
    /// [`PodError`]; nothing is left of what was made, nor of the cgroup.
    pub async fn start(config: PodConfig<'_>, first: NewContainer<'_>) -> Result<Arc<Self>, PodError> {
        let mut unused = Unused(config.cgroup.clone());
        let started = Self::start_in(&config, first).await;
        match &started {
            Ok(_) => unused.0 = None,
            Err(_) => unused.remove().await,
        }
        started
    }

    async fn start_in(config: &PodConfig<'_>, first: NewContainer<'_>) -> Result<Arc<Self>, PodError> {
        let (size, cgroup) = (config.size, &config.cgroup);
        let (mut slots, mut shared) = (Slots::default(), SharedBinds::default());
        let storage = config.config.defaults.storage;
        let plan = Plan::new(Prepared::make(first, size, storage).await?, &mut slots, &mut shared, size)?;

        let empty = config.paths.empty()?;
        let entrance =
            cgroup.as_ref().map(SandboxCgroup::entrance).transpose().map_err(PodError::Entrance)?;
        let uid = if geteuid().is_root() {
            Some(UidLease::take(config.config.uids, &config.paths.uid_locks())?)
        } else {
            None
        };
        let network = match &config.network {
            Network::Owners => Place::Owners,
            Network::New => Place::New,
            Network::Path(path) => {
                Place::Namespace(File::open(path).map_err(|e| PodError::Network(path.clone(), e))?)
            }
        };
        let network = if geteuid().is_root() { network } else { Place::Owners };
        let socket = config.directory.join(SOCKET_FILE);
        let file_server = if plan.shares.is_empty() {
            None
        } else {
            Some(FileServer::spawn(&config.artifacts.file_server, &empty, entrance.as_ref())?)
        };
        let sandbox_config = SandboxConfig {
            artifacts: config.artifacts,
            kvm: &config.config.paths.kvm,
            memory_mib: size.memory_mib,
            cpus: size.cpus,
            jail: Jail { uid: uid.as_ref(), root: &empty, network, cgroup: entrance.as_ref() },
            socket: &socket,
            disks: &plan.disks,
            shares: file_server.as_ref().map(|(_, requests)| requests),
        };
        let serve = async {
            match &file_server {
                Some((server, _)) => plan.serve(server).await,
                None => Ok(()),
            }
        };
        let (sandbox, served) = tokio::join!(Sandbox::boot(&sandbox_config), serve);
        let sandbox = sandbox?;
        served?;
        let agent = match sandbox.agent().await {
            Ok(agent) => agent,
            Err(error) => return Err(explain(&sandbox, error).await),
        };
        let pod = Arc::new(Self {
            sandbox,
            agent,
            connected: Stamp::now(),
            size,
            annotations: config.config.annotations.clone(),
            storage,
            file_server: OnceCell::new_with(file_server.map(|(server, _)| server)),
            shares_plugged: AtomicBool::new(false),
            file_server_program: config.artifacts.file_server.clone(),
            empty,
            cgroup: cgroup.clone(),
            slots: Mutex::new(slots),
            shared: Mutex::new(shared),
            containers: Mutex::default(),
            cpus: Mutex::default(),
            _uid: uid,
        });
        let mut holdings = plan.holdings();
        holdings.plug_all();
        locked(&pod.containers).insert(plan.request.container_id.clone(), holdings);
        if let Err(error) = pod.agent.create_container(&plan.request).await {
            return Err(pod.explain(error).await);
        }
        pod.protect(&plan).await?;
        pod.bring_cpus();
        Ok(pod)
    }

    /// Makes another container, up to the point where it can be started.
    ///
    /// # Errors
    /// [`PodError`]; nothing is left of what was made.
    pub async fn create(&self, container: NewContainer<'_>) -> Result<(), PodError> {
        for name in late_annotations(&container.spec, &self.annotations, self.size)? {
            let size = self.size;
            tracing::warn!(
                "the annotation {name} of container {} has no effect: its virtual machine has {} MiB and {} CPUs \
                 since the pod's first container; set it there",
                container.id,
                size.memory_mib,
                size.cpus
            );
        }
        self.vacated(container.id).await?;
        let prepared = Prepared::make(container, self.size, self.storage).await?;
        let plan = Plan::new(prepared, &mut locked(&self.slots), &mut locked(&self.shared), self.size)?;
        let id = &plan.request.container_id;
        // From here on what it holds is known, so that it can be given back whatever happens.
        locked(&self.containers).insert(id.clone(), plan.holdings());
        let made = self.make(&plan).await;
        if made.is_err() {
            self.release(id).await;
        }
        made
    }

    /// Waits until what a deleted container of this name held has been given back, which the guest may yet have to let go of.
    async fn vacated(&self, id: &str) -> Result<(), PodError> {
        let until = Instant::now() + REMOVAL_TIMEOUT;
        while locked(&self.containers).contains_key(id) {
            if Instant::now() > until {
                return Err(PodError::StillThere(id.to_owned()));
            }
            sleep(REMOVAL_PAUSE).await;
        }
        Ok(())
    }

    async fn make(&self, plan: &Plan) -> Result<(), PodError> {
        if !plan.shares.is_empty() {
            plan.serve(self.file_server().await?).await?;
        }
        for (slot, disk) in &plan.disks {
            if let Some(holdings) = locked(&self.containers).get_mut(&plan.request.container_id) {
                holdings.plug(*slot);
            }
            self.sandbox.plug(&self.agent, *slot, disk).await?;
        }
        self.agent.create_container(&plan.request).await?;
        let protected = self.protect(plan).await;
        if protected.is_err() {
            let _ = self.agent.remove_container(&plan.request.container_id).await;
        }
        protected
    }

    /// From here on nothing of the guest's may change a root that its container may not: mount points have been made in it.
    async fn protect(&self, plan: &Plan) -> Result<(), PodError> {
        match (&plan.protected, self.file_server.get()) {
            (Some(name), Some(server)) => Ok(server.protect(name).await?),
            _ => Ok(()),
        }
    }

    /// The file server, started and plugged with the first share that a container of this pod has.
    async fn file_server(&self) -> Result<&FileServer, PodError> {
        let start = async {
            if self.shares_plugged.swap(true, Ordering::Relaxed) {
                // An attempt before this one was given up, and its server is gone: its device may be there.
                let _ = self.sandbox.unplug(&self.agent, slots::FS).await;
            }
            let entrance = self.cgroup.as_ref().map(SandboxCgroup::entrance).transpose();
            let entrance = entrance.map_err(PodError::Entrance)?;
            let (server, requests) =
                FileServer::spawn(&self.file_server_program, &self.empty, entrance.as_ref())?;
            self.sandbox.plug_shares(&self.agent, slots::FS, &requests).await?;
            Ok::<_, PodError>(server)
        };
        self.file_server.get_or_try_init(|| start).await
    }

    /// Gives the machine its CPUs, which must not go on while a container is created: that is one thing after another, whose every change
    /// to the kernel's page tables would have to wait for the other CPUs.
    fn bring_cpus(self: &Arc<Self>) {
        if self.size.cpus < 2 {
            return;
        }
        let pod = Arc::downgrade(self);
        *locked(&self.cpus) = Some(tokio::spawn(async move {
            let Some(pod) = pod.upgrade() else { return Ok(()) };
            pod.sandbox.add_cpus(&pod.agent, pod.size.cpus).await
        }));
    }

    /// Waits until the machine has its CPUs.
    ///
    /// # Errors
    /// Once, when it has fewer. One CPU is enough to run on.
    pub async fn cpus(&self) -> Result<(), GrowError> {
        let cpus = locked(&self.cpus).take();
        match cpus {
            Some(cpus) => cpus.await.unwrap_or(Ok(())),
            None => Ok(()),
        }
    }

    /// Starts a container, which may count its CPUs and so has to wait for them.
    ///
    /// # Errors
    /// [`AgentError`]; its kind tells a program that was not found from one that may not be executed.
    pub async fn start_container(&self, id: &str) -> Result<(), AgentError> {
        if let Err(error) = self.cpus().await {
            tracing::warn!("the virtual machine has fewer CPUs than {}: {error}", self.size.cpus);
        }
        self.agent.start_container(id).await
    }

    /// Why the agent has not done what it was asked for: a machine that has ended explains one that is gone.
    pub async fn explain(&self, error: AgentError) -> PodError {
        explain(&self.sandbox, error).await
    }

    /// Ends a container and gives back what it had. One that is not there is fine.
    ///
    /// # Errors
    /// [`AgentError`] when it cannot be ended; then it can be tried again.
    pub async fn remove(&self, id: &str) -> Result<(), AgentError> {
        match self.agent.remove_container(id).await {
            Err(error) if error.code() != Some(Code::NOT_FOUND) => return Err(error),
            Ok(()) | Err(_) => {}
        }
        self.release(id).await;
        Ok(())
    }

    /// True when the guest must remove a container before the machine ends: what it wrote to a disk of the host may still be in the
    /// guest's memory. Files of the host have what was written to them when the last process has ended, and a root in the guest's memory goes
    /// with it.
    pub fn holds_back(&self, id: &str) -> bool {
        locked(&self.containers).get(id).is_some_and(|holdings| holdings.writes_disk)
    }

    /// Takes back slots and shares. A slot that the guest does not let go of stays taken.
    async fn release(&self, id: &str) {
        let Some(mut holdings) = locked(&self.containers).remove(id) else { return };
        let plugged = holdings.give_back_planned(&mut locked(&self.slots));
        // At once, whatever becomes of the rest: other containers have some of these, too.
        holdings.shares.retain(|share| locked(&self.shared).give_back(share));
        for slot in plugged {
            match self.sandbox.unplug(&self.agent, slot).await {
                Ok(()) => locked(&self.slots).give_back(slot),
                Err(error) => tracing::warn!("cannot unplug slot {slot} of container {id}: {error}"),
            }
        }
        for share in holdings.shares {
            if let Some(server) = self.file_server.get()
                && let Err(error) = server.remove(&share).await
            {
                tracing::warn!("cannot take back the share {share}: {error}");
            }
        }
    }

    /// The agent in the guest.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Where connections to the guest are made.
    pub fn socket(&self) -> &Path {
        self.sandbox.socket()
    }

    /// The VMM's process id.
    pub fn pid(&self) -> u32 {
        self.sandbox.vmm_pid()
    }

    /// The file server's process id, if there is one.
    pub fn file_server_pid(&self) -> Option<u32> {
        self.file_server.get().map(FileServer::pid)
    }

    /// Ends the file server, which ends by itself with the VMM unless it hangs.
    pub fn end_file_server(&self) {
        if let Some(server) = self.file_server.get() {
            server.end();
        }
    }

    /// The machine's size.
    pub fn size(&self) -> MachineSize {
        self.size
    }

    /// The host's cgroup that the machine is in.
    pub fn cgroup(&self) -> Option<&SandboxCgroup> {
        self.cgroup.as_ref()
    }

    /// Waits for the machine's end.
    pub async fn ended(&self) -> End {
        self.sandbox.ended().await
    }

    /// Ends the machine without waiting for it to be torn down.
    pub fn stop(&self) {
        self.sandbox.stop();
    }

    /// The last lines of the guest's console, fit for a terminal.
    pub fn console_tail(&self) -> Vec<String> {
        self.sandbox.console_tail()
    }

    /// When the machine passed the stations of its boot.
    pub fn times(&self) -> BootTimes {
        self.sandbox.times()
    }

    /// When its agent had answered.
    pub fn connected(&self) -> Stamp {
        self.connected
    }
}

async fn explain(sandbox: &Sandbox, error: AgentError) -> PodError {
    if error.kind() != ErrorKind::Unavailable {
        return error.into();
    }
    match timeout(END_TIMEOUT, sandbox.ended()).await {
        Ok(end) => PodError::Ended { end, console: sandbox.console_tail() },
        Err(_) => error.into(),
    }
}
