//! A host of its own for each test: directories, artifacts, a stand-in for the VMM, and a containerd that only takes events.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{self, DeleteResponse, Empty, ForwardRequest};
use containerd_shim_protos::events::task as events;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::{Client, Events, TaskClient, create_events};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::timeout;
use ttrpc::Code;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::asynchronous::{Server, TtrpcContext};
use ttrpc::context;

#[path = "../../../launcher/examples/fake-vmm/artifacts.rs"]
mod artifacts;

use artifacts::{elf, erofs};

pub const NAMESPACE: &str = "testing";
/// Longer than anything takes; only a failed test waits for it.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// A host.
pub struct Host {
    directory: tempfile::TempDir,
    pub events: Received,
    _containerd: Server,
}

/// The events that have come.
#[derive(Clone)]
pub struct Received(Arc<watch::Sender<Vec<(String, Any)>>>);

#[async_trait]
impl Events for Received {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap();
        assert_eq!(envelope.namespace, NAMESPACE);
        assert!(envelope.timestamp.seconds > 0);
        self.0.send_modify(|all| all.push((envelope.topic, envelope.event.unwrap())));
        Ok(Empty::new())
    }
}

impl Received {
    /// What happened so far, each as `topic id`.
    pub fn told(&self) -> Vec<String> {
        self.0.borrow().iter().map(|(topic, event)| line(topic, event)).collect()
    }

    /// Waits until this has happened.
    pub async fn until(&self, line_of: &str) -> Vec<String> {
        let mut all = self.0.subscribe();
        let told = all.wait_for(|all| all.iter().any(|(topic, event)| line(topic, event) == line_of));
        let came = timeout(PATIENCE, told).await.is_ok();
        assert!(came, "{line_of} never happened, but: {:?}", self.told());
        self.told()
    }
}

/// An event in short: its topic without `/tasks/`, whose it is, and for an exit the status.
fn line(topic: &str, event: &Any) -> String {
    fn read<M: Message>(event: &Any) -> M {
        M::parse_from_bytes(&event.value).unwrap()
    }
    let what = topic.strip_prefix("/tasks/").unwrap();
    let name = event.type_url.strip_prefix("containerd.events.").unwrap();
    let whose = match name {
        "TaskCreate" => read::<events::TaskCreate>(event).container_id,
        "TaskStart" => read::<events::TaskStart>(event).container_id,
        "TaskDelete" => read::<events::TaskDelete>(event).container_id,
        "TaskOOM" => read::<events::TaskOOM>(event).container_id,
        "TaskPaused" => read::<events::TaskPaused>(event).container_id,
        "TaskResumed" => read::<events::TaskResumed>(event).container_id,
        "TaskExecAdded" => read::<events::TaskExecAdded>(event).exec_id,
        "TaskExecStarted" => read::<events::TaskExecStarted>(event).exec_id,
        "TaskExit" => {
            let exit: events::TaskExit = read(event);
            assert!(exit.exited_at.seconds > 0 && exit.pid > 0);
            format!("{} {}", exit.id, exit.exit_status)
        }
        other => panic!("{other}"),
    };
    format!("{what} {whose}")
}

impl Host {
    pub async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        for name in ["libexec", "share", "run", "s", "bundles"] {
            fs::DirBuilder::new().mode(0o700).create(path(name)).unwrap();
        }
        let shim = Path::new(env!("CARGO_BIN_EXE_containerd-shim-bulkhead-v2"));
        let fake = shim.parent().unwrap().join("examples/shim-fake-vmm");
        assert!(fake.exists(), "cargo builds it with `cargo test -p containerd-shim-bulkhead-v2`");
        symlink(fake, path("libexec/bulkhead-vmm")).unwrap();
        fs::write(path("share/vmlinux"), elf()).unwrap();
        fs::write(path("share/guest.erofs"), erofs("")).unwrap();
        fs::write(path("root.erofs"), erofs("")).unwrap();
        fs::write(path("config.toml"), "[paths]\nkvm = \"/dev/null\"\n").unwrap();
        let received = Received(Arc::new(watch::Sender::new(Vec::new())));
        let service = create_events(Arc::new(received.clone()) as Arc<dyn Events + Send + Sync>);
        let address = format!("unix://{}", path("events").display());
        let mut server = Server::new().bind(&address).unwrap().register_service(service);
        server.start().await.unwrap();
        Self { directory, events: received, _containerd: server }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Decides how the next machines boot.
    pub fn boots_like(&self, directive: &str) {
        fs::write(self.path("share/guest.erofs"), erofs(directive)).unwrap();
    }

