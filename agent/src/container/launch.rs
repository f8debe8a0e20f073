//! The one place where libcontainer is called.

use std::fs;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::fchown;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use bulkhead_protocol::agent::Stdio;
use libcgroups::common::CgroupConfig;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::notify_socket::NotifyListener;
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::container_main_process::container_main_process;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::user_ns::UserNamespaceConfig;
use oci_spec::runtime::{PosixRlimit, PosixRlimitType, Spec};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::{CpuSet, sched_setaffinity};

use super::program::Program;
use super::{Prepared, namespaces, spec};
use crate::zygote::descriptors::receive;
use crate::zygote::protocol::Job;
use crate::{log, network};

/// Most that is shown of what libcontainer logged, in bytes.
const LOGGED_MAX: u64 = 3 << 10;

/// What could not be done around libcontainer, or by it.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("{0}")]
    Prepare(&'static str, #[source] io::Error),
    #[error("wait for the start at {0}")]
    Listen(String, #[source] libcontainer::notify_socket::NotifyListenerError),
    #[error("user namespace")]
    UserNamespace(#[from] libcontainer::user_ns::UserNamespaceError),
    #[error("state of the container")]
    State(#[from] libcontainer::error::LibcontainerError),
    #[error("{cause} ({logged})")]
    Libcontainer { cause: String, logged: String },
    #[error("set rlimit {0:?}")]
    Rlimit(PosixRlimitType, #[source] io::Error),
    #[error("the process sent no terminal")]
    NoTerminal,
}

impl From<rustix::io::Errno> for Error {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Prepare("make pipes and sockets", error.into())
    }
}

/// A process about to be made.
pub(super) struct Launch<'a> {
    pub(super) id: &'a str,
    pub(super) spec: Spec,
    pub(super) directory: &'a Path,
    pub(super) cgroup: String,
    pub(super) stdio: &'a Stdio,
    pub(super) start: &'a str,
    /// A working directory that the process itself makes and enters.
    pub(super) late_directory: Option<PathBuf>,
}

/// Whether the process makes its container or joins it.
#[derive(Clone, Copy)]
pub(super) enum Membership<'a> {
    First,
    Joining { container: &'a Spec },
}

impl Launch<'_> {
    /// Makes the process, up to the point where it waits for a connection to [`Launch::start`].
    pub(super) fn run(mut self, membership: Membership<'_>, mut job: Job) -> Result<Prepared, Error> {
        let (mut logged, log_end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map(file_and_end)?;
        log::copy_errors_to(log_end.try_clone().map_err(|error| Error::Prepare("copy a descriptor", error))?);
        let rlimits = spec::take_rlimits(&mut self.spec);
        let memlock = memlock()?;
        let placed =
            self.spec.process().as_ref().is_some_and(|process| process.exec_cpu_affinity().is_some());
        self.set_oom_score()?;
        // libcontainer leaves a process that is to have no groups those of its parent.
        // SAFETY: an empty list is read from nowhere.
        if unsafe { libc::setgroups(0, std::ptr::null()) } != 0 {
            return Err(Error::Prepare("leave all groups", io::Error::last_os_error()));
        }
        let described = match membership {
            Membership::First => &self.spec,
            Membership::Joining { container } => container,
        };
        let owner = self.owner(described);
        give_streams(&job, owner)?;

        let outcome = job.outcome.take().map_or_else(null, Ok)?;
        let streams = self.streams(&mut job)?;
        let console = if self.stdio.terminal {
            Some(socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
        } else {
            None
        };
        let (container_type, user_ns_config) = match membership {
            Membership::First => (ContainerType::InitContainer, UserNamespaceConfig::new(&self.spec)?),
            // libcontainer writes errors to this descriptor too, and closes it in the process that makes the new one.
            Membership::Joining { .. } => {
                (ContainerType::TenantContainer { exec_notify_fd: log_end.as_raw_fd() }, None)
            }
        };
        let new_network = matches!(membership, Membership::First)
            && self
                .spec
                .linux()
                .as_ref()
                .and_then(|linux| linux.namespaces().as_deref())
                .is_some_and(namespaces::has_new_network);
        let raw = |stream: &Option<OwnedFd>| stream.as_ref().map(rustix::fd::AsRawFd::as_raw_fd);
        let args = ContainerArgs {
            container_type,
            syscall: SyscallType::default(),
            rootfs: self.directory.join("rootfs"),
            console_socket: console.as_ref().map(|(_, theirs)| theirs.as_raw_fd()),
            notify_listener: NotifyListener::new(Path::new(self.start))
                .map_err(|error| Error::Listen(self.start.to_owned(), error))?,
            preserve_fds: 0,
            container: Some(Container::new(
                self.id,
                ContainerStatus::Creating,
                None,
                self.directory,
                self.directory,
            )?),
            user_ns_config,
            cgroup_config: CgroupConfig {
                cgroup_path: self.cgroup.clone().into(),
                systemd_cgroup: false,
                container_name: self.id.to_owned(),
            },
            detached: true,
            executor: Box::new(Program::new(outcome, self.late_directory.take())),
            no_pivot: false,
            stdin: raw(&streams[0]),
            stdout: raw(&streams[1]),
            stderr: raw(&streams[2]),
            as_sibling: false,
            pid_file: None,
            spec: Rc::new(self.spec),
        };
        let pid = container_main_process(&args).map_err(|error| {
            let mut bytes = Vec::new();
            // Ends in EWOULDBLOCK when everything was read: this process still has the other end.
            let _ = (&mut logged).take(LOGGED_MAX).read_to_end(&mut bytes);
            let logged = String::from_utf8_lossy(&bytes).trim_end().replace('\n', "; ");
            Error::Libcontainer { cause: crate::chain(&error), logged }
        })?;
        let pid = pid.as_raw();
        let finish = || -> Result<Prepared, Error> {
            set_rlimits(pid, &rlimits, memlock)?;
            if !placed {
                release(pid)?;
            }
            if new_network {
                network::loopback_up_of(pid)
                    .map_err(|error| Error::Prepare("bring up the container's loopback device", error))?;
            }
            let take = |(ours, _): &(OwnedFd, OwnedFd)| take_terminal(ours, self.stdio, owner);
            let terminal = console.as_ref().map(take).transpose()?;
            Ok(Prepared { pid, terminal })
        };
        finish().inspect_err(|_| {
            // SAFETY: the process is a child that has not been reaped, so the id is its.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        })
    }

    /// The agent is never chosen when memory is short (-1000), which its children inherit: a container's processes are
    /// ordinary unless their configuration says otherwise.
    fn set_oom_score(&self) -> Result<(), Error> {
        let score =
            self.spec.process().as_ref().and_then(oci_spec::runtime::Process::oom_score_adj).unwrap_or(0);
        fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(|error| Error::Prepare("set oom_score_adj", error))
    }

    /// Whose the streams are: the user's, who may then open `/dev/stdout`, as runc has it.
    fn owner(&self, container: &Spec) -> u32 {
        let uid = self.spec.process().as_ref().map_or(0, |process| process.user().uid());
        outside_uid(container, uid)
    }

    /// The three standard streams; with a terminal they come from it.
    fn streams(&self, job: &mut Job) -> Result<[Option<OwnedFd>; 3], Error> {
        if self.stdio.terminal {
            return Ok([None, None, None]);
        }
        let mut take = |n: usize| job.stdio[n].take().map_or_else(null, Ok).map(Some);
        Ok([take(0)?, take(1)?, take(2)?])
    }
}

fn give_streams(job: &Job, owner: u32) -> Result<(), Error> {
    job.stdio.iter().flatten().try_for_each(|stream| {
        fchown(stream, Some(owner), None).map_err(|error| Error::Prepare("give a stream to the user", error))
    })
}

fn file_and_end((read, write): (OwnedFd, OwnedFd)) -> (fs::File, OwnedFd) {
    (read.into(), write)
}

fn null() -> Result<OwnedFd, Error> {
    let file = fs::File::options().read(true).write(true).open("/dev/null");
    file.map(OwnedFd::from).map_err(|error| Error::Prepare("open /dev/null", error))
}

/// A user id of the container as the guest knows it.
fn outside_uid(container: &Spec, uid: u32) -> u32 {
    let mappings = container.linux().as_ref().and_then(|linux| linux.uid_mappings().as_ref());
    let Some(mappings) = mappings.filter(|mappings| !mappings.is_empty()) else { return uid };
    let inside = mappings.iter().find_map(|mapping| {
        let offset = uid.checked_sub(mapping.container_id())?;
        if offset < mapping.size() { mapping.host_id().checked_add(offset) } else { None }
    });
    // One that is not mapped cannot own anything; the kernel will refuse to become it.
    inside.unwrap_or(uid)
}

/// Takes the terminal that the process has made, and makes its other side the process's user's. That side's group stays what the file system
/// of terminals gave it.
fn take_terminal(socket: &OwnedFd, stdio: &Stdio, owner: u32) -> Result<OwnedFd, Error> {
    let (_, received) = receive(socket, &mut [0; 64])?;
    let master = received.into_iter().next().ok_or(Error::NoTerminal)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    ioctl_tiocgptpeer(&master, flags)
        .map_err(io::Error::from)
        .and_then(|side| fchown(side, Some(owner), None))
        .map_err(|error| Error::Prepare("give the terminal to the user", error))?;
    let size = |number: u32| u16::try_from(number).unwrap_or(u16::MAX);
    if stdio.rows > 0 && stdio.columns > 0 {
        let size =
            Winsize { ws_row: size(stdio.rows), ws_col: size(stdio.columns), ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&master, size)?;
    }
    Ok(master)
}

fn memlock() -> Result<libc::rlimit, Error> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: getrlimit writes one rlimit.
    match unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } {
        0 => Ok(limit),
        _ => Err(Error::Rlimit(PosixRlimitType::RlimitMemlock, io::Error::last_os_error())),
    }
}

/// Sets the limits of a process that waits to be started. libcontainer raises the one for locked memory to load its
/// device filter, and the process has inherited that: it gets the agent's own unless it is to have another.
fn set_rlimits(pid: i32, rlimits: &[PosixRlimit], memlock: libc::rlimit) -> Result<(), Error> {
    let set = |kind: PosixRlimitType, limit: libc::rlimit| {
        // SAFETY: prlimit reads one rlimit; the process is a child that has not been reaped.
        match unsafe { libc::prlimit(pid, resource(kind), &raw const limit, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(Error::Rlimit(kind, io::Error::last_os_error())),
        }
    };
    set(PosixRlimitType::RlimitMemlock, memlock)?;
    rlimits.iter().try_for_each(|limit| {
        set(limit.typ(), libc::rlimit { rlim_cur: limit.soft(), rlim_max: limit.hard() })
    })
}

/// Lets a process that waits to be started run on every processor of its cpuset, those included that are not online yet: it has
/// inherited the agent's stay on the first.
fn release(pid: i32) -> Result<(), Error> {
    let mut all = CpuSet::new();
    (0..CpuSet::MAX_CPU).for_each(|processor| all.set(processor));
    sched_setaffinity(Pid::from_raw(pid), &all)
        .map_err(|error| Error::Prepare("let the process run on every processor", error.into()))
}

fn resource(kind: PosixRlimitType) -> libc::__rlimit_resource_t {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_ids_are_mapped_as_the_user_namespace_does() {
        let spec = |json: &str| serde_json::from_str::<Spec>(json).unwrap();
        let plain = spec(r#"{"ociVersion":"1.2.0","linux":{}}"#);
        assert_eq!(outside_uid(&plain, 33), 33);
        let mapped = spec(
            r#"{"ociVersion":"1.2.0","linux":{"uidMappings":[
                {"containerID":0,"hostID":100000,"size":10},{"containerID":10,"hostID":7,"size":1}]}}"#,
        );
        assert_eq!(outside_uid(&mapped, 0), 100_000);
        assert_eq!(outside_uid(&mapped, 9), 100_009);
        assert_eq!(outside_uid(&mapped, 10), 7);
        assert_eq!(outside_uid(&mapped, 11), 11);
    }
}
