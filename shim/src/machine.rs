//! The virtual machine of the shim's containers, and its end.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use bulkhead_sandbox::agent::{Agent, Code};
use oci_spec::runtime::Process;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::record;
use bulkhead_sandbox::cgroup::SandboxCgroup;
use bulkhead_sandbox::container::NewContainer;
use bulkhead_sandbox::pod::{Pod, PodConfig, PodError};

/// How long a VMM may take to follow an order to end before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a VMM may take to be torn down by the kernel, which frees the guest's memory.
const GONE_TIMEOUT: Duration = Duration::from_secs(1);

/// The time between two requests to the guest to remove a container.
const REMOVE_PAUSE: Duration = Duration::from_secs(1);
/// For how long it is asked, and the removal of a container waited for whose last writes are on their way to a disk of the host, which may
/// be slow.
pub(crate) const WRITE_TIMEOUT: Duration = Duration::from_mins(3);

/// A machine.
pub(crate) struct Machine {
    pod: Arc<Pod>,
    /// The first container, whose namespaces the others of its pod share.
    pub(crate) first: String,
    vmm: Option<OwnedFd>,
    over: watch::Sender<Option<Arc<str>>>,
    expected: AtomicBool,
    /// The VMM's `oom_score_adj`.
    oom_score: AtomicI32,
}

impl Machine {
    /// Starts a machine with its first container, and writes down its processes, for whoever has to clean up after this shim.
    pub(crate) async fn start(config: PodConfig<'_>, first: NewContainer<'_>) -> Result<Arc<Self>, PodError> {
        let (directory, id, oom_score) = (config.directory, first.id.to_owned(), oom_score(&first));
        let pod = Box::pin(Pod::start(config, first)).await?;
        let pid = pod.pid();
        if let Err(error) = record::write(directory, record::VMM, pid) {
            tracing::warn!(%error, "cannot write down the VMM's process id");
        }
        // The VMM is a child that nobody has reaped.
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let vmm = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let (over, expected) = (watch::Sender::new(None), AtomicBool::new(false));
        let machine = Arc::new(Self { pod, first: id, vmm, over, expected, oom_score: oom_score.into() });
        machine.set_oom_score(oom_score);
        machine.note_file_server(directory);
        tokio::spawn(Arc::clone(&machine).attend());
        Ok(machine)
    }

    /// Creates another container.
    pub(crate) async fn create(&self, container: NewContainer<'_>, directory: &Path) -> Result<(), PodError> {
        let oom_score = oom_score(&container);
        Box::pin(self.pod.create(container)).await?;
        self.note_file_server(directory);
        // Kubernetes protects the first container of a pod, which does nothing, from what the others are killed by.
        if self.oom_score.fetch_max(oom_score, Ordering::Relaxed) < oom_score {
            self.set_oom_score(oom_score);
        }
        Ok(())
    }

    /// What the shim inherits from containerd protects it; a workload is not protected like that.
    fn set_oom_score(&self, score: i32) {
        if let Err(error) = fs::write(format!("/proc/{}/oom_score_adj", self.pid()), score.to_string()) {
            tracing::warn!(%error, "cannot set the VMM's oom_score_adj");
        }
    }

    /// The file server starts with the first share.
    fn note_file_server(&self, directory: &Path) {
        if let Some(pid) = self.pod.file_server_pid()
            && let Err(error) = record::write(directory, record::FILE_SERVER, pid)
        {
            tracing::warn!(%error, "cannot write down the file server's process id");
        }
    }

    /// Waits for the end and tells of it.
    async fn attend(self: Arc<Self>) {
        let end = self.pod.ended().await.to_string();
        if self.expected.load(Ordering::Relaxed) {
            tracing::debug!(%end, "the virtual machine ended");
        } else {
            let console = self.pod.console_tail().join("\n");
            let out_of_memory = self.pod.cgroup().map_or(0, SandboxCgroup::oom_kills);
            tracing::error!(%end, console, out_of_memory, "the virtual machine ended");
        }
        self.over.send_if_modified(|over| over.is_none() && over.replace(end.into()).is_none());
    }

