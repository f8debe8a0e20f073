//! A bundle and a shim that the test starts itself, as containerd does, for what containerd would not let through.

use std::cell::Cell;
use std::fs::{File, create_dir, read, write};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

pub use containerd_shim_protos::api::{CreateTaskRequest, Mount};
use serde_json::{Value, json};

use super::shim::Shim;
use super::{NAMESPACE, directory, is_runc, runtime, start};
use crate::bulkhead::expect_code;
use crate::files::{busybox_tree, tool};
use crate::vm::{Result, artifact};

/// A directory with `config.json` and a root, which is busybox.
pub struct Bundle {
    /// Holds the bundle under the task's name, as containerd has it and runc's shim relies on.
    _parent: tempfile::TempDir,
    path: PathBuf,
    id: String,
    /// The pipe for the shim's log has a writer as long as the bundle is there, so that its reader does not end before the shim begins.
    _log: File,
    logged: Arc<Mutex<String>>,
    cleaned: Cell<bool>,
}

impl Bundle {
    /// Makes one for a command.
    pub fn new(id: &str, program: &[&str]) -> Result<Self> {
        Self::below(&std::env::temp_dir(), id, program)
    }

    /// Makes one in a new directory of this one.
    pub fn below(parent: &Path, id: &str, program: &[&str]) -> Result<Self> {
        let parent = tempfile::tempdir_in(parent)?;
        let path = parent.path().join(id);
        create_dir(&path)?;
        let pipe = path.join("log");
        super::fifo::make(&pipe)?;
        let log = File::options().read(true).write(true).open(&pipe)?;
        let logged = Arc::new(Mutex::new(String::new()));
        let (lines, said) = (BufReader::new(File::open(&pipe)?).lines(), Arc::clone(&logged));
        std::thread::spawn(move || {
            for line in lines.map_while(std::result::Result::ok) {
                let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                *said += &line;
                said.push('\n');
            }
        });
        let bundle =
            Self { _parent: parent, path, id: id.to_owned(), _log: log, logged, cleaned: Cell::new(false) };
        busybox_tree(&bundle.path().join("rootfs"))?;
        bundle.configure(&spec(id, program))?;
        Ok(bundle)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What its shim has logged.
    pub fn log(&self) -> String {
        self.logged.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its `config.json`.
    pub fn spec(&self) -> Result<Value> {
        Ok(serde_json::from_slice(&read(self.path().join("config.json"))?)?)
    }

    /// Replaces `config.json`.
    pub fn configure(&self, spec: &Value) -> Result {
        Ok(write(self.path().join("config.json"), spec.to_string())?)
    }

    /// Runs the shim's binary for it as containerd does.
    pub fn shim_command(&self, verb: &str) -> Result<Command> {
        start()?;
        let runtime = runtime();
        let mut words = runtime.rsplit('.');
        let (version, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let address = directory().join("containerd.sock");
        let mut command = Command::new(format!("containerd-shim-{name}-{version}"));
        command.current_dir(self.path()).args(["-namespace", NAMESPACE, "-address"]).arg(&address);
        command.args(["-publish-binary", "containerd", "-id", &self.id]);
        if verb == "delete" {
            command.arg("-bundle").arg(self.path());
        }
        let path = format!("{}:{}", artifact("bin").display(), std::env::var("PATH").unwrap_or_default());
        command
            .arg(verb)
            .env("PATH", path)
            .env("TTRPC_ADDRESS", format!("{}.ttrpc", address.display()))
            .env("GRPC_ADDRESS", address)
            .env("NAMESPACE", NAMESPACE)
            .env("MAX_SHIM_VERSION", "2");
        Ok(command)
    }

    /// Starts its shim, and gives what that answers.
    pub fn start_shim_at(&self) -> Result<String> {
        Ok(String::from_utf8(tool(&mut self.shim_command("start")?)?)?)
    }

    /// Starts its shim.
    pub fn start_shim(&self) -> Result<Shim> {
        Shim::connect(&self.start_shim_at()?)
    }

    /// Runs what containerd runs when the shim is gone.
    pub fn clean_up(&self) -> Result {
        // runc's does nothing without the file in which a create that got so far has noted which runc it used, and fails.
        let never_created = is_runc() && !self.path.join("runtime").exists();
        self.cleaned.set(true);
        let output = self.shim_command("delete")?.output()?;
        if never_created { Ok(()) } else { expect_code(&output, 0) }
    }

    /// The request to create its task, without standard streams.
    pub fn request(&self) -> CreateTaskRequest {
        CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.path().display().to_string(),
            ..CreateTaskRequest::default()
        }
    }

    /// A named pipe in it.
    pub fn fifo(&self, name: &str) -> Result<PathBuf> {
        let directory = self.path().join("streams");
        if !directory.exists() {
            create_dir(&directory)?;
        }
        let path = directory.join(name);
        super::fifo::make(&path)?;
        Ok(path)
    }
}

impl Drop for Bundle {
    /// A test that has failed leaves its shim to nobody.
    fn drop(&mut self) {
        if !self.cleaned.get() {
            let _ = self.clean_up();
        }
    }
}

fn spec(id: &str, program: &[&str]) -> Value {
    let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({ "type": kind }));
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": program, "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 },
        },
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" },
        ],
        "linux": {
            "cgroupsPath": format!("/{NAMESPACE}/{id}"),
            "namespaces": namespaces,
        },
    })
}
