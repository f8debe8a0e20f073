//! What is written down of one container: what it is, in its data directory, and who runs it, in its run directory.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use oci_spec::runtime::Process;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::name;
use crate::failure::Failure;

/// Name of a [`Record`]'s file in the data directory.
pub(crate) const RECORD_FILE: &str = "container.json";
/// Name of a [`Running`]'s file in the run directory.
pub(crate) const RUNNING_FILE: &str = "state.json";

/// What a container is, and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Its id.
    pub(crate) id: String,
    /// Its name.
    pub(crate) name: String,
    /// What it was made from, as the user said it.
    pub(crate) image: String,
    /// Its command.
    pub(crate) command: Vec<String>,
    /// Nanoseconds since 1970.
    pub(crate) created_at_ns: u64,
    /// Nothing is kept of it once it has ended.
    pub(crate) auto_remove: bool,
    /// The signal that asks it to end.
    pub(crate) stop_signal: u32,
    /// Its process, from which execs take environment, directory and capabilities.
    pub(crate) process: Process,
    /// The user as image or command line named him; empty if `process` says it.
    pub(crate) user: String,
    /// What became of it, once that is known.
    pub(crate) outcome: Option<Outcome>,
}

/// What became of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Its exit code.
    pub(crate) exit_code: u8,
    /// Nanoseconds since 1970.
    pub(crate) finished_at_ns: u64,
    /// Why it did not end by itself.
    pub(crate) error: Option<String>,
}

/// Who runs a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Running {
    /// The launcher that holds the machine.
    pub(crate) supervisor_pid: i32,
    /// Its VMM, once the container has started.
    pub(crate) vmm_pid: Option<u32>,
}

/// Now, in nanoseconds since 1970.
pub(crate) fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Writes a file so that a reader finds either the old content or the new one. It does not wait for the disk: after the host went down
/// the file may be empty, which readers can deal with.
pub(crate) fn write(directory: &Path, name: &str, content: &impl Serialize) -> Result<(), Failure> {
    let next = directory.join(format!("{name}.new"));
    let failed =
        |e: io::Error| Failure::from(e).context(&format!("cannot write {}", directory.join(name).display()));
    let text = serde_json::to_vec(content)?;
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&next);
    file.and_then(|mut file| file.write_all(&text)).map_err(failed)?;
    fs::rename(&next, directory.join(name)).map_err(failed)
}

/// Reads what [`write()`] wrote; `None` if it never did.
pub(crate) fn read<T: DeserializeOwned>(directory: &Path, name: &str) -> Result<Option<T>, Failure> {
    let path = directory.join(name);
    let context = || format!("cannot read {}; remove it if it is of no use", path.display());
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|e| Failure::from(e).context(&context())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::from(e).context(&context())),
    }
}

/// A record for a new container.
pub(crate) fn new_record(wanted_name: Option<&str>) -> Result<Record, Failure> {
    if let Some(wanted) = wanted_name {
        name::check(wanted)?;
    }
    let (id, generated) = name::generate()?;
    Ok(Record {
        id,
        name: wanted_name.map_or(generated, str::to_owned),
        image: String::new(),
        command: Vec::new(),
        created_at_ns: now_ns(),
        auto_remove: false,
        stop_signal: 15,
        process: oci_spec::runtime::Process::default(),
        user: String::new(),
        outcome: None,
    })
}
