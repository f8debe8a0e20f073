//! The cgroups of the guest: the agent in the root, every container below `/bulkhead`.
//!
//! The agent needs no cgroup of its own: what the parent of all containers may not have is left to it, memory and
//! process ids alike, and the kernel's root group is never limited. [`limits`] is what a container may have, as
//! [`settings`] of files; [`events`] is what the kernel tells of it.

mod events;
pub(crate) mod limits;
pub(crate) mod settings;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bulkhead_protocol::agent::IoStat;

use events::Events;

/// Where the unified hierarchy is mounted.
pub(crate) const ROOT: &str = "/sys/fs/cgroup";
/// The parent of all containers' groups, below [`ROOT`].
const PARENT: &str = "/bulkhead";

/// Process ids and memory that all containers together leave to the agent and its workers.
const RESERVED_PIDS: u64 = 256;
const RESERVED_MEMORY_MIN: u64 = 8 << 20;
const RESERVED_MEMORY_MAX: u64 = 32 << 20;

/// What could not be done with a group.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("create cgroup {0}")]
    Create(PathBuf, #[source] io::Error),
    #[error("write {1:?} to {0}")]
    Write(PathBuf, String, #[source] io::Error),
    #[error("read {0}")]
    Read(PathBuf, #[source] io::Error),
    #[error("remove cgroup {0}")]
    Remove(PathBuf, #[source] io::Error),
    #[error("processes are left in cgroup {0} although they were killed {1} seconds ago")]
    Populated(PathBuf, u64),
}

/// Makes the parent group, with all controllers that the kernel has and a limit that keeps the agent alive.
///
/// # Errors
/// [`Error`] with the file that could not be read or written.
pub(crate) fn prepare(total_memory: u64, free_memory: u64) -> Result<(), Error> {
    let root = Path::new(ROOT);
    let parent = root.join(PARENT.trim_start_matches('/'));
    let mut controllers = String::new();
    for name in read(root.join("cgroup.controllers"))?.split_ascii_whitespace() {
        controllers.push('+');
        controllers.push_str(name);
        controllers.push(' ');
    }
    write(root.join("cgroup.subtree_control"), controllers.trim_end())?;
    match fs::create_dir(&parent) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::Create(parent, error));
        }
        _ => {}
    }
    write(parent.join("cgroup.subtree_control"), controllers.trim_end())?;
    write(parent.join("memory.max"), &containers_memory(total_memory, free_memory).to_string())?;
    let threads = read("/proc/sys/kernel/threads-max".into())?;
    let threads: u64 = threads.trim().parse().unwrap_or(u64::from(u16::MAX));
    write(parent.join("pids.max"), &threads.saturating_sub(RESERVED_PIDS).max(RESERVED_PIDS).to_string())
}

/// What containers may have, in bytes: what the kernel and the agent have left so far, but for an eighth of all memory, within
/// bounds. Were it more, a container could take all memory before it reaches its own limit. The kernel would then spend its time on
/// reading the agent's code from its disk again and again, rather than kill.
fn containers_memory(total: u64, free: u64) -> u64 {
    free - (total / 8).clamp(RESERVED_MEMORY_MIN, RESERVED_MEMORY_MAX).min(free / 2)
}

