//! Create: from a bundle to a container that can be started.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bulkhead_protocol::limits::{CREATE_TIMEOUT_S, is_valid_id};
use bulkhead_sandbox::agent::ProcessId;
use bulkhead_sandbox::artifacts::Artifacts;
use bulkhead_sandbox::cgroup::SandboxCgroup;
use bulkhead_sandbox::config::Config;
use bulkhead_sandbox::paths::Paths;
use bulkhead_sandbox::sizing::{Asked, Host, machine_size};
use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use protobuf::MessageField;
use tokio::time::timeout;

use crate::attend;
use crate::errors::TaskError;
use crate::io::{Attached, HostEnds, Owner, Stdio};
use crate::machine::Machine;
use crate::options;
use crate::process::{Exit, KILLED, Process, State};
use crate::shim::{Shim, explain, through};
use crate::task::Task;
use bulkhead_sandbox::container::{NewContainer, RootSource};
use bulkhead_sandbox::handover::RootfsMount;
use bulkhead_sandbox::oci;
use bulkhead_sandbox::pod::{PodConfig, PodError};

/// How long a container may take to be created in a machine that runs.
const CREATE_TIMEOUT: Duration = Duration::from_secs(CREATE_TIMEOUT_S);
/// How long a machine may take to be started with its first container: a guest that does not boot within a minute is booted once
/// more, so that the error can say why.
const MACHINE_TIMEOUT: Duration = Duration::from_mins(3);
/// How long the guest may take to remove what is left of a container whose creation failed.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(3);

impl Shim {
    /// Creates a container. Returns its process id on the host.
    pub(crate) async fn create(self: &Arc<Self>, request: CreateTaskRequest) -> Result<u32, TaskError> {
        if !is_valid_id(&request.id) {
            return Err(TaskError::Invalid(format!("the container id {:?}", request.id)));
        }
        if !request.checkpoint.is_empty() {
            // Not UNIMPLEMENTED: containerd 2 takes that of Create for a shim that speaks an older protocol.
            return Err(TaskError::Invalid(
                "a virtual machine cannot be restored from a checkpoint of a container".into(),
            ));
        }
        let bundle = PathBuf::from(&request.bundle);
        if !bundle.is_absolute() {
            return Err(TaskError::Invalid(format!(
                "the bundle {:?} is not an absolute path",
                request.bundle
            )));
        }
        let stdio = Stdio {
            terminal: request.terminal,
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
        };
        let init = Process::new(ProcessId::init(&request.id), stdio, State::Creating);
        let task = Arc::new(Task::new(request.id.clone(), bundle, init));
        self.add(&task)?;
        through(Arc::clone(self).create_task(task, request)).await
    }

    async fn create_task(
        self: Arc<Self>,
        task: Arc<Task>,
        request: CreateTaskRequest,
    ) -> Result<u32, TaskError> {
        let made = tokio::select! {
            biased;
            () = task.killed() => Err(TaskError::Killed),
            made = self.make(&task, &request) => made,
        };
        match made {
            Ok(machine) => Ok(self.announce(&task, machine, request)),
            Err(error) => {
                self.unmake(&task).await;
                Err(error)
            }
        }
    }

    async fn make(&self, task: &Task, request: &CreateTaskRequest) -> Result<Arc<Machine>, TaskError> {
        let source = options::source(request.options.as_ref())?;
        let spec = oci::read_spec(&task.bundle).map_err(|error| TaskError::Bundle(error.into()))?;
        let process = spec.process().as_ref();
        let program =
            process.and_then(|process| process.args().as_ref()?.first()).cloned().unwrap_or_default();
        task.init.set_program(program.clone());
        if let Some(size) = process.and_then(oci_spec::runtime::Process::console_size) {
            let cells = |count: u64| u16::try_from(count).unwrap_or(u16::MAX);
            task.init.set_size((cells(size.height()), cells(size.width())));
        }
        let owner = Owner { namespace: &self.namespace, id: &task.id };
        let ends = HostEnds::open(&task.init.stdio, owner).await?;
        let config_file = source.file(&self.directory).map_err(|error| TaskError::Config(error.into()))?;
        let rootfs: Vec<RootfsMount> = request
            .rootfs
            .iter()
            .map(|mount| RootfsMount {
                kind: mount.type_.clone(),
                source: mount.source.clone(),
                target: mount.target.clone(),
                options: mount.options.clone(),
            })
            .collect();
        let container = NewContainer {
            id: &task.id,
            spec,
            bundle: &task.bundle,
            root: RootSource::Mounts(&rootfs),
            stdio: task.init.stdio.asked(task.init.size()),
            user: "",
            sandbox: None,
        };
        let machine = Box::pin(self.place(task, &program, container, config_file.as_deref())).await?;
        match Attached::connect(machine.socket(), &task.init.id, ends).await {
            Ok(attached) => task.init.attach(attached),
            Err(error) => return Err(explain(&machine, error.into()).await),
        }
        Ok(machine)
    }