    /// Waits for the machine's end, and says how it came.
    pub(crate) async fn over(&self) -> Arc<str> {
        let mut over = self.over.subscribe();
        match over.wait_for(Option::is_some).await {
            Ok(over) => over.clone().unwrap_or_default(),
            // The sender is our own.
            Err(_) => Arc::default(),
        }
    }

    /// False when the machine has ended, or is about to.
    pub(crate) fn is_usable(&self) -> bool {
        !self.expected.load(Ordering::Relaxed) && self.over.borrow().is_none()
    }

    /// Ends the machine, whatever state it is in. Returns when it is over for everybody.
    pub(crate) async fn end(&self, why: &str) {
        self.expected.store(true, Ordering::Relaxed);
        self.pod.stop();
        if timeout(STOP_TIMEOUT, self.over()).await.is_ok() {
            return;
        }
        if let Some(vmm) = &self.vmm {
            // It fails when the VMM is gone, which is just as well.
            let _ = pidfd_send_signal(vmm, Signal::KILL);
        }
        if timeout(STOP_TIMEOUT, self.over()).await.is_err() {
            // A process in an uninterruptible sleep: nobody waits for it, what runs in it is over.
            self.over.send_if_modified(|over| over.is_none() && over.replace(why.into()).is_none());
        }
    }

    /// Has the guest remove a container, and takes back what it had of the host. That goes on to its end, whoever waits for it and for
    /// however long: what was not taken back would be lost to the other containers of the pod. Of the `last` one, all that it had of the host
    /// goes with the machine.
    pub(crate) fn remove(self: &Arc<Self>, id: &str, last: bool) -> JoinHandle<()> {
        let (machine, id) = (Arc::clone(self), id.to_owned());
        tokio::spawn(async move {
            let until = Instant::now() + WRITE_TIMEOUT;
            loop {
                let removed = if last {
                    machine.agent().remove_container(&id).await
                } else {
                    machine.pod.remove(&id).await
                };
                match removed {
                    Err(error) if error.code() != Some(Code::NOT_FOUND) && machine.is_usable() => {
                        // A removal that takes longer than a call may goes on in the guest, and this is told until it is done.
                        tracing::debug!(id, %error, "the guest has not removed the container yet");
                        if Instant::now() > until {
                            tracing::warn!(id, %error, "the guest cannot remove the container");
                            return;
                        }
                        sleep(REMOVE_PAUSE).await;
                    }
                    // With the machine, everything goes.
                    Ok(()) | Err(_) => return,
                }
            }
        })
    }

    /// Waits, in bounds, until the VMM is gone, and removes its cgroup when the file server, which ends with it or is ended, is
    /// gone as well.
    pub(crate) async fn gone(&self) {
        let vmm = self.vmm.as_ref().and_then(|vmm| vmm.try_clone().ok());
        if let Some(vmm) = vmm.and_then(|vmm| bulkhead_sandbox::watch::watch(vmm, Interest::READABLE).ok()) {
            let _ = timeout(GONE_TIMEOUT, vmm.readable()).await;
        }
        if self.removes_cgroup().await {
            return;
        }
        self.pod.end_file_server();
        if !self.removes_cgroup().await {
            tracing::warn!("the sandbox's cgroup is not empty: it stays");
        }
    }

    /// Removes the cgroup, if there is one and it is empty in time.
    async fn removes_cgroup(&self) -> bool {
        let Some(cgroup) = self.pod.cgroup().cloned() else { return true };
        tokio::task::spawn_blocking(move || cgroup.remove(GONE_TIMEOUT)).await.unwrap_or(false)
    }

    /// Calls to the guest's agent.
    pub(crate) fn agent(&self) -> &Agent {
        self.pod.agent()
    }

    /// The machine as the library has it.
    pub(crate) fn pod(&self) -> &Pod {
        &self.pod
    }

    /// Where streams are connected.
    pub(crate) fn socket(&self) -> &Path {
        self.pod.socket()
    }

    /// The VMM's process id.
    pub(crate) fn pid(&self) -> u32 {
        self.pod.pid()
    }
}

/// The `oom_score_adj` that a container asks for.
fn oom_score(container: &NewContainer<'_>) -> i32 {
    container.spec.process().as_ref().and_then(Process::oom_score_adj).unwrap_or(0)
}
