//! A small client of the agent, as a host would have it.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use bulkhead_protocol::agent::rootfs::Upper;
use bulkhead_protocol::agent::{
    BlockSource, CreateContainerRequest, ExecProcessRequest, PauseContainerRequest, RemoveContainerRequest,
    ResumeContainerRequest, Rootfs, SharedNamespace, SignalProcessRequest, StartContainerRequest,
    StatsContainerRequest, StatsContainerResponse, Stdio, UpdateContainerRequest, WaitProcessRequest,
    WaitProcessResponse, WatchOomRequest,
};
use bulkhead_protocol::agent_ttrpc::AgentClient;
use bulkhead_protocol::limits::{CONTROL_PORT, STREAM_PORT};
use bulkhead_protocol::stream::{Stream, StreamHeader};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_vsock::{VMADDR_CID_LOCAL, VsockAddr, VsockStream};
use ttrpc::Code;
use ttrpc::r#async::Client;
use ttrpc::context::{self, Context};

/// The slots that `guest.sh` fills: two layers, a scratch disk, an image that means harm, and a hundred small layers.
pub(crate) const BASE: u32 = 4;
pub(crate) const TOP: u32 = 5;
pub(crate) const SCRATCH: u32 = 6;
pub(crate) const HOSTILE: u32 = 7;
pub(crate) const MANY: u32 = 8;

pub(crate) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(Duration::from_mins(2), test).await.expect("the test takes two minutes");
    });
}

pub(crate) fn context() -> Context {
    context::with_duration(Duration::from_mins(1))
}

pub(crate) async fn connect() -> AgentClient {
    let client = Client::connect(&format!("vsock://{VMADDR_CID_LOCAL}:{CONTROL_PORT}")).await.unwrap();
    AgentClient::new(client)
}

/// The code of a call that must fail.
pub(crate) fn code<T>(result: ttrpc::Result<T>) -> Code {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => status.code(),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("the call succeeded"),
    }
}

/// The agent's process id: where its `/proc` entry is, for those who look from outside of its namespace.
pub(crate) fn agent_pid() -> String {
    std::env::var("AGENT_PID").expect("guest.sh sets AGENT_PID")
}

pub(crate) fn shell(script: &str) -> Value {
    spec(&["sh", "-c", script])
}

/// A configuration like those that container engines make.
pub(crate) fn spec(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "args": args, "cwd": "/", "env": ["PATH=/bin:/sbin", "TERM=xterm"], "user": {"uid": 0, "gid": 0},
            "capabilities": {}
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]}
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "cgroup"}, {"type": "network"}
            ],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]}
        }
    })
}

pub(crate) fn without_namespace(spec: &mut Value, name: &str) {
    spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != name);
}

pub(crate) fn add_namespace(spec: &mut Value, name: &str) {
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": name}));
}

pub(crate) fn without_mounts(spec: &mut Value, below: &str) {
    let starts = |mount: &Value| mount["destination"].as_str().unwrap().starts_with(below);
    spec["mounts"].as_array_mut().unwrap().retain(|mount| !starts(mount));
}

pub(crate) fn writable_cgroups(spec: &mut Value) {
    let mounts = spec["mounts"].as_array_mut().unwrap();
    let mount = mounts.iter_mut().find(|mount| mount["type"] == "cgroup").unwrap();
    mount["options"].as_array_mut().unwrap().retain(|option| option != "ro");
}

pub(crate) fn all_capabilities() -> Value {
    let all =
        json!(["CAP_MKNOD", "CAP_DAC_OVERRIDE", "CAP_SYS_ADMIN", "CAP_SYS_RAWIO", "CAP_CHOWN", "CAP_FOWNER"]);
    json!({"bounding": all, "effective": all, "permitted": all})
}

/// What is known of a process that has ended.
pub(crate) struct Finished {
    pub(crate) status: u32,
    pub(crate) oom_killed: bool,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) agent: Arc<AgentClient>,
}

impl Container {
    pub(crate) async fn create(id: &str, spec: &Value, stdio: Stdio) -> ttrpc::Result<Self> {
        Self::create_as(id, spec, stdio, "").await
    }

