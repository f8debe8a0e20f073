//! The table of containers and their processes, and the reaper that fills in how they ended.
//!
//! A process is known by its id before it can be reaped (see `zygote::Zygote::run`), so no exit is missed. The table is
//! locked for the moment of a look-up or a change, never while something is waited for.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bulkhead_protocol::limits::{CONTAINERS_MAX, EXECS_MAX};
use rustix::io::Errno;
use rustix::process::{WaitOptions, wait};
use rustix::time::ClockId;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::cgroup::Cgroup;
use crate::lifecycle::Start;
use crate::streams::Streams;
use crate::{chain, guest};

/// Why the table has nothing, or no place.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Error {
    #[error("container {0} does not exist")]
    NoContainer(String),
    #[error("container {0} has no process {1:?}")]
    NoProcess(String, String),
    #[error("container {0} exists")]
    ContainerExists(String),
    #[error("container {0} has a process {1} that has not ended")]
    ProcessExists(String, String),
    #[error("there are {0} already, the most that a guest may have")]
    Full(&'static str),
    #[error("container {0} is {1}")]
    State(String, State),
    #[error("container {0} is paused")]
    Paused(String),
    #[error("process {1:?} of container {0} has ended")]
    Ended(String, String),
}

/// Where in its life a container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Creating,
    Created,
    /// Its process has been told to start, and has not yet executed its program.
    Starting,
    Running,
    Stopped,
    Removing,
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Creating => "being created",
            Self::Created => "created, not started",
            Self::Starting => "being started",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Removing => "being removed",
        })
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 128 + n for a process that signal n ended.
    pub(crate) status: u32,
    /// Nanoseconds since 1970.
    pub(crate) at_ns: u64,
    /// The kernel has killed a process of the container for want of memory.
    pub(crate) oom_killed: bool,
}

/// A process of a container: its init, or one that an exec made.
pub(crate) struct Process {
    pub(crate) streams: Arc<Streams>,
    pid: OnceLock<i32>,
    start: Mutex<Option<Start>>,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    pub(crate) fn new(streams: Streams) -> Arc<Self> {
        Arc::new(Self {
            streams: Arc::new(streams),
            pid: OnceLock::new(),
            start: Mutex::new(None),
            exit: watch::Sender::new(None),
        })
    }

    /// Its id in the guest, once it has one.
    pub(crate) fn pid(&self) -> Option<i32> {
        self.pid.get().copied()
    }

