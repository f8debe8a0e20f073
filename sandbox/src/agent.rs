//! Calls to the agent in the guest. The guest is hostile: its answers are bounded in size by ttrpc, in time by the caller, and
//! its words are escaped before anyone sees them.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bulkhead_protocol::agent::GuestDetails;
use bulkhead_protocol::agent_ttrpc::AgentClient;
use bulkhead_protocol::limits::{
    CALL_TIMEOUT_S, CONTROL_PORT, CREATE_TIMEOUT_S, PROTOCOL_VERSION, REMOVE_TIMEOUT_S,
};
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::time::timeout;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use crate::console::excerpt;
use crate::vsock;

pub use bulkhead_protocol::agent as messages;
pub use ttrpc::Code;

/// Bytes of entropy that a restored guest gets: what Linux's generator holds, twice.
const SEED_LEN: usize = 64;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No connection.
    #[error("cannot connect to the agent in the guest")]
    Connect(#[source] io::Error),
    /// No entropy for the guest.
    #[error("cannot get random numbers for the guest")]
    Random(#[source] io::Error),
    /// No answer in time.
    #[error("the agent in the guest does not answer within {0:?}")]
    Timeout(Duration),
    /// The connection ended, mostly because the machine did.
    #[error("the connection to the agent in the guest ended: {0}")]
    Lost(String),
    /// The agent refused.
    #[error("{text}")]
    Refused {
        /// The kind of refusal.
        code: Code,
        /// The agent's own words, fit for a terminal.
        text: String,
    },
    /// The agent is of another build.
    #[error(
        "the agent in the guest speaks version {0} of the protocol, this program {PROTOCOL_VERSION}: install both from one build"
    )]
    Version(u32),
}

impl AgentError {
    /// The kind of refusal, if it is one.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// A connection to the agent.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    details: GuestDetails,
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Agent").field("details", &self.details).finish_non_exhaustive()
    }
}

impl Agent {
    /// Connects through the VMM's vsock socket and makes sure that both sides speak the same version.
    ///
    /// # Errors
    /// [`AgentError`] when the agent cannot be reached or is of another build.
    pub async fn connect(socket: &Path) -> Result<Self, AgentError> {
        let patience = Duration::from_secs(CALL_TIMEOUT_S);
        let connecting = timeout(patience, vsock::connect(socket, CONTROL_PORT));
        let stream =
            connecting.await.map_err(|_| AgentError::Timeout(patience))?.map_err(AgentError::Connect)?;
        let client = AgentClient::new(Client::new(Socket::from(stream)));
        let request = messages::GetGuestDetailsRequest::new();
        let details = within(CALL_TIMEOUT_S, client.get_guest_details(Context::default(), &request)).await?;
        if details.protocol_version != PROTOCOL_VERSION {
            return Err(AgentError::Version(details.protocol_version));
        }
        Ok(Self { client, details })
    }

    /// What the agent said of the guest when the connection was made.
    pub fn details(&self) -> &GuestDetails {
        &self.details
    }

