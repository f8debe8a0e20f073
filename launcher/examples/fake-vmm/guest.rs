//! The agent of a guest that does not exist: containers are processes of the host.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, Stdio as ChildStdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use async_trait::async_trait;
use bulkhead_protocol::agent::{
    BindSlotRequest, BindSlotResponse, CreateContainerRequest, CreateContainerResponse, Empty,
    ExecProcessRequest, ExecProcessResponse, GetGuestDetailsRequest, GuestDetails, OnlineCpusRequest,
    OnlineCpusResponse, PauseContainerRequest, RemoveContainerRequest, ResizeTerminalRequest,
    ResumeContainerRequest, SignalProcessRequest, StartContainerRequest, StatsContainerRequest,
    StatsContainerResponse, Stdio, UpdateContainerRequest, WaitProcessRequest, WaitProcessResponse,
    WatchOomRequest, WatchOomResponse,
};
use bulkhead_protocol::agent_ttrpc::{Agent, create_agent};
use bulkhead_protocol::limits::{CONTROL_PORT, PROTOCOL_VERSION, STREAM_PORT};
use bulkhead_protocol::status;
use bulkhead_protocol::stream::{PREFIX_LEN, Stream, StreamHeader};
use bulkhead_vmm::control::message::Exit;
use rustix::process::{Pid, Signal, kill_process, kill_process_group, set_parent_process_death_signal};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::sync::watch;
use ttrpc::asynchronous::{Server, TtrpcContext};
use ttrpc::{Code, get_status};

use crate::Machine;

type Key = (String, String);
type Processes = Arc<Mutex<HashMap<Key, Process>>>;

/// A process and its ends of the streams.
struct Process {
    /// `args`, `env` and `cwd` of the OCI process.
    spec: serde_json::Value,
    child_ends: HashMap<u8, OwnedFd>,
    host_ends: HashMap<u8, OwnedFd>,
    terminal: Option<OwnedFd>,
    pid: Option<u32>,
    exit: watch::Sender<Option<u32>>,
}

impl Process {
    /// The value of a variable in the environment of the process, by which tests say how it behaves.
    fn told(&self, variable: &str) -> Option<String> {
        let words = self.spec["env"].as_array().into_iter().flatten().filter_map(serde_json::Value::as_str);
        let mut told = words.filter_map(|word| word.split_once('='));
        told.find_map(|(name, value)| (name == variable).then(|| value.to_owned()))
    }

    fn is_told(&self, variable: &str) -> bool {
        self.told(variable).is_some()
    }

    /// Kills it and what it has started, or ends it before it has been started.
    fn kill(&self, signal: Signal) {
        match self.pid {
            Some(pid) if self.exit.borrow().is_none() => {
                let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a pid");
                // What has ended meanwhile cannot be killed.
                let _ = kill_process_group(pid, signal);
            }
            Some(_) => {}
            None => drop(self.exit.send_replace(u32::try_from(128 + signal.as_raw()).ok())),
        }
    }
}

/// Serves connections from the host in the background.
pub(crate) fn serve(listener: UnixListener, machine: &Machine) {
    let processes = Processes::default();
    let service =
        Service { processes: Arc::clone(&processes), machine: machine.clone(), limits: Mutex::default() };
    let directory =
        std::env::temp_dir().join(format!("fake-vmm-{}", rustix::process::getpid().as_raw_nonzero()));
    let unique = Arc::as_ptr(&processes).addr();
    let path = format!("@{}-{unique:x}-{}", directory.display(), random());
    let (bound, ready) = std::sync::mpsc::channel();
    let address = path.clone();
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async move {
            let server = Server::new().bind(&format!("unix://{address}")).expect("an address");
            let mut server = server.register_service(create_agent(Arc::new(service)));
            server.start().await.expect("a server");
            bound.send(()).expect("somebody waits");
            std::future::pending::<()>().await;
        });
    });
    ready.recv().expect("the server starts");
    thread::spawn(move || {
        listener.set_nonblocking(false).expect("a socket");
        for connection in listener.incoming() {
            let (processes, path) = (Arc::clone(&processes), path.clone());
            thread::spawn(move || accept(connection.expect("a connection"), &processes, &path));
        }
    });
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes)).expect("random bytes");
    u64::from_ne_bytes(bytes)
}