    /// The shim with containerd's environment and these arguments.
    pub fn shim(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_containerd-shim-bulkhead-v2"));
        command.args(args).stdin(Stdio::null()).env("TTRPC_ADDRESS", self.path("events"));
        for (variable, name) in [
            ("BULKHEAD_RUN", "run"),
            ("BULKHEAD_ROOT", "data"),
            ("BULKHEAD_LIBEXEC", "libexec"),
            ("BULKHEAD_SHARE", "share"),
            ("BULKHEAD_CONFIG", "config.toml"),
            ("BULKHEAD_SHIM_SOCKETS", "s"),
        ] {
            command.env(variable, self.path(name));
        }
        command
    }

    /// Makes a bundle.
    pub fn bundle(&self, id: &str, args: &[&str], env: &[&str], annotations: &serde_json::Value) -> PathBuf {
        let bundle = self.path("bundles").join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        write_spec(&bundle, args, env, annotations);
        fifo_at(&bundle.join("log"));
        bundle
    }

    /// Writes the configuration of a bundle once more, for a container that does nothing.
    pub fn bundle_again(&self, id: &str) {
        write_spec(&self.path("bundles").join(id), &["/bin/true"], &[], &json!({}));
    }

    /// Makes a fifo.
    pub fn fifo(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fifo_at(&path);
        path
    }

    /// `start` as containerd runs it, to its end.
    pub fn start_output(&self, id: &str) -> Output {
        let socket = "/run/containerd/containerd.sock";
        let mut start = self.shim(&[
            "-namespace",
            NAMESPACE,
            "-address",
            socket,
            "-publish-binary",
            "/bin/true",
            "-id",
            id,
            "start",
        ]);
        start.current_dir(self.path("bundles").join(id)).output().unwrap()
    }

    /// A shim that serves a container whose bundle is there.
    pub async fn start(&self, id: &str) -> Shim {
        let output = self.start_output(id);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // containerd would take it for a part of the address.
        assert!(output.stderr.is_empty());
        let address = String::from_utf8(output.stdout).unwrap();
        let bundle = self.path("bundles").join(id);
        assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
        let client = connect(&address).await;
        Shim { id: id.to_owned(), root: self.path("root.erofs"), bundle, address, client }
    }

    /// A shim with a container that has been created.
    pub async fn created(&self, id: &str, args: &[&str], env: &[&str]) -> Shim {
        self.bundle(id, args, env, &json!({}));
        let shim = self.start(id).await;
        shim.create(&shim.request()).await.unwrap();
        shim
    }

    /// A shim with a container that runs.
    pub async fn running(&self, id: &str, args: &[&str]) -> Shim {
        let shim = self.created(id, args, &[]).await;
        shim.start("").await.unwrap();
        shim
    }

    /// `delete` as containerd runs it.
    pub fn delete(&self, id: &str) -> DeleteResponse {
        let bundle = self.path("bundles").join(id);
        let socket = "/run/containerd/containerd.sock";
        let mut delete = self.shim(&["-namespace", NAMESPACE, "-address", socket, "-id", id, "-bundle"]);
        let output = delete.arg(&bundle).arg("delete").current_dir(&bundle).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        DeleteResponse::parse_from_bytes(&output.stdout).unwrap()
    }

    /// What is left of shims.
    pub fn residue(&self) -> Vec<PathBuf> {
        let list = |name: &str| fs::read_dir(self.path(name)).into_iter().flatten();
        list("run/.pods").chain(list("s")).map(|entry| entry.unwrap().path()).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Shims that a failed test has left.
        for id in fs::read_dir(self.path("bundles")).into_iter().flatten().flatten() {
            if let Some(id) = id.file_name().to_str() {
                let bundle = self.path("bundles").join(id);
                let _ = self
                    .shim(&[
                        "-namespace",
                        NAMESPACE,
                        "-address",
                        "/run/containerd/containerd.sock",
                        "-id",
                        id,
                        "delete",
                    ])
                    .current_dir(bundle)
                    .output();
            }
        }
    }
}

pub async fn connect(address: &str) -> TaskClient {
    let path = address.strip_prefix("unix://").unwrap();
    let stream = tokio::net::UnixStream::connect(path).await.unwrap();
    TaskClient::new(Client::new(Socket::from(stream)))
}

/// A shim as containerd sees it, with the container that it was started for.
pub struct Shim {
    pub id: String,
    pub root: PathBuf,
    pub bundle: PathBuf,
    pub address: String,
    pub client: TaskClient,
}

type Answer<T> = Result<T, (Code, String)>;

pub fn answer<T>(answer: ttrpc::Result<T>) -> Answer<T> {
    answer.map_err(|error| match error {
        ttrpc::Error::RpcStatus(status) => (status.code.unwrap(), status.message),
        other => panic!("{other}"),
    })
}

pub fn ctx() -> context::Context {
    context::with_duration(PATIENCE)
}