    /// Tells a restored guest what sets it apart from every other one of the same saved machine: entropy of its own, and the time. Until
    /// then nothing of a tenant may run in it.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn introduce(&self) -> Result<(), AgentError> {
        let mut seed = vec![0; SEED_LEN];
        let filled = getrandom(&mut seed[..], GetRandomFlags::empty());
        filled.map_err(|errno| AgentError::Random(errno.into()))?;
        let request = messages::AddEntropyRequest { seed, ..Default::default() };
        within(CALL_TIMEOUT_S, self.client.add_entropy(Context::default(), &request)).await?;
        self.set_clock().await
    }

    /// Tells the guest the time. Its clock stands still while the host is suspended; the agent steps it only when it is off by much.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn set_clock(&self) -> Result<(), AgentError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let realtime_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let request = messages::SetClockRequest { realtime_ns, ..Default::default() };
        within(CALL_TIMEOUT_S, self.client.set_clock(Context::default(), &request)).await.map(drop)
    }

    /// Brings CPUs online that the VMM has made.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn online_cpus(&self, count: u32) -> Result<(), AgentError> {
        let request = messages::OnlineCpusRequest { count, ..Default::default() };
        within(CALL_TIMEOUT_S, self.client.online_cpus(Context::default(), &request)).await.map(drop)
    }

    /// Has a guest without containers write its disks and reset the machine. There is no answer but the machine's end.
    ///
    /// # Errors
    /// [`AgentError`], as for every call; [`AgentError::Lost`] is what a guest that does it looks like.
    pub async fn shutdown(&self) -> Result<(), AgentError> {
        let request = messages::ShutdownRequest::new();
        within(CALL_TIMEOUT_S, self.client.shutdown(Context::default(), &request)).await.map(drop)
    }

    /// Has the guest's driver take a slot that the VMM has filled.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn bind_slot(&self, slot: u8) -> Result<(), AgentError> {
        let request = messages::BindSlotRequest { slot: slot.into(), ..Default::default() };
        within(CALL_TIMEOUT_S, self.client.bind_slot(Context::default(), &request)).await.map(drop)
    }

    /// Has the guest's driver let go of a slot that the VMM is about to empty.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn unbind_slot(&self, slot: u8) -> Result<(), AgentError> {
        let request = messages::UnbindSlotRequest { slot: slot.into(), ..Default::default() };
        within(CALL_TIMEOUT_S, self.client.unbind_slot(Context::default(), &request)).await.map(drop)
    }

    /// Makes a container up to the point before its command runs.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn create_container(
        &self,
        request: &messages::CreateContainerRequest,
    ) -> Result<(), AgentError> {
        within(CREATE_TIMEOUT_S, self.client.create_container(Context::default(), request)).await.map(drop)
    }

    /// Runs a container's command.
    ///
    /// # Errors
    /// [`AgentError`]; its code tells a command that was not found from one that may not be executed.
    pub async fn start_container(&self, container_id: &str) -> Result<(), AgentError> {
        let request =
            messages::StartContainerRequest { container_id: container_id.into(), ..Default::default() };
        within(CREATE_TIMEOUT_S, self.client.start_container(Context::default(), &request)).await.map(drop)
    }

    /// Starts another process in a container.
    ///
    /// # Errors
    /// As [`start_container`](Self::start_container).
    pub async fn exec_process(&self, request: &messages::ExecProcessRequest) -> Result<(), AgentError> {
        within(CREATE_TIMEOUT_S, self.client.exec_process(Context::default(), request)).await.map(drop)
    }

    /// Sends a signal to a process.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn signal(&self, process: &ProcessId, signal: u32) -> Result<(), AgentError> {
        self.signal_whom(process, signal, false).await
    }

    /// Sends a signal to every process of a container.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn signal_all(&self, container_id: &str, signal: u32) -> Result<(), AgentError> {
        self.signal_whom(&ProcessId::init(container_id), signal, true).await
    }

    async fn signal_whom(&self, process: &ProcessId, signal: u32, all: bool) -> Result<(), AgentError> {
        let request = messages::SignalProcessRequest {
            container_id: process.container_id.clone(),
            exec_id: process.exec_id.clone(),
            signal,
            all,
            ..Default::default()
        };
        within(CALL_TIMEOUT_S, self.client.signal_process(Context::default(), &request)).await.map(drop)
    }

    /// Waits for the end of a process, as long as it takes.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn wait(&self, process: &ProcessId) -> Result<messages::WaitProcessResponse, AgentError> {
        let request = messages::WaitProcessRequest {
            container_id: process.container_id.clone(),
            exec_id: process.exec_id.clone(),
            ..Default::default()
        };
        self.client.wait_process(Context::default(), &request).await.map_err(error)
    }

    /// Tells a process's pseudoterminal its size.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn resize(&self, process: &ProcessId, rows: u16, columns: u16) -> Result<(), AgentError> {
        let request = messages::ResizeTerminalRequest {
            container_id: process.container_id.clone(),
            exec_id: process.exec_id.clone(),
            rows: rows.into(),
            columns: columns.into(),
            ..Default::default()
        };
        within(CALL_TIMEOUT_S, self.client.resize_terminal(Context::default(), &request)).await.map(drop)
    }

    /// Ends a process's input after what has arrived of it.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn close_stdin(&self, process: &ProcessId) -> Result<(), AgentError> {
        let request = messages::CloseStdinRequest {
            container_id: process.container_id.clone(),
            exec_id: process.exec_id.clone(),
            ..Default::default()
        };
        within(CALL_TIMEOUT_S, self.client.close_stdin(Context::default(), &request)).await.map(drop)
    }

    /// Removes a container, whatever state it is in.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn remove_container(&self, container_id: &str) -> Result<(), AgentError> {
        let request = messages::RemoveContainerRequest {
            container_id: container_id.into(),
            force: true,
            ..Default::default()
        };
        within(REMOVE_TIMEOUT_S, self.client.remove_container(Context::default(), &request)).await.map(drop)
    }

    /// Changes a container's limits: `resources` is the JSON of `linux.resources` in the OCI runtime specification.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn update(&self, container_id: &str, resources: Vec<u8>) -> Result<(), AgentError> {
        let request = messages::UpdateContainerRequest {
            container_id: container_id.into(),
            resources,
            ..Default::default()
        };
        within(CALL_TIMEOUT_S, self.client.update_container(Context::default(), &request)).await.map(drop)
    }

    /// Freezes every process of a container.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn pause(&self, container_id: &str) -> Result<(), AgentError> {
        let request =
            messages::PauseContainerRequest { container_id: container_id.into(), ..Default::default() };
        within(CALL_TIMEOUT_S, self.client.pause_container(Context::default(), &request)).await.map(drop)
    }

    /// Lets a container's processes go on.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn resume(&self, container_id: &str) -> Result<(), AgentError> {
        let request =
            messages::ResumeContainerRequest { container_id: container_id.into(), ..Default::default() };
        within(CALL_TIMEOUT_S, self.client.resume_container(Context::default(), &request)).await.map(drop)
    }

    /// What a container uses.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn stats(&self, container_id: &str) -> Result<messages::StatsContainerResponse, AgentError> {
        let request =
            messages::StatsContainerRequest { container_id: container_id.into(), ..Default::default() };
        within(CALL_TIMEOUT_S, self.client.stats_container(Context::default(), &request)).await
    }

    /// Waits, as long as it takes, until the kernel has killed more than `kills` processes of a container for want of memory; how
    /// many they are then.
    ///
    /// # Errors
    /// [`AgentError`], as for every call.
    pub async fn watch_oom(&self, container_id: &str, kills: u64) -> Result<u64, AgentError> {
        let request =
            messages::WatchOomRequest { container_id: container_id.into(), kills, ..Default::default() };
        self.client.watch_oom(Context::default(), &request).await.map(|answer| answer.kills).map_err(error)
    }
}