    /// Creates a container in the machine of its pod, which is started with the first one.
    async fn place(
        &self,
        task: &Task,
        program: &str,
        container: NewContainer<'_>,
        config: Option<&Path>,
    ) -> Result<Arc<Machine>, TaskError> {
        if !oci::group(&container.spec, "").is_empty() {
            self.grouped.store(true, Ordering::Relaxed);
        }
        let mut slot = self.machine.lock().await;
        if let Some(machine) = slot.clone().filter(|machine| machine.is_usable()) {
            drop(slot);
            task.set_machine(Arc::clone(&machine));
            let container = NewContainer { sandbox: Some(&machine.first), ..container };
            let created = timeout(CREATE_TIMEOUT, machine.create(container, &self.directory)).await;
            return match created.map_err(|_| TaskError::Deadline("the container is not created"))? {
                Ok(()) => Ok(machine),
                Err(error) => Err(explain(&machine, TaskError::create(program, error)).await),
            };
        }
        if let Some(old) = slot.take() {
            // The cgroup of this one may have the same name. Whoever gives up the creation does not end the removal.
            let _ = tokio::spawn(async move { old.gone().await }).await;
        }
        let machine = timeout(MACHINE_TIMEOUT, self.start_machine(config, container)).await;
        let machine = machine.map_err(|_| TaskError::Deadline("the virtual machine does not start"))?;
        let machine = machine.map_err(|error| match error {
            TaskError::Pod(error) => TaskError::create(program, error),
            other => other,
        })?;
        task.set_machine(Arc::clone(&machine));
        *slot = Some(Arc::clone(&machine));
        Ok(machine)
    }

    async fn start_machine(
        &self,
        config: Option<&Path>,
        first: NewContainer<'_>,
    ) -> Result<Arc<Machine>, TaskError> {
        let config = match config {
            Some(file) => Config::load(file),
            None => Config::from_environment(),
        }
        .map_err(|error| TaskError::Config(error.into()))?;
        let spec = &first.spec;
        let artifacts = Artifacts::locate(&config.paths).map_err(|error| TaskError::Config(error.into()))?;
        let size = machine_size(spec, &config, Asked::default(), Host::examine())
            .map_err(|error| TaskError::Bundle(error.into()))?;
        let network = oci::network(spec).map_err(|error| TaskError::Bundle(error.into()))?;
        let cgroup = oci::cgroups_path(spec)
            .map_or(Ok(None), |path| SandboxCgroup::make(path, size, spec))
            .map_err(PodError::from)?;
        let config = PodConfig {
            config: &config,
            artifacts: &artifacts,
            paths: &Paths::from_environment(),
            directory: &self.directory,
            size,
            network,
            cgroup,
        };
        Ok(Machine::start(config, first).await?)
    }

    /// From here on the container is there. Nothing is waited for, so that nothing comes between.
    fn announce(
        self: &Arc<Self>,
        task: &Arc<Task>,
        machine: Arc<Machine>,
        request: CreateTaskRequest,
    ) -> u32 {
        let pid = machine.pid();
        self.events.publish(&TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: MessageField::some(TaskIO {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
                ..Default::default()
            }),
            pid,
            ..Default::default()
        });
        task.init.advance(State::Creating, State::Created);
        let (shim, task) = (Arc::clone(self), Arc::clone(task));
        tokio::spawn(attend::oom(Arc::clone(&shim), Arc::clone(&task), Arc::clone(&machine)));
        tokio::spawn(attend::init(shim, task, machine));
        pid
    }

    /// Leaves nothing of a container that was not created.
    async fn unmake(&self, task: &Task) {
        task.init.detach();
        // It is being created until nothing is left of it: nobody can delete it meanwhile, and be told of a container that never was.
        if let Ok(machine) = task.machine() {
            if self.is_alone(task) {
                machine.end("its only container was not created").await;
            } else if timeout(REMOVE_TIMEOUT, machine.remove(&task.id, false)).await.is_err() {
                tracing::warn!(id = task.id, "the guest does not remove what is left of a container");
            }
        }
        self.remove(task);
        task.init.stop(Exit::now(KILLED));
        task.release();
    }
}