fn accept(mut connection: UnixStream, processes: &Processes, agent: &str) {
    let mut line = String::new();
    BufReader::with_capacity(1, &connection).read_line(&mut line).expect("a line");
    let port: u32 = line.trim_end().strip_prefix("CONNECT ").expect("CONNECT").parse().expect("a port");
    connection.write_all(format!("OK {}\n", port + 1).as_bytes()).expect("the host listens");
    if port == CONTROL_PORT {
        use std::os::linux::net::SocketAddrExt;
        let name = agent.strip_prefix('@').expect("abstract");
        let address = std::os::unix::net::SocketAddr::from_abstract_name(name).expect("an address");
        let agent = UnixStream::connect_addr(&address).expect("the agent listens");
        let (connection2, agent2) =
            (connection.try_clone().expect("a copy"), agent.try_clone().expect("a copy"));
        thread::spawn(move || copy(agent2.into(), connection2.into()));
        copy(connection.into(), agent.into());
        return;
    }
    assert_eq!(port, STREAM_PORT);
    let mut prefix = [0; PREFIX_LEN];
    connection.read_exact(&mut prefix).expect("a header");
    let (stream, id, exec) = StreamHeader::decode_prefix(prefix).expect("a header");
    let (mut id, mut exec) = (vec![0; id], vec![0; exec]);
    connection.read_exact(&mut id).and_then(|()| connection.read_exact(&mut exec)).expect("ids");
    let header = StreamHeader::from_parts(stream, id, exec).expect("ids");
    let end = {
        let mut processes = processes.lock().unwrap();
        let process = processes.get_mut(&(header.container_id, header.exec_id));
        process.and_then(|process| process.host_ends.remove(&(stream as u8)))
    };
    let Some(end) = end else { return };
    match stream {
        Stream::Stdin => copy(connection.into(), end),
        Stream::Stdout | Stream::Stderr => copy(end, connection.into()),
    }
}

/// Copies to the end, which becomes the other side's end.
fn copy(from: OwnedFd, to: OwnedFd) {
    let (mut from, mut to) = (File::from(from), File::from(to));
    // A pseudoterminal ends with an error; a side that has gone is an end too.
    let _ = io::copy(&mut from, &mut to);
    let to: OwnedFd = to.into();
    let _ = rustix::net::shutdown(&to, rustix::net::Shutdown::Write);
    // What nobody takes must not be written either.
    let _ = rustix::net::shutdown(OwnedFd::from(from), rustix::net::Shutdown::Read);
}

struct Service {
    processes: Processes,
    machine: Machine,
    /// `memory.limit` as last told, by container.
    limits: Mutex<HashMap<String, u64>>,
}