    /// What starts it, which can be taken once.
    pub(crate) fn take_start(&self) -> Option<Start> {
        self.start.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// How it ended, when it has.
    pub(crate) async fn wait(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        loop {
            if let Some(exit) = *exit.borrow_and_update() {
                return exit;
            }
            // The sender is `self`, so this cannot fail while somebody waits.
            let _ = exit.changed().await;
        }
    }

    /// Sends a signal. Its id is its own until it has been reaped, which happens on the thread that calls this.
    ///
    /// # Errors
    /// What the kernel said.
    pub(crate) fn signal(&self, signal: i32) -> io::Result<()> {
        let Some(pid) = self.pid().filter(|_| self.ended().is_none()) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        // SAFETY: kill has no preconditions; `pid` is a positive number.
        if unsafe { libc::kill(pid, signal) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

struct Container {
    state: State,
    /// Whether a running container's processes are kept from going on.
    paused: bool,
    /// Ends the creation when it becomes true.
    stop: watch::Sender<bool>,
    /// Closed with the container.
    existence: watch::Sender<()>,
    init: Arc<Process>,
    execs: HashMap<String, Arc<Process>>,
}

/// Who a process id belongs to; an empty exec is the container's init.
struct Owner {
    container: String,
    exec: String,
    process: Arc<Process>,
}

#[derive(Default)]
struct Entries {
    containers: HashMap<String, Container>,
    owners: HashMap<i32, Owner>,
}

/// All containers of the guest.
#[derive(Default)]
pub(crate) struct Table(Mutex<Entries>);

impl Table {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True when there is no container, not even one that is being created.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().containers.is_empty()
    }

    /// Takes a place for a container that is about to be created. The receiver tells when that shall stop.
    ///
    /// # Errors
    /// [`Error::ContainerExists`] or [`Error::Full`].
    pub(crate) fn reserve(&self, id: &str, init: Arc<Process>) -> Result<watch::Receiver<bool>, Error> {
        let mut entries = self.lock();
        if entries.containers.contains_key(id) {
            return Err(Error::ContainerExists(id.to_owned()));
        }
        if entries.containers.len() >= CONTAINERS_MAX {
            return Err(Error::Full("containers"));
        }
        let (stop, stopped) = watch::channel(false);
        let container = Container {
            state: State::Creating,
            paused: false,
            stop,
            existence: watch::Sender::new(()),
            init,
            execs: HashMap::new(),
        };
        entries.containers.insert(id.to_owned(), container);
        Ok(stopped)
    }

    /// Takes a place for a process that is about to join a running container. One that has ended makes way.
    ///
    /// # Errors
    /// [`Error::State`] when the container is not running, [`Error::Paused`], [`Error::ProcessExists`] or [`Error::Full`].
    pub(crate) fn reserve_exec(&self, id: &str, exec: &str, process: Arc<Process>) -> Result<i32, Error> {
        let mut entries = self.lock();
        let living = |container: &Container| container.execs.values().filter(|p| p.ended().is_none()).count();
        let execs: usize = entries.containers.values().map(living).sum();
        let container = entries.containers.get_mut(id).ok_or_else(|| Error::NoContainer(id.to_owned()))?;
        let (State::Running, Some(init)) = (container.state, container.init.pid()) else {
            return Err(Error::State(id.to_owned(), container.state));
        };
        if container.paused {
            return Err(Error::Paused(id.to_owned()));
        }
        if container.execs.get(exec).is_some_and(|process| process.ended().is_none()) {
            return Err(Error::ProcessExists(id.to_owned(), exec.to_owned()));
        }
        if execs >= EXECS_MAX {
            return Err(Error::Full("processes"));
        }
        // How a process ended is kept for who may still ask, but not for ever.
        if container.execs.len() >= EXECS_MAX {
            container.execs.retain(|_, process| process.ended().is_none());
        }
        container.execs.insert(exec.to_owned(), process);
        Ok(init)
    }

    /// Notes the id of a process for which there is a place. To be called before the process can be reaped.
    pub(crate) fn born(&self, id: &str, exec: &str, process: &Arc<Process>, pid: i32, start: Start) {
        let mut entries = self.lock();
        process.start.lock().unwrap_or_else(PoisonError::into_inner).replace(start);
        // A process is born once.
        let _ = process.pid.set(pid);
        if exec.is_empty()
            && let Some(container) = entries.containers.get_mut(id)
        {
            container.state = State::Created;
        }
        let owner = Owner { container: id.to_owned(), exec: exec.to_owned(), process: Arc::clone(process) };
        entries.owners.insert(pid, owner);
    }

    /// Gives back the place of a container, or of a process in one, that was not made or is no more.
    pub(crate) fn forget(&self, id: &str, exec: &str) {
        let mut entries = self.lock();
        if exec.is_empty() {
            entries.containers.remove(id);
        } else if let Some(container) = entries.containers.get_mut(id) {
            container.execs.remove(exec);
        }
    }

    /// A process.
    ///
    /// # Errors
    /// [`Error::NoContainer`] or [`Error::NoProcess`].
    pub(crate) fn process(&self, id: &str, exec: &str) -> Result<Arc<Process>, Error> {
        let entries = self.lock();
        let container = entries.containers.get(id).ok_or_else(|| Error::NoContainer(id.to_owned()))?;
        if exec.is_empty() {
            return Ok(Arc::clone(&container.init));
        }
        let process = container.execs.get(exec);
        process.cloned().ok_or_else(|| Error::NoProcess(id.to_owned(), exec.to_owned()))
    }

    /// Where in its life a container is.
    ///
    /// # Errors
    /// [`Error::NoContainer`].
    pub(crate) fn state(&self, id: &str) -> Result<State, Error> {
        let entries = self.lock();
        let container = entries.containers.get(id).ok_or_else(|| Error::NoContainer(id.to_owned()))?;
        Ok(container.state)
    }

    /// Moves a container from one of `from` on to `to`, and returns the state it was in.
    ///
    /// # Errors
    /// [`Error::State`] when it is in another one.
    pub(crate) fn advance(&self, id: &str, from: &[State], to: State) -> Result<State, Error> {
        let mut entries = self.lock();
        let container = entries.containers.get_mut(id).ok_or_else(|| Error::NoContainer(id.to_owned()))?;
        if !from.contains(&container.state) {
            return Err(Error::State(id.to_owned(), container.state));
        }
        Ok(std::mem::replace(&mut container.state, to))
    }

    /// Makes sure that a container is in one of `states`.
    ///
    /// # Errors
    /// [`Error::State`] when it is not.
    pub(crate) fn require(&self, id: &str, states: &[State]) -> Result<(), Error> {
        let state = self.state(id)?;
        if states.contains(&state) { Ok(()) } else { Err(Error::State(id.to_owned(), state)) }
    }

    /// Notes that a running container is being paused, or goes on.
    ///
    /// # Errors
    /// [`Error::State`] when it is not running.
    pub(crate) fn set_paused(&self, id: &str, paused: bool) -> Result<(), Error> {
        self.require(id, &[State::Running])?;
        if let Some(container) = self.lock().containers.get_mut(id) {
            container.paused = paused;
        }
        Ok(())
    }

    /// Completes when a container has been removed.
    ///
    /// # Errors
    /// [`Error::NoContainer`] when there is none now.
    pub(crate) fn removal(&self, id: &str) -> Result<impl Future<Output = ()> + use<>, Error> {
        let entries = self.lock();
        let container = entries.containers.get(id).ok_or_else(|| Error::NoContainer(id.to_owned()))?;
        let mut existence = container.existence.subscribe();
        // Nothing is ever sent: this ends with the sender.
        Ok(async move { while existence.changed().await.is_ok() {} })
    }

    /// What stops the creation of a container: it becomes true, and is closed when the creation has come to its end.
    ///
    /// # Errors
    /// [`Error::NoContainer`].
    pub(crate) fn stop_of_creation(&self, id: &str) -> Result<watch::Sender<bool>, Error> {
        let entries = self.lock();
        let container = entries.containers.get(id).ok_or_else(|| Error::NoContainer(id.to_owned()))?;
        Ok(container.stop.clone())
    }

    /// Notes how a process ended. One that belongs to no container was an orphan, and is nobody's business.
    fn ended(&self, pid: i32, status: u32) {
        let Some(owner) = self.lock().owners.remove(&pid) else { return };
        let cgroup = Cgroup::of(&owner.container);
        if owner.exec.is_empty() {
            // Without a process id namespace of its own, the others would go on.
            if let Err(error) = cgroup.kill() {
                tracing::error!("kill what container {} leaves: {}", owner.container, chain(&error));
            }
            let mut entries = self.lock();
            if let Some(container) = entries.containers.get_mut(&owner.container)
                && Arc::ptr_eq(&container.init, &owner.process)
                && container.state != State::Removing
            {
                container.state = State::Stopped;
                container.paused = false;
            }
        }
        let at_ns = guest::nanoseconds(ClockId::Realtime);
        let exit = Exit { status, at_ns, oom_killed: cgroup.oom_kills() > 0 };
        owner.process.exit.send_replace(Some(exit));
        owner.process.streams.process_ended();
    }
}

/// Reaps every child of PID 1, for ever: containers' processes, and orphans that the kernel gave to it.
///
/// # Errors
/// When children can no longer be waited for.
pub(crate) async fn reap(table: &Table, zygote: i32) -> io::Error {
    let mut children = match signal(SignalKind::child()) {
        Ok(children) => children,
        Err(error) => return error,
    };
    loop {
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, _))) if pid.as_raw_nonzero().get() == zygote => {
                    return io::Error::other("the zygote has ended");
                }
                Ok(Some((pid, status))) => {
                    let code = status.exit_status().or_else(|| status.terminating_signal().map(|n| 128 + n));
                    table.ended(pid.as_raw_nonzero().get(), code.unwrap_or(255).unsigned_abs());
                }
                Ok(None) | Err(Errno::CHILD) => break,
                Err(Errno::INTR) => {}
                Err(error) => return error.into(),
            }
        }
        if children.recv().await.is_none() {
            return io::Error::other("no more signals");
        }
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::agent::Stdio;

    use super::*;
    use crate::descriptor::nonblocking;

    fn run(test: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
    }

    fn process() -> Arc<Process> {
        Process::new(Streams::new(&Stdio::default()).unwrap().0)
    }

    fn start() -> Start {
        let (read, _) = rustix::pipe::pipe().unwrap();
        Start::new(String::new(), nonblocking(read).unwrap())
    }

    fn running(table: &Table, id: &str, pid: i32) -> Arc<Process> {
        let init = process();
        table.reserve(id, Arc::clone(&init)).unwrap();
        table.born(id, "", &init, pid, start());
        table.advance(id, &[State::Created], State::Running).unwrap();
        init
    }

    #[test]
    fn the_end_of_a_process_reaches_all_who_wait() {
        run(async {
            let table = Table::default();
            let init = running(&table, "c", 1_000_001);
            table.ended(1_000_002, 9);
            assert_eq!(init.ended(), None, "an orphan is nobody's");
            let (first, second, ()) =
                tokio::join!(init.wait(), init.wait(), async { table.ended(1_000_001, 137) });
            assert_eq!((first.status, second.status), (137, 137));
            assert_eq!(init.wait().await.status, 137, "late ones learn it too");
            assert_eq!(table.state("c"), Ok(State::Stopped));
        });
    }

    #[test]
    fn ids_are_free_when_their_owner_has_ended() {
        run(async {
            let table = Table::default();
            running(&table, "c", 1_000_001);
            assert_eq!(table.reserve("c", process()).err(), Some(Error::ContainerExists("c".into())));
            let first = process();
            assert_eq!(table.reserve_exec("c", "x", Arc::clone(&first)), Ok(1_000_001));
            table.born("c", "x", &first, 1_000_002, start());
            assert!(matches!(table.reserve_exec("c", "x", process()), Err(Error::ProcessExists(..))));
            table.ended(1_000_002, 0);
            assert_eq!(table.state("c"), Ok(State::Running), "an exec is not the container");
            assert_eq!(table.reserve_exec("c", "x", process()), Ok(1_000_001));
            table.forget("c", "");
            assert_eq!(table.process("c", "x").err(), Some(Error::NoContainer("c".into())));
        });
    }

    #[test]
    fn a_container_that_is_not_running_takes_no_execs() {
        run(async {
            let table = Table::default();
            let _stop = table.reserve("c", process()).unwrap();
            let refused = Err(Error::State("c".into(), State::Creating));
            assert_eq!(table.reserve_exec("c", "x", process()), refused);
            assert!(matches!(table.advance("c", &[State::Created], State::Starting), Err(Error::State(..))));
        });
    }

    #[test]
    fn a_paused_container_takes_no_execs_until_it_goes_on() {
        run(async {
            let table = Table::default();
            running(&table, "c", 1_000_001);
            table.set_paused("c", true).unwrap();
            assert_eq!(table.reserve_exec("c", "x", process()), Err(Error::Paused("c".into())));
            table.set_paused("c", false).unwrap();
            assert_eq!(table.reserve_exec("c", "x", process()), Ok(1_000_001));
            table.ended(1_000_001, 0);
            assert_eq!(table.set_paused("c", true), Err(Error::State("c".into(), State::Stopped)));
        });
    }

    #[test]
    fn who_waits_for_a_removal_learns_of_it() {
        run(async {
            let table = Table::default();
            assert!(table.removal("c").is_err());
            running(&table, "c", 1_000_001);
            let (first, second) = (table.removal("c").unwrap(), table.removal("c").unwrap());
            table.ended(1_000_001, 0);
            tokio::join!(first, second, async { table.forget("c", "") });
        });
    }

    #[test]
    fn the_places_are_counted() {
        run(async {
            let table = Table::default();
            let stops: Vec<_> =
                (0..CONTAINERS_MAX).map(|n| table.reserve(&n.to_string(), process()).unwrap()).collect();
            assert_eq!(table.reserve("one-more", process()).err(), Some(Error::Full("containers")));
            drop(stops);
        });
    }
}