/// A process in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessId {
    /// Its container.
    pub container_id: String,
    /// The exec, or empty for the container's init.
    pub exec_id: String,
}

impl ProcessId {
    /// A container's init.
    pub fn init(container_id: &str) -> Self {
        Self { container_id: container_id.to_owned(), exec_id: String::new() }
    }
}

/// Waits for the answer to a call of the usual kind.
async fn within<T>(seconds: u64, call: impl Future<Output = ttrpc::Result<T>>) -> Result<T, AgentError> {
    let patience = Duration::from_secs(seconds);
    timeout(patience, call).await.map_err(|_| AgentError::Timeout(patience))?.map_err(error)
}

fn error(error: ttrpc::Error) -> AgentError {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            AgentError::Refused { code: status.code.enum_value_or_default(), text: excerpt(&status.message) }
        }
        other => AgentError::Lost(excerpt(&other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use bulkhead_protocol::agent_ttrpc::{Agent as Service, create_agent};
    use bulkhead_protocol::limits::SEED_MAX;
    use messages::{AddEntropyRequest, Empty, SetClockRequest, SetClockResponse};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;

    /// Keeps what it is told.
    #[derive(Default)]
    struct Listener {
        seeds: Mutex<Vec<Vec<u8>>>,
        clock: Mutex<u64>,
    }

    #[async_trait::async_trait]
    impl Service for Listener {
        async fn add_entropy(&self, _: &TtrpcContext, request: AddEntropyRequest) -> ttrpc::Result<Empty> {
            self.seeds.lock().unwrap().push(request.seed);
            Ok(Empty::new())
        }

        async fn set_clock(
            &self,
            _: &TtrpcContext,
            request: SetClockRequest,
        ) -> ttrpc::Result<SetClockResponse> {
            *self.clock.lock().unwrap() = request.realtime_ns;
            Ok(SetClockResponse::new())
        }
    }

    #[tokio::test]
    async fn every_guest_is_introduced_with_a_seed_of_its_own_and_the_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent");
        let listener = Arc::new(Listener::default());
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_agent(Arc::clone(&listener) as Arc<dyn Service + Send + Sync>));
        server.start().await.unwrap();
        let stream = tokio::net::UnixStream::connect(&path).await.unwrap();
        let client = AgentClient::new(Client::new(Socket::from(stream)));
        let agent = Agent { client, details: GuestDetails::new() };

        let now_ns = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        let before = now_ns();
        agent.introduce().await.unwrap();
        agent.introduce().await.unwrap();
        assert!((before..=now_ns()).contains(&u128::from(*listener.clock.lock().unwrap())));
        let seeds = listener.seeds.lock().unwrap();
        assert!(seeds.iter().all(|seed| seed.len() == SEED_LEN && seed.len() <= SEED_MAX));
        assert!(seeds.len() == 2 && seeds[0] != seeds[1]);
    }

    /// Reads a frame of ttrpc and gives its stream's id: a length, the id, a type and flags, big-endian, and the rest.
    async fn request(agent: &mut tokio::net::UnixStream) -> u32 {
        let mut header = [0; 10];
        agent.read_exact(&mut header).await.unwrap();
        let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        agent.read_exact(&mut vec![0; word(0).try_into().unwrap()]).await.unwrap();
        word(4)
    }

    async fn respond(agent: &mut tokio::net::UnixStream, id: u32, kind: u8, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap();
        let frame = [&length.to_be_bytes()[..], &id.to_be_bytes(), &[kind, 0], payload].concat();
        agent.write_all(&frame).await.unwrap();
    }

    #[tokio::test]
    async fn answers_of_absurd_size_or_kind_are_errors_of_their_calls_alone() {
        const RESPONSE: u8 = 2;
        let (ours, mut hostile) = tokio::net::UnixStream::pair().unwrap();
        let client = AgentClient::new(Client::new(Socket::from(ours)));
        let agent = Agent { client, details: GuestDetails::new() };
        let long = ttrpc::Response {
            status: Some(ttrpc::get_status(Code::INTERNAL, "x".repeat(3 << 20))).into(),
            ..Default::default()
        };
        let long = protobuf::Message::write_to_bytes(&long).unwrap();
        let answers: [(u8, Vec<u8>); 4] =
            [(RESPONSE, vec![0; 5 << 20]), (RESPONSE, vec![0xff; 100]), (9, Vec::new()), (RESPONSE, long)];
        for (kind, payload) in answers {
            let answering = async {
                let id = request(&mut hostile).await;
                // What nobody has asked for is passed over.
                respond(&mut hostile, id + 2, RESPONSE, &payload).await;
                respond(&mut hostile, id, kind, &payload).await;
            };
            let (stats, ()) = tokio::join!(agent.stats("a"), answering);
            let said = stats.unwrap_err().to_string();
            assert!(said.len() < 5000, "{} bytes", said.len());
        }
        let answering = async {
            let id = request(&mut hostile).await;
            respond(&mut hostile, id, RESPONSE, &[]).await;
        };
        let (paused, ()) = tokio::join!(agent.pause("a"), answering);
        paused.unwrap();
    }
}