impl Service {
    fn make(&self, key: Key, spec: &[u8], stdio: &Stdio) -> ttrpc::Result<()> {
        let spec: serde_json::Value = serde_json::from_slice(spec).map_err(internal)?;
        let (mut child_ends, mut host_ends, mut terminal) = (HashMap::new(), HashMap::new(), None);
        if stdio.terminal {
            let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).map_err(internal)?;
            grantpt(&master).and_then(|()| unlockpt(&master)).map_err(internal)?;
            let name = ptsname(&master, Vec::new()).map_err(internal)?;
            let path = name.to_str().map_err(internal)?.to_owned();
            let size = Winsize {
                ws_row: u16::try_from(stdio.rows).map_err(internal)?,
                ws_col: u16::try_from(stdio.columns).map_err(internal)?,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            tcsetwinsize(&master, size).map_err(internal)?;
            for stream in [0, 1] {
                host_ends.insert(stream, master.try_clone().map_err(internal)?);
            }
            for stream in [0, 1, 2] {
                let slave = File::options().read(true).write(true).open(&path).map_err(internal)?;
                child_ends.insert(stream, slave.into());
            }
            terminal = Some(master);
        } else {
            for (stream, wanted) in [(0, stdio.stdin), (1, stdio.stdout), (2, stdio.stderr)] {
                if wanted {
                    let (child, host) = UnixStream::pair().map_err(internal)?;
                    child_ends.insert(stream, child.into());
                    host_ends.insert(stream, host.into());
                }
            }
        }
        let process =
            Process { spec, child_ends, host_ends, terminal, pid: None, exit: watch::channel(None).0 };
        self.processes.lock().unwrap().insert(key, process);
        Ok(())
    }

    fn start(&self, key: &Key) -> ttrpc::Result<()> {
        let mut processes = self.processes.lock().unwrap();
        let process = processes.get_mut(key).ok_or_else(|| refused(Code::NOT_FOUND, "no such process"))?;
        let words = |name: &str| -> Vec<String> {
            let list = process.spec[name].as_array().into_iter().flatten();
            list.map(|word| word.as_str().unwrap_or_default().to_owned()).collect()
        };
        let args = words("args");
        match args[0].as_str() {
            "fake:panic" => {
                self.machine.say("all is well\n\x1b[2JKernel panic - not syncing: Fatal exception\n");
                self.machine.end(None, Exit::Reset);
            }
            "fake:agent-failed" => self.machine.end(Some(status::FAILED), Exit::Reset),
            "fake:kill-vmm" => {
                let own = rustix::process::getpid();
                if own == Pid::INIT {
                    // The first process of a pid namespace cannot kill itself.
                    std::process::exit(1);
                }
                kill_process(own, Signal::KILL).map_err(internal)?;
            }
            _ => {}
        }
        let mut command = if process.terminal.is_some() {
            // Makes the terminal that of a session of its own, so that ^C means something.
            let mut command = Command::new("/usr/bin/setsid");
            command.arg("--ctty").args(&args).env_clear();
            command
        } else {
            let mut command = Command::new(&args[0]);
            command.args(&args[1..]).env_clear().process_group(0);
            command
        };
        command.envs(words("env").iter().filter_map(|variable| variable.split_once('=')));
        command.current_dir(process.spec["cwd"].as_str().unwrap_or("/"));
        let mut end =
            |stream| process.child_ends.remove(&stream).map_or_else(ChildStdio::null, ChildStdio::from);
        command.stdin(end(0)).stdout(end(1)).stderr(end(2));
        // A machine that ends takes everything along that runs in it. The thread that starts it lives as long as this process.
        // SAFETY: the closure runs in the forked child and makes one system call.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let mut child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => refused(Code::NOT_FOUND, format!("{:?} not found\x1b", args[0])),
            io::ErrorKind::PermissionDenied => refused(Code::PERMISSION_DENIED, "permission denied"),
            _ => internal(error),
        })?;
        drop(command);
        process.pid = Some(child.id());
        let exit = process.exit.clone();
        let (container, is_init) = (key.0.clone(), key.1.is_empty());
        let processes = Arc::clone(&self.processes);
        thread::spawn(move || {
            let status = child.wait().expect("a child");
            let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(255);
            exit.send_replace(u32::try_from(code).ok());
            if is_init {
                let processes = processes.lock().unwrap();
                let others = processes.iter().filter(|((id, _), _)| *id == container);
                others.for_each(|(_, process)| process.kill(Signal::KILL));
            }
        });
        Ok(())
    }

    /// Signals the first process of a container, and all that it has started.
    fn signal_init(&self, id: &str, signal: Signal) -> ttrpc::Result<Empty> {
        let processes = self.processes.lock().unwrap();
        let process = processes.get(&(id.to_owned(), String::new()));
        process.ok_or_else(|| refused(Code::NOT_FOUND, "no such container"))?.kill(signal);
        Ok(Empty::default())
    }
}