/// A container's group.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    /// The group of the container with this (valid) id. It need not exist yet.
    pub(crate) fn of(container_id: &str) -> Self {
        Self { directory: Path::new(ROOT).join(&Self::path(container_id)[1..]) }
    }

    /// The same as the OCI specification's `cgroupsPath`.
    pub(crate) fn path(container_id: &str) -> String {
        format!("{PARENT}/{container_id}")
    }

    /// Makes the group. libcontainer would do it too, after it has tried to enable every controller all the way down.
    ///
    /// # Errors
    /// [`Error::Create`].
    pub(crate) fn create(&self) -> Result<(), Error> {
        fs::create_dir(&self.directory).map_err(|error| Error::Create(self.directory.clone(), error))
    }

    /// The number in a file like `memory.current`; none when there is no such file or it says `max`.
    pub(crate) fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.directory.join(file)).ok()?.trim().parse().ok()
    }

    /// The lines of a file like `cpu.stat`; empty when there is no such file.
    pub(crate) fn table(&self, file: &str) -> HashMap<String, u64> {
        parse_table(&fs::read_to_string(self.directory.join(file)).unwrap_or_default())
    }

    /// What was read and written, device by device.
    pub(crate) fn io(&self) -> Vec<IoStat> {
        let text = fs::read_to_string(self.directory.join("io.stat")).unwrap_or_default();
        text.lines().filter_map(parse_io).collect()
    }

    /// Processes that the kernel has killed for want of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        self.table("memory.events").get("oom_kill").copied().unwrap_or(0)
    }

    /// Every process in the group and in those below it, now.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        let mut directories = vec![self.directory.clone()];
        while let Some(directory) = directories.pop() {
            let processes = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
            found.extend(processes.lines().filter_map(|line| line.parse::<i32>().ok()));
            directories.extend(subdirectories(&directory));
        }
        found
    }

    /// Kills every process in the group and below, those that are being forked too (`cgroup.kill`). A group that does
    /// not exist has none.
    ///
    /// # Errors
    /// [`Error::Write`] when the kernel refuses.
    pub(crate) fn kill(&self) -> Result<(), Error> {
        match write(self.directory.join("cgroup.kill"), "1") {
            Err(Error::Write(_, _, error)) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Has every process in the group and below stop, or go on. [`Cgroup::frozen`] tells when they have.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), Error> {
        write(self.directory.join("cgroup.freeze"), if frozen { "1" } else { "0" })
    }

    /// Completes when every process in the group and below has stopped, or none is kept from going on.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub(crate) async fn frozen(&self, frozen: bool) -> Result<(), Error> {
        let events = Events::open(&self.directory, "cgroup.events")?;
        events.find(|events| (events.get("frozen") == Some(&u64::from(frozen))).then_some(())).await
    }

    /// Completes with the number of processes that the kernel has killed for want of memory, when that is more than
    /// `known`.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub(crate) async fn more_oom_kills(&self, known: u64) -> Result<u64, Error> {
        let events = Events::open(&self.directory, "memory.events")?;
        events.find(|events| events.get("oom_kill").copied().filter(|&kills| kills > known)).await
    }

    /// Removes the group and those below it, once their last process has ended. Blocks for at most `patience`.
    ///
    /// # Errors
    /// [`Error::Populated`] when processes are left after that, [`Error::Remove`] when the kernel refuses.
    pub(crate) fn remove(&self, patience: Duration) -> Result<(), Error> {
        let events = match Events::open(&self.directory, "cgroup.events") {
            Err(Error::Read(_, error)) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        if !events.wait(Instant::now() + patience, |events| events.get("populated") == Some(&0))? {
            return Err(Error::Populated(self.directory.clone(), patience.as_secs()));
        }
        remove_tree(&self.directory)
    }
}

fn remove_tree(directory: &Path) -> Result<(), Error> {
    for below in subdirectories(directory) {
        remove_tree(&below)?;
    }
    fs::remove_dir(directory).map_err(|error| Error::Remove(directory.to_owned(), error))
}

fn subdirectories(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn read(file: PathBuf) -> Result<String, Error> {
    fs::read_to_string(&file).map_err(|error| Error::Read(file, error))
}

fn write(file: PathBuf, text: &str) -> Result<(), Error> {
    write_file(&file, text).map_err(|error| Error::Write(file, text.to_owned(), error))
}

/// One `write`, as cgroup files want it; the file must be there.
fn write_file(file: &Path, text: &str) -> io::Result<()> {
    File::options().write(true).open(file)?.write_all(text.as_bytes())
}

/// Lines of a name and a number.
fn parse_table(text: &str) -> HashMap<String, u64> {
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    pairs.filter_map(|(name, value)| Some((name.to_owned(), value.trim().parse().ok()?))).collect()
}

/// A line like `254:0 rbytes=4096 wbytes=0 rios=1 ...`.
fn parse_io(line: &str) -> Option<IoStat> {
    let (device, values) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let value = |key: &str| {
        let found = values.split_ascii_whitespace().find_map(|word| word.strip_prefix(key));
        found.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    Some(IoStat {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        read_bytes: value("rbytes="),
        written_bytes: value("wbytes="),
        reads: value("rios="),
        writes: value("wios="),
        ..IoStat::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_get_what_is_free_but_for_a_reserve_within_bounds() {
        let mib = |total: u64, free: u64| containers_memory(total << 20, free << 20) >> 20;
        assert_eq!(mib(128, 100), 100 - 16);
        assert_eq!(mib(40, 33), 33 - 8);
        assert_eq!(mib(8 << 10, 8 << 10), (8 << 10) - 32);
        assert_eq!(mib(12, 10), 5);
    }

    #[test]
    fn tables_skip_what_is_not_a_number() {
        let table = parse_table("usage_usec 17\nsome avg10=0.00\npopulated 1\n");
        assert_eq!(table.len(), 2);
        assert_eq!(table["usage_usec"], 17);
        assert_eq!(table["populated"], 1);
    }

    #[test]
    fn io_is_told_by_device() {
        let io = parse_io("254:16 rbytes=100 wbytes=1 rios=3 wios=2 dbytes=0").unwrap();
        assert_eq!((io.major, io.minor), (254, 16));
        assert_eq!((io.read_bytes, io.written_bytes, io.reads, io.writes), (100, 1, 3, 2));
        assert_eq!(parse_io("some rbytes"), None);
    }
}