impl Shim {
    /// How the container would be created.
    pub fn request(&self) -> api::CreateTaskRequest {
        let rootfs = api::Mount {
            type_: "erofs".into(),
            source: self.root.display().to_string(),
            options: vec!["ro".into()],
            ..Default::default()
        };
        api::CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.display().to_string(),
            rootfs: vec![rootfs],
            ..Default::default()
        }
    }

    pub async fn create(&self, request: &api::CreateTaskRequest) -> Answer<u32> {
        answer(self.client.create(ctx(), request).await).map(|created| created.pid)
    }

    pub async fn start(&self, exec_id: &str) -> Answer<u32> {
        let request =
            api::StartRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        answer(self.client.start(ctx(), &request).await).map(|started| started.pid)
    }

    pub async fn state(&self, exec_id: &str) -> Answer<api::StateResponse> {
        let request =
            api::StateRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        answer(self.client.state(ctx(), &request).await)
    }

    pub async fn status(&self, exec_id: &str) -> api::Status {
        self.state(exec_id).await.unwrap().status.unwrap()
    }

    pub async fn wait(&self, exec_id: &str) -> Answer<u32> {
        let request = api::WaitRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        answer(self.client.wait(ctx(), &request).await).map(|ended| {
            assert!(ended.exited_at.seconds > 0);
            ended.exit_status
        })
    }

    pub async fn kill(&self, exec_id: &str, signal: u32) -> Answer<()> {
        let (id, exec_id) = (self.id.clone(), exec_id.into());
        let request = api::KillRequest { id, exec_id, signal, ..Default::default() };
        answer(self.client.kill(ctx(), &request).await).map(drop)
    }

    pub async fn delete(&self, exec_id: &str) -> Answer<u32> {
        let request =
            api::DeleteRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        answer(self.client.delete(ctx(), &request).await).map(|deleted| {
            assert!(deleted.exited_at.seconds > 0);
            deleted.exit_status
        })
    }

    /// How a process would be added.
    pub fn exec_request(&self, exec_id: &str, args: &[&str]) -> api::ExecProcessRequest {
        let process = json!({"user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/"});
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.to_string().into_bytes(),
            ..Default::default()
        };
        api::ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            spec: Some(spec).into(),
            ..Default::default()
        }
    }

    pub async fn exec(&self, request: &api::ExecProcessRequest) -> Answer<()> {
        answer(self.client.exec(ctx(), request).await).map(drop)
    }

    pub async fn pids(&self) -> Vec<u32> {
        let request = api::PidsRequest { id: self.id.clone(), ..Default::default() };
        let pids = self.client.pids(ctx(), &request).await.unwrap();
        pids.processes.iter().map(|process| process.pid).collect()
    }

    pub async fn connected(&self) -> api::ConnectResponse {
        let request = api::ConnectRequest { id: self.id.clone(), ..Default::default() };
        self.client.connect(ctx(), &request).await.unwrap()
    }

    pub async fn shutdown(&self) {
        let request = api::ShutdownRequest { id: self.id.clone(), ..Default::default() };
        answer(self.client.shutdown(ctx(), &request).await).unwrap();
    }

    /// What containerd does with a container that has ended.
    pub async fn finish(self, host: &Host) {
        self.delete("").await.unwrap();
        self.shutdown().await;
        host.delete(&self.id);
        // On a busy machine the shim ends after the patience of `delete`, and leaves nothing itself.
        until("nothing is left", || host.residue().is_empty()).await;
    }

    /// What the shim has logged so far.
    pub fn logged(&self) -> String {
        let mut log =
            File::options().read(true).custom_flags(libc::O_NONBLOCK).open(self.bundle.join("log")).unwrap();
        let mut bytes = Vec::new();
        // It ends with an error when somebody still has the fifo open.
        let _ = log.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// Reads a fifo to its end.
pub fn read(path: &Path) -> impl Future<Output = Vec<u8>> + use<> {
    let path = path.to_owned();
    reading(move || {
        let mut bytes = Vec::new();
        File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    })
}

/// Begins to do what makes a thread wait. A test that fails meanwhile does not wait for it.
pub fn reading<T, W>(work: W) -> impl Future<Output = T> + use<T, W>
where
    T: Send + 'static,
    W: FnOnce() -> T + Send + 'static,
{
    let (done, is_done) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || done.send(work()));
    async { timeout(PATIENCE, is_done).await.unwrap().unwrap() }
}

/// Waits until something is so that there is no event for, in another process's files.
pub async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

/// True while a process runs and has not been killed.
pub fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z") && !rest.starts_with(" X"))
}

pub fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// The beginning of an ext4.
pub fn ext4() -> Vec<u8> {
    let mut image = vec![0; 8192];
    image[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xef]);
    image[1028] = 8;
    image
}

fn fifo_at(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

fn write_spec(bundle: &Path, args: &[&str], env: &[&str], annotations: &serde_json::Value) {
    let spec = json!({
        "ociVersion": "1.2.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": args, "env": env, "cwd": "/"},
        "root": {"path": "rootfs"},
        "annotations": annotations,
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network"}]}
    });
    fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
}