    pub(crate) async fn create_as(id: &str, spec: &Value, stdio: Stdio, user: &str) -> ttrpc::Result<Self> {
        Self::create_with(id, spec, stdio, user, writable(), Vec::new()).await
    }

    /// With namespaces that other containers have.
    pub(crate) async fn create_sharing(
        id: &str,
        spec: &Value,
        stdio: Stdio,
        shared: &[(&str, &str)],
    ) -> ttrpc::Result<Self> {
        let one = |&(kind, container): &(&str, &str)| SharedNamespace {
            type_: kind.into(),
            container_id: container.into(),
            ..SharedNamespace::default()
        };
        Self::create_with(id, spec, stdio, "", writable(), shared.iter().map(one).collect()).await
    }

    pub(crate) async fn create_on(
        id: &str,
        spec: &Value,
        stdio: Stdio,
        rootfs: Rootfs,
    ) -> ttrpc::Result<Self> {
        Self::create_with(id, spec, stdio, "", rootfs, Vec::new()).await
    }

    async fn create_with(
        id: &str,
        spec: &Value,
        stdio: Stdio,
        user: &str,
        rootfs: Rootfs,
        shared_namespaces: Vec<SharedNamespace>,
    ) -> ttrpc::Result<Self> {
        let agent = Arc::new(connect().await);
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: spec.to_string().into_bytes(),
            rootfs: Some(rootfs).into(),
            stdio: Some(stdio).into(),
            user: user.into(),
            shared_namespaces,
            ..CreateContainerRequest::default()
        };
        agent.create_container(context(), &request).await?;
        Ok(Self { id: id.into(), agent })
    }

    pub(crate) fn another(&self) -> Self {
        Self { id: self.id.clone(), agent: Arc::clone(&self.agent) }
    }

    pub(crate) async fn start(&self) -> ttrpc::Result<()> {
        let request = StartContainerRequest { container_id: self.id.clone(), ..Default::default() };
        self.agent.start_container(context(), &request).await.map(drop)
    }

    pub(crate) async fn remove(&self, force: bool) -> ttrpc::Result<()> {
        let request = RemoveContainerRequest { container_id: self.id.clone(), force, ..Default::default() };
        self.agent.remove_container(context(), &request).await.map(drop)
    }

    pub(crate) async fn stats(&self) -> ttrpc::Result<StatsContainerResponse> {
        let request = StatsContainerRequest { container_id: self.id.clone(), ..Default::default() };
        self.agent.stats_container(context(), &request).await
    }

    pub(crate) async fn update(&self, resources: &Value) -> ttrpc::Result<()> {
        let request = UpdateContainerRequest {
            container_id: self.id.clone(),
            resources: resources.to_string().into_bytes(),
            ..Default::default()
        };
        self.agent.update_container(context(), &request).await.map(drop)
    }

    pub(crate) async fn pause(&self) -> ttrpc::Result<()> {
        let request = PauseContainerRequest { container_id: self.id.clone(), ..Default::default() };
        self.agent.pause_container(context(), &request).await.map(drop)
    }

    pub(crate) async fn resume(&self) -> ttrpc::Result<()> {
        let request = ResumeContainerRequest { container_id: self.id.clone(), ..Default::default() };
        self.agent.resume_container(context(), &request).await.map(drop)
    }

    /// Waits for more kills for want of memory than `kills`.
    pub(crate) async fn watch_oom(&self, kills: u64) -> ttrpc::Result<u64> {
        let request = WatchOomRequest { container_id: self.id.clone(), kills, ..Default::default() };
        self.agent.watch_oom(context(), &request).await.map(|answer| answer.kills)
    }

    pub(crate) async fn signal(&self, exec: &str, signal: u32, all: bool) -> ttrpc::Result<()> {
        let request = SignalProcessRequest {
            container_id: self.id.clone(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        self.agent.signal_process(context(), &request).await.map(drop)
    }

    pub(crate) async fn wait(&self, exec: &str) -> WaitProcessResponse {
        let request =
            WaitProcessRequest { container_id: self.id.clone(), exec_id: exec.into(), ..Default::default() };
        self.agent.wait_process(context(), &request).await.unwrap()
    }

    /// Runs a program without capabilities.
    pub(crate) async fn exec(
        &self,
        exec: &str,
        args: &[&str],
        stdio: Stdio,
        user: &str,
    ) -> ttrpc::Result<()> {
        let process = json!({"args": args, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
        self.exec_process(exec, &process, stdio, user).await
    }

    pub(crate) async fn exec_process(
        &self,
        exec: &str,
        process: &Value,
        stdio: Stdio,
        user: &str,
    ) -> ttrpc::Result<()> {
        let request = ExecProcessRequest {
            container_id: self.id.clone(),
            exec_id: exec.into(),
            process: process.to_string().into_bytes(),
            stdio: Some(stdio).into(),
            user: user.into(),
            ..Default::default()
        };
        self.agent.exec_process(context(), &request).await.map(drop)
    }

    pub(crate) async fn stream(&self, exec: &str, stream: Stream) -> Connection {
        let mut socket = VsockStream::connect(VsockAddr::new(VMADDR_CID_LOCAL, STREAM_PORT)).await.unwrap();
        let header = StreamHeader { stream, container_id: self.id.clone(), exec_id: exec.into() };
        socket.write_all(&header.encode().unwrap()).await.unwrap();
        Connection(socket)
    }

    /// Starts the container, waits for its end, and removes it.
    pub(crate) async fn finish(self) -> Finished {
        let (mut stdout, mut stderr) =
            (self.stream("", Stream::Stdout).await, self.stream("", Stream::Stderr).await);
        self.start().await.unwrap();
        let (out, err, ended) = tokio::join!(stdout.read_to_end(), stderr.read_to_end(), self.wait(""));
        self.remove(false).await.unwrap();
        finished(&ended, out, err)
    }

    /// The same for one that was started.
    pub(crate) async fn finish_started(self) -> Finished {
        let (mut stdout, mut stderr) =
            (self.stream("", Stream::Stdout).await, self.stream("", Stream::Stderr).await);
        let (out, err, ended) = tokio::join!(stdout.read_to_end(), stderr.read_to_end(), self.wait(""));
        self.remove(false).await.unwrap();
        finished(&ended, out, err)
    }

    pub(crate) async fn finish_exec(&self, exec: &str) -> Finished {
        let (mut stdout, mut stderr) =
            (self.stream(exec, Stream::Stdout).await, self.stream(exec, Stream::Stderr).await);
        let (out, err, ended) = tokio::join!(stdout.read_to_end(), stderr.read_to_end(), self.wait(exec));
        finished(&ended, out, err)
    }
}

fn finished(ended: &WaitProcessResponse, out: Vec<u8>, err: Vec<u8>) -> Finished {
    Finished {
        status: ended.exit_status,
        oom_killed: ended.oom_killed,
        stdout: String::from_utf8(out).unwrap(),
        stderr: String::from_utf8(err).unwrap(),
    }
}

/// The base layer below a tmpfs.
fn writable() -> Rootfs {
    Rootfs {
        lower: vec![BlockSource { slot: BASE, ..BlockSource::default() }],
        upper: Some(Upper::TmpfsBytes(16 << 20)),
        ..Rootfs::default()
    }
}

/// A connection that carries a stream.
pub(crate) struct Connection(VsockStream);

impl Connection {
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.unwrap();
    }

    pub(crate) fn shutdown(&self) {
        self.0.shutdown(std::net::Shutdown::Write).unwrap();
    }

    pub(crate) async fn read_some(&mut self) -> Vec<u8> {
        let mut buffer = vec![0; 4096];
        let length = self.0.read(&mut buffer).await.unwrap();
        buffer.truncate(length);
        buffer
    }

    pub(crate) async fn read_to_end(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes).await.unwrap();
        bytes
    }

    pub(crate) async fn read_until(&mut self, end: &str) -> String {
        let mut text = String::new();
        while !text.ends_with(end) && !text.contains(&format!("{end}\r")) {
            let more = self.read_some().await;
            assert!(!more.is_empty(), "the stream ended after {text:?}");
            text.push_str(&String::from_utf8_lossy(&more));
        }
        text
    }
}
