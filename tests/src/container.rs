//! A container made by hand, by the agent's calls alone.

use std::path::Path;

use bulkhead_protocol::agent::{CreateContainerRequest, Rootfs, Stdio};
use bulkhead_protocol::stream::{Stream, StreamHeader};
use bulkhead_sandbox::agent::{Agent, ProcessId};
use bulkhead_sandbox::stream;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::vm::{Result, ensure};

/// A container that runs a shell script.
pub struct Container<'a> {
    agent: &'a Agent,
    process: ProcessId,
    stdin: UnixStream,
    stdout: UnixStream,
}

impl<'a> Container<'a> {
    /// Creates and starts it. `socket` leads to the guest's vsock, whose `agent` has the disks of `rootfs` bound.
    pub async fn start(agent: &'a Agent, socket: &Path, rootfs: &Rootfs, script: &str) -> Result<Self> {
        let process = ProcessId::init("scripted");
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": {
                "args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 }
            },
            "root": { "path": "rootfs" },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" }
            ],
            "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }] }
        });
        let request = CreateContainerRequest {
            container_id: process.container_id.clone(),
            spec: serde_json::to_vec(&spec)?,
            rootfs: Some(rootfs.clone()).into(),
            stdio: Some(Stdio { stdin: true, stdout: true, ..Stdio::default() }).into(),
            ..CreateContainerRequest::default()
        };
        agent.create_container(&request).await?;
        let open = |stream| {
            let container_id = process.container_id.clone();
            let header = StreamHeader { stream, container_id, exec_id: String::new() };
            async move { stream::open(socket, &header).await }
        };
        let (stdin, stdout) = (open(Stream::Stdin).await?, open(Stream::Stdout).await?);
        agent.start_container(&process.container_id).await?;
        Ok(Self { agent, process, stdin, stdout })
    }

    /// Waits for its next output, which must be this.
    pub async fn says(&mut self, expected: &str) -> Result {
        let mut said = vec![0; expected.len()];
        self.stdout.read_exact(&mut said).await?;
        ensure(said == expected.as_bytes(), || format!("{:?}", String::from_utf8_lossy(&said)))
    }

    /// Gives it its last input and waits for its end: its exit code, and what it still said.
    pub async fn finish(mut self, input: &str) -> Result<(u32, String)> {
        self.stdin.write_all(input.as_bytes()).await?;
        self.stdin.shutdown().await?;
        let mut said = String::new();
        self.stdout.read_to_string(&mut said).await?;
        Ok((self.agent.wait(&self.process).await?.exit_status, said))
    }
}