fn refused(code: Code, text: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, text.into()))
}

fn internal(error: impl std::fmt::Display) -> ttrpc::Error {
    refused(Code::INTERNAL, error.to_string())
}

#[async_trait]
impl Agent for Service {
    async fn get_guest_details(
        &self,
        _: &TtrpcContext,
        _: GetGuestDetailsRequest,
    ) -> ttrpc::Result<GuestDetails> {
        Ok(GuestDetails {
            protocol_version: PROTOCOL_VERSION,
            kernel_release: "6.12.0".into(),
            ..Default::default()
        })
    }

    async fn bind_slot(&self, _: &TtrpcContext, _: BindSlotRequest) -> ttrpc::Result<BindSlotResponse> {
        Ok(BindSlotResponse::default())
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        request: RemoveContainerRequest,
    ) -> ttrpc::Result<Empty> {
        // By its name: it need not have got as far as to have an environment.
        if request.container_id == "fake-immovable" {
            std::future::pending::<()>().await;
        }
        let init = (request.container_id.clone(), String::new());
        let slow = self.processes.lock().unwrap().get(&init).and_then(|init| init.told("FAKE_WRITES_UNTIL"));
        if let Some(file) = slow.map(PathBuf::from) {
            // A disk that takes its time, and an agent that has less.
            for _ in 0..100 {
                if file.exists() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            if !file.exists() {
                return Err(refused(Code::DEADLINE_EXCEEDED, "it is not removed yet"));
            }
            std::fs::write(file.with_extension("written"), "").map_err(internal)?;
        }
        self.processes.lock().unwrap().retain(|(id, _), process| {
            let stays = *id != request.container_id;
            if !stays {
                process.kill(Signal::KILL);
            }
            stays
        });
        Ok(Empty::default())
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        request: PauseContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.signal_init(&request.container_id, Signal::STOP)
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        request: ResumeContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.signal_init(&request.container_id, Signal::CONT)
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let resources: serde_json::Value = serde_json::from_slice(&request.resources).map_err(internal)?;
        if let Some(limit) = resources["memory"]["limit"].as_u64() {
            self.limits.lock().unwrap().insert(request.container_id, limit);
        }
        Ok(Empty::default())
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        request: StatsContainerRequest,
    ) -> ttrpc::Result<StatsContainerResponse> {
        let mut numbers = HashMap::from([("pids.current".to_owned(), 1)]);
        if let Some(limit) = self.limits.lock().unwrap().get(&request.container_id) {
            numbers.insert("memory.max".to_owned(), *limit);
        }
        let cpu = HashMap::from([("usage_usec".to_owned(), 7)]);
        Ok(StatsContainerResponse { cpu, numbers, ..Default::default() })
    }

    async fn watch_oom(&self, _: &TtrpcContext, request: WatchOomRequest) -> ttrpc::Result<WatchOomResponse> {
        let (ran_out, floods) = {
            let processes = self.processes.lock().unwrap();
            let init = processes.get(&(request.container_id, String::new()));
            let is_told = |variable| init.is_some_and(|init| init.is_told(variable));
            (is_told("FAKE_OOM"), is_told("FAKE_OOM_FLOOD"))
        };
        if !floods && (!ran_out || request.kills > 0) {
            std::future::pending::<()>().await;
        }
        Ok(WatchOomResponse { kills: request.kills + 1, ..Default::default() })
    }

    async fn online_cpus(
        &self,
        _: &TtrpcContext,
        request: OnlineCpusRequest,
    ) -> ttrpc::Result<OnlineCpusResponse> {
        Ok(OnlineCpusResponse { cpus_online: request.count, ..Default::default() })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateContainerResponse> {
        if request.user == "nobody-here" {
            return Err(refused(Code::INVALID_ARGUMENT, "unable to find user nobody-here"));
        }
        let spec: serde_json::Value = serde_json::from_slice(&request.spec).map_err(internal)?;
        let process = serde_json::to_vec(&spec["process"]).map_err(internal)?;
        if spec["process"]["env"].to_string().contains("FAKE_HANGS_IN_CREATE=") {
            std::future::pending::<()>().await;
        }
        self.make((request.container_id, String::new()), &process, &request.stdio)?;
        Ok(CreateContainerResponse::default())
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: StartContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.start(&(request.container_id, String::new())).map(|()| Empty::default())
    }

    async fn exec_process(
        &self,
        _: &TtrpcContext,
        request: ExecProcessRequest,
    ) -> ttrpc::Result<ExecProcessResponse> {
        let key = (request.container_id, request.exec_id);
        if String::from_utf8_lossy(&request.process).contains("fake:hang") {
            std::future::pending::<()>().await;
        }
        self.make(key.clone(), &request.process, &request.stdio)?;
        self.start(&key)?;
        Ok(ExecProcessResponse::default())
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> ttrpc::Result<Empty> {
        let key = (request.container_id.clone(), request.exec_id.clone());
        let told = |variable| self.processes.lock().unwrap().get(&key).is_some_and(|it| it.is_told(variable));
        if told("FAKE_DEAF") {
            std::future::pending::<()>().await;
        }
        for (variable, code) in
            [("FAKE_REFUSES", Code::FAILED_PRECONDITION), ("FAKE_DENIES", Code::NOT_FOUND)]
        {
            if told(variable) {
                return Err(refused(code, "it is left alone"));
            }
        }
        let number = i32::try_from(request.signal).map_err(internal)?;
        let signal = Signal::from_named_raw(number).ok_or_else(|| internal("no such signal"))?;
        let processes = self.processes.lock().unwrap();
        let process = processes.get(&key);
        if let Some(process) = process
            && process.exit.borrow().is_none()
            && (process.pid.is_none() || request.all)
        {
            process.kill(signal);
            return Ok(Empty::default());
        }
        let pid = process.filter(|process| process.exit.borrow().is_none()).and_then(|process| process.pid);
        let pid = pid.ok_or_else(|| refused(Code::NOT_FOUND, "no such process"))?;
        if process.is_some_and(|process| process.is_told("FAKE_IMMORTAL")) {
            return Ok(Empty::default());
        }
        let pid = Pid::from_raw(i32::try_from(pid).map_err(internal)?).ok_or_else(|| internal("pid 0"))?;
        kill_process(pid, signal).map_err(internal)?;
        Ok(Empty::default())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let (mut exit, oom_killed) = {
            let processes = self.processes.lock().unwrap();
            let process = processes.get(&(request.container_id, request.exec_id));
            let process = process.ok_or_else(|| refused(Code::NOT_FOUND, "no such process"))?;
            (process.exit.subscribe(), process.is_told("FAKE_OOM"))
        };
        let status = exit.wait_for(Option::is_some).await.map_err(internal)?.unwrap_or_default();
        Ok(WaitProcessResponse { exit_status: status, oom_killed, ..Default::default() })
    }

    async fn resize_terminal(
        &self,
        _: &TtrpcContext,
        request: ResizeTerminalRequest,
    ) -> ttrpc::Result<Empty> {
        let processes = self.processes.lock().unwrap();
        let process = processes.get(&(request.container_id, request.exec_id));
        let terminal =
            process.and_then(|process| process.terminal.as_ref()).ok_or_else(|| internal("no terminal"))?;
        let size = Winsize {
            ws_row: u16::try_from(request.rows).map_err(internal)?,
            ws_col: u16::try_from(request.columns).map_err(internal)?,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(terminal, size).map_err(internal)?;
        Ok(Empty::default())
    }
}
