//! From the first instruction to the point where containers can be made: file systems, cgroups, the loopback device.
//!
//! Every step here is on the path that a user waits for, so there is no system call without a need.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, IntoRawFd as _};

use bulkhead_protocol::limits::{CONTAINERS_MAX, EXECS_MAX};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::system::sysinfo;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::container::{DIRECTORY, START_DIRECTORY};
use crate::network::loopback_up;
use crate::{cgroup, rcu};

/// Three pipes and three connections a process, and room for the agent's own.
const OPEN_FILES: u64 = 6 * (CONTAINERS_MAX + EXECS_MAX) as u64 + 1024;
/// What a container's processes may have open when its configuration does not say: about what they have from a runtime that systemd
/// started. The second is the most that the kernel lets anybody have, unless it is told otherwise (`fs.nr_open`).
const CONTAINER_OPEN_FILES: Rlimit = Rlimit { current: Some(1024), maximum: Some(1 << 20) };

/// What could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("mount {what} on {target}")]
    Mount { what: &'static str, target: &'static str, source: Errno },
    #[error("bring up the loopback device")]
    Loopback(#[source] io::Error),
    #[error("read the kernel command line")]
    CommandLine(#[source] io::Error),
    #[error("expedite RCU grace periods")]
    Expedite(#[source] io::Error),
    #[error("open /dev/null as standard input and output")]
    Null(#[source] io::Error),
    #[error("stay on the first processor")]
    Processor(#[source] io::Error),
    #[error("protect the agent from the out-of-memory killer")]
    OomScore(#[source] io::Error),
    #[error("create {0}")]
    Directory(&'static str, #[source] io::Error),
    #[error("set the number of open files")]
    Limits(#[source] io::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
}

const NO_DEVICES: MountFlags = MountFlags::NODEV.union(MountFlags::NOSUID).union(MountFlags::NOEXEC);

/// What is mounted where.
const MOUNTS: [(&str, &str, MountFlags, &str); 5] = [
    ("devtmpfs", "/dev", MountFlags::NOSUID, "mode=0755"),
    ("proc", "/proc", NO_DEVICES, ""),
    ("sysfs", "/sys", NO_DEVICES, ""),
    ("tmpfs", "/run", NO_DEVICES, "mode=0755"),
    ("tmpfs", "/tmp", NO_DEVICES, "mode=1777,size=1m"),
];

/// `favordynmods` keeps a move into a cgroup, of which every container has several, from waiting for an RCU grace period:
/// up to ten milliseconds. `nsdelegate` keeps a container that has a cgroup namespace from raising its own limits.
const CGROUPS: &str = "nsdelegate,favordynmods";

/// Mounts what the agent and libcontainer need. One that the kernel or a test has mounted already is left as it is.
///
/// # Errors
/// [`Error::Mount`] with the first that fails.
pub(crate) fn mount_all() -> Result<(), Error> {
    for (what, target, flags, options) in MOUNTS {
        mount_one(what, target, flags, options)?;
    }
    // `favordynmods` itself takes one grace period.
    rcu::expedited(|| mount_one("cgroup2", cgroup::ROOT, NO_DEVICES, CGROUPS)).map_err(Error::Expedite)?
}

fn mount_one(
    what: &'static str,
    target: &'static str,
    flags: MountFlags,
    options: &str,
) -> Result<(), Error> {
    let options = (!options.is_empty()).then(|| CString::new(options).unwrap_or_default());
    match mount(what, target, what, flags, options.as_deref()) {
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(source) => Err(Error::Mount { what, target, source }),
    }
}

/// The kernel command line.
///
/// # Errors
/// [`Error::CommandLine`] when `/proc/cmdline` cannot be read.
pub(crate) fn command_line() -> Result<String, Error> {
    fs::read_to_string("/proc/cmdline").map_err(Error::CommandLine)
}

/// What has to be there before the zygote is forked: everything that containers' processes inherit or use.
///
/// # Errors
/// [`Error`] with what failed.
pub(crate) fn prepare() -> Result<(), Error> {
    // The console, if the kernel has opened one, is not for containers.
    let null = File::options().read(true).write(true).open("/dev/null").map_err(Error::Null)?;
    for standard in 0..=2 {
        // SAFETY: dup2 has no preconditions, and nothing here owns these numbers.
        if unsafe { libc::dup2(null.as_raw_fd(), standard) } < 0 {
            return Err(Error::Null(io::Error::last_os_error()));
        }
    }
    if null.as_raw_fd() <= 2 {
        // It has become a standard descriptor itself.
        let _ = null.into_raw_fd();
    }
    // Making a container is one thing after another in several processes. On one processor the next goes on when the last
    // waits; on two each step is an interrupt to a processor that sleeps, and may be a wait for a lock whose holder the host
    // has just put away. A container's own processes are let go before they start.
    let mut first = CpuSet::new();
    first.set(0);
    sched_setaffinity(None, &first).map_err(|error| Error::Processor(error.into()))?;
    fs::write("/proc/self/oom_score_adj", "-1000").map_err(Error::OomScore)?;
    set_open_files(CONTAINER_OPEN_FILES)?;
    for directory in [DIRECTORY, START_DIRECTORY] {
        fs::create_dir_all(directory).map_err(|error| Error::Directory(directory, error))?;
    }
    let info = sysinfo();
    let bytes = |units: u64| units.saturating_mul(u64::from(info.mem_unit));
    cgroup::prepare(bytes(info.totalram), bytes(info.freeram))?;
    loopback_up().map_err(Error::Loopback)
}

/// Lets the agent have the descriptors that its limits of containers and streams take. Called after the zygote was
/// forked, whose limits are those of containers.
///
/// # Errors
/// [`Error::Limits`].
pub(crate) fn raise_limits() -> Result<(), Error> {
    set_open_files(Rlimit { current: Some(OPEN_FILES), maximum: Some(OPEN_FILES) })
}

fn set_open_files(limit: Rlimit) -> Result<(), Error> {
    setrlimit(Resource::Nofile, limit).map_err(|error| Error::Limits(error.into()))
}
