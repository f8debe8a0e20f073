//! A shim's Task service, for what `ctr` has no words for and for the codes of errors.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::{
    CloseIORequest, CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
    ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
    UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Enum, Message, MessageField};
use containerd_shim_protos::ttrpc::proto::Request;
use containerd_shim_protos::ttrpc::{self, Client};
use serde::Deserialize;

use super::task_directory;
use crate::vm::{Result, ensure};

pub use containerd_shim_protos::api::Status;
pub use ttrpc::Code;

/// The outcome of a call without an answer.
pub type CallResult = ttrpc::Result<()>;

/// How long a call may take, in nanoseconds: longer than anything takes on a busy machine.
const PATIENCE_NS: i64 = 120_000_000_000;

/// A connection to a shim.
pub struct Shim {
    client: Client,
    /// The version of the task service that it has asked for.
    version: u32,
}

/// What a shim answers to `start`, unless it is an address alone.
#[derive(Deserialize)]
struct Bootstrap {
    version: u32,
    address: String,
}

impl Bootstrap {
    fn parse(reply: &str) -> Result<Self> {
        let bootstrap = serde_json::from_str(reply)
            .unwrap_or_else(|_| Self { version: 2, address: reply.trim().to_owned() });
        ensure(bootstrap.address.starts_with("unix://"), || format!("a shim's address: {reply}"))?;
        Ok(bootstrap)
    }
}

impl Shim {
    /// The shim of a task that containerd has created.
    pub fn of(id: &str) -> Result<Self> {
        Self::connect(&Self::reply(id)?)
    }

    /// Its socket.
    pub fn socket(id: &str) -> Result<PathBuf> {
        Ok(PathBuf::from(Bootstrap::parse(&Self::reply(id)?)?.address.trim_start_matches("unix://")))
    }

    fn reply(id: &str) -> Result<String> {
        let bundle = task_directory().join(id);
        // containerd 1.7 has the shim write the one, 2.0 writes the other itself.
        let reply = read_to_string(bundle.join("bootstrap.json"))
            .or_else(|_| read_to_string(bundle.join("address")))
            .map_err(|error| format!("{}: {error}", bundle.display()))?;
        Ok(reply)
    }

    /// The shim that has answered this to `start`.
    pub fn connect(reply: &str) -> Result<Self> {
        let bootstrap = Bootstrap::parse(reply)?;
        Ok(Self { client: Client::connect(&bootstrap.address)?, version: bootstrap.version })
    }

    /// The version of the task service that is spoken with it.
    pub fn version(&self) -> u32 {
        self.version
    }

    fn call<A: Message>(&self, method: &str, request: &impl Message) -> ttrpc::Result<A> {
        let encoded = |error| ttrpc::Error::Others(format!("{method}: {error}"));
        let request = Request {
            service: format!("containerd.task.v{}.Task", self.version),
            method: method.to_owned(),
            timeout_nano: PATIENCE_NS,
            payload: request.write_to_bytes().map_err(encoded)?,
            ..Request::default()
        };
        A::parse_from_bytes(&self.client.request(request)?.payload).map_err(encoded)
    }

    pub fn create(&self, request: &CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        self.call("Create", request)
    }

    pub fn start(&self, id: &str, exec: &str) -> ttrpc::Result<StartResponse> {
        self.call("Start", &StartRequest { id: id.into(), exec_id: exec.into(), ..StartRequest::default() })
    }

    pub fn state(&self, id: &str, exec: &str) -> ttrpc::Result<StateResponse> {
        self.call("State", &StateRequest { id: id.into(), exec_id: exec.into(), ..StateRequest::default() })
    }

    pub fn kill(&self, id: &str, exec: &str, signal: u32) -> ttrpc::Result<()> {
        let request = KillRequest { id: id.into(), exec_id: exec.into(), signal, ..KillRequest::default() };
        self.call::<Empty>("Kill", &request).map(drop)
    }

    pub fn pids(&self, id: &str) -> ttrpc::Result<PidsResponse> {
        self.call("Pids", &PidsRequest { id: id.into(), ..PidsRequest::default() })
    }

    /// Waits for a process's end: its exit code.
    pub fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = WaitRequest { id: id.into(), exec_id: exec.into(), ..WaitRequest::default() };
        self.call::<WaitResponse>("Wait", &request).map(|response| response.exit_status)
    }

    pub fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<DeleteResponse> {
        self.call(
            "Delete",
            &DeleteRequest { id: id.into(), exec_id: exec.into(), ..DeleteRequest::default() },
        )
    }

    /// Adds a process, whose output goes to `stdout`, if that is not empty.
    pub fn exec(&self, id: &str, exec: &str, program: &[&str], stdout: &Path) -> ttrpc::Result<()> {
        let process = serde_json::json!({
            "args": program, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 },
        });
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: process.to_string().into_bytes(),
            ..Any::default()
        };
        let request = ExecProcessRequest {
            id: id.into(),
            exec_id: exec.into(),
            stdout: stdout.display().to_string(),
            spec: MessageField::some(spec),
            ..ExecProcessRequest::default()
        };
        self.call::<Empty>("Exec", &request).map(drop)
    }

    pub fn stats(&self, id: &str) -> ttrpc::Result<StatsResponse> {
        self.call("Stats", &StatsRequest { id: id.into(), ..StatsRequest::default() })
    }

    pub fn pause(&self, id: &str) -> ttrpc::Result<()> {
        self.call::<Empty>("Pause", &PauseRequest { id: id.into(), ..PauseRequest::default() }).map(drop)
    }

    /// Changes limits: `linux.resources` of a configuration.
    pub fn update(&self, id: &str, resources: &serde_json::Value) -> ttrpc::Result<()> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: resources.to_string().into_bytes(),
            ..Any::default()
        };
        let resources = MessageField::some(resources);
        let request = UpdateTaskRequest { id: id.into(), resources, ..UpdateTaskRequest::default() };
        self.call::<Empty>("Update", &request).map(drop)
    }

    /// Tells a terminal its size.
    pub fn resize(&self, id: &str, exec: &str, height: u32, width: u32) -> ttrpc::Result<()> {
        let (id, exec_id) = (id.into(), exec.into());
        let request = ResizePtyRequest { id, exec_id, height, width, ..ResizePtyRequest::default() };
        self.call::<Empty>("ResizePty", &request).map(drop)
    }

    /// Says that no more input comes.
    pub fn close_stdin(&self, id: &str) -> ttrpc::Result<()> {
        let request = CloseIORequest { id: id.into(), stdin: true, ..CloseIORequest::default() };
        self.call::<Empty>("CloseIO", &request).map(drop)
    }

    pub fn shutdown(&self, id: &str) -> ttrpc::Result<()> {
        let request = ShutdownRequest { id: id.into(), ..ShutdownRequest::default() };
        match self.call::<Empty>("Shutdown", &request) {
            // It may be gone before its answer is.
            Ok(_) | Err(ttrpc::Error::LocalClosed | ttrpc::Error::Others(_) | ttrpc::Error::Socket(_)) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Checks that a call failed, with this code.
    pub fn expect<T>(what: &str, result: ttrpc::Result<T>, code: Code) -> Result {
        match result {
            Err(ttrpc::Error::RpcStatus(status)) => ensure(status.code() == code, || {
                format!(
                    "{what}: {:?}, not {code:?}: {}",
                    Code::from_i32(status.code.value()),
                    status.message()
                )
            }),
            Err(error) => Err(format!("{what}: {error}").into()),
            Ok(_) => Err(format!("{what} succeeded").into()),
        }
    }
}
