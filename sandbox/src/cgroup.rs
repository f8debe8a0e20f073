//! The host's cgroup of a sandbox (cgroup v2): what its VMM and its file server together may take.
//!
//! A container's own limits are enforced in the guest. The group bounds the machine as a whole, and has the shares, the CPUs and the disks
//! of the host that the container was given.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use nix::libc;
use nix::unistd::{ForkResult, fork};
use oci_spec::runtime::{LinuxBlockIo, LinuxResources, Spec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{geteuid, setsid};

use crate::oci;
use crate::sizing::MachineSize;

/// Where the unified hierarchy is mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// Controllers that a sandbox's group uses.
const CONTROLLERS: [&str; 4] = ["cpu", "cpuset", "io", "memory"];
/// What VMM and file server need besides the guest's memory, in MiB.
const OVERHEAD_MIB: u64 = 64;
/// The parts of the guest's memory that are needed besides it: the kernel's tables for it, and what the file server knows of the files that the
/// guest knows. That takes some 220 bytes of a file, 350 while its table grows, and the guest over a kilobyte: inode and name.
const TABLES: u64 = 256;
const FILES: u64 = 8;

/// How long a machine may take to be torn down while nobody waits.
const TEARDOWN: Duration = Duration::from_mins(1);

/// Why there is no cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A path that leaves the hierarchy.
    #[error("the cgroup path {0:?} is not valid")]
    Path(String),
    /// The host has no unified hierarchy.
    #[error("this host has no cgroup v2 at {ROOT}: boot it with the unified hierarchy")]
    NotUnified,
    /// The group cannot be made.
    #[error("cannot make the cgroup {0}")]
    Create(PathBuf, #[source] io::Error),
    /// A limit cannot be set.
    #[error("cannot write {value:?} to {file}")]
    Write {
        /// Where.
        file: PathBuf,
        /// What.
        value: String,
        /// Why.
        source: io::Error,
    },
}

/// The group of a sandbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SandboxCgroup {
    directory: PathBuf,
}

impl SandboxCgroup {
    /// Makes the group that a configuration's `cgroupsPath` names, for a machine of this size whose first container has this
    /// configuration. There is none for who is not root: only root can put processes into it.
    ///
    /// # Errors
    /// [`CgroupError`]; of what was made, nothing is left that was not there.
    pub fn make(cgroups_path: &str, size: MachineSize, spec: &Spec) -> Result<Option<Self>, CgroupError> {
        if !geteuid().is_root() {
            return Ok(None);
        }
        let group = Self::of(cgroups_path)?;
        group.create(size, spec)?;
        Ok(Some(group))
    }

    /// The group that a configuration's `cgroupsPath` names, whether it exists or not.
    ///
    /// # Errors
    /// [`CgroupError::Path`].
    pub fn of(cgroups_path: &str) -> Result<Self, CgroupError> {
        let invalid = || CgroupError::Path(cgroups_path.chars().take(256).collect());
        let relative =
            systemd(cgroups_path).unwrap_or_else(|| PathBuf::from(cgroups_path.trim_start_matches('/')));
        let mut parts = relative.components().peekable();
        if parts.peek().is_none() || !parts.all(|part| matches!(part, Component::Normal(_))) {
            return Err(invalid());
        }
        Ok(Self { directory: Path::new(ROOT).join(relative) })
    }

    /// Makes the group, and those above it, with limits.
    fn create(&self, size: MachineSize, spec: &Spec) -> Result<(), CgroupError> {
        if !Path::new(ROOT).join("cgroup.controllers").exists() {
            return Err(CgroupError::NotUnified);
        }
        let create = |e| CgroupError::Create(self.directory.clone(), e);
        if let Some(parent) = self.directory.parent() {
            fs::create_dir_all(parent).map_err(create)?;
            enable(parent);
        }
        match fs::create_dir(&self.directory) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(create(e)),
            Ok(()) | Err(_) => {}
        }
        let limited = self.limit(size, spec);
        if limited.is_err() {
            self.remove(Duration::ZERO);
        }
        limited
    }

    fn limit(&self, size: MachineSize, spec: &Spec) -> Result<(), CgroupError> {
        let mib = u64::from(size.memory_mib);
        self.write("memory.max", &((mib + mib / TABLES + mib / FILES + OVERHEAD_MIB) << 20).to_string())?;
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let resources = resources.filter(|_| !oci::is_pod_sandbox(spec));
        resources.map_or(Ok(()), |resources| self.place(resources))
    }

    /// Gives the group the shares, the CPUs and the disks of a container.
    ///
    /// # Errors
    /// [`CgroupError::Write`] when the kernel refuses, for one because the host has no such CPU or disk.
    pub fn place(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        for (file, value) in resources.block_io().iter().flat_map(disks) {
            // Weights are only for disks whose scheduler has them (iocost). Without one there is no such file.
            if file != "io.weight" || self.directory.join(file).exists() {
                self.write(file, &value)?;
            }
        }
        let Some(cpu) = resources.cpu() else { return Ok(()) };
        if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
            self.write("cpu.weight", &weight(shares).to_string())?;
        }
        for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
                self.write(file, list)?;
            }
        }
        Ok(())
    }

    /// The group's directory, by which processes are born into it.
    ///
    /// # Errors
    /// When the group does not exist.
    pub fn entrance(&self) -> io::Result<File> {
        File::open(&self.directory)
    }

    /// Processes in the group that were killed because it had no memory left.
    pub fn oom_kills(&self) -> u64 {
        let events = fs::read_to_string(self.directory.join("memory.events")).unwrap_or_default();
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills.and_then(|kills| kills.trim().parse().ok()).unwrap_or(0)
    }

    /// Kills what is in the group. A group that does not exist has nothing in it.
    pub fn kill(&self) {
        let _ = fs::write(self.directory.join("cgroup.kill"), "1");
    }

    /// Removes the group when its last process has ended; false when one is left after `patience`. A group that does not exist is fine.
    /// Blocks.
    pub fn remove(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        // Opened first, so that no change after the attempt to remove is missed.
        let mut events = File::open(self.directory.join("cgroup.events")).ok();
        loop {
            if self.is_removed() {
                return true;
            }
            let (Some(events), Some(left)) = (&mut events, until.checked_duration_since(Instant::now()))
            else {
                return false;
            };
            // The kernel tells of a change (POLLPRI) to whoever has read the file before it.
            let mut text = String::new();
            let read = events.rewind().and_then(|()| events.read_to_string(&mut text));
            if read.is_ok() && text.lines().any(|line| line == "populated 0") {
                return self.is_removed();
            }
            let timeout = Timespec::try_from(left).ok();
            let _ = poll(&mut [PollFd::new(&*events, PollFlags::PRI)], timeout.as_ref());
        }
    }

    /// True when there is no group, any more.
    fn is_removed(&self) -> bool {
        match fs::remove_dir(&self.directory) {
            Ok(()) => true,
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }

    /// Has a process of its own, which outlives this one, [`remove`](Self::remove) the group when its last process has ended, and
    /// then do what is left to do.
    ///
    /// # Errors
    /// When the system is out of processes.
    pub fn remove_later(&self, then: impl FnOnce()) -> io::Result<()> {
        // SAFETY: the child has no other thread and goes on with copies of all that this one has. It makes system calls and
        // allocates, which glibc's fork leaves possible; it takes no lock that another thread could have held, and ends without
        // running a destructor.
        match unsafe { fork() }? {
            ForkResult::Parent { .. } => Ok(()),
            ForkResult::Child => {
                // Nobody waits for the end of its output, and no terminal's signals are for it.
                let _ = setsid();
                // SAFETY: takes integers. Whatever had these descriptors is never used again.
                unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
                if self.remove(TEARDOWN) {
                    then();
                }
                // SAFETY: ends the process.
                unsafe { libc::_exit(0) }
            }
        }
    }

    fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let file = self.directory.join(file);
        fs::write(&file, value).map_err(|source| CgroupError::Write { file, value: value.into(), source })
    }
}

/// Has every group from the root down to `directory` hand the controllers on. One that cannot, because it has processes or its own
/// parent has not got them, shows when a limit is written.
fn enable(directory: &Path) {
    let relative = directory.strip_prefix(ROOT).unwrap_or(Path::new(""));
    let mut group = PathBuf::from(ROOT);
    for part in std::iter::once(Component::CurDir).chain(relative.components()) {
        group.push(part);
        let control = group.join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&control).unwrap_or_default();
        for controller in CONTROLLERS {
            if !enabled.split_ascii_whitespace().any(|name| name == controller) {
                let _ = fs::write(&control, format!("+{controller}"));
            }
        }
    }
}

/// The path that systemd gives to the scope `slice:prefix:name`: a slice's name tells those above it.
fn systemd(path: &str) -> Option<PathBuf> {
    let mut parts = path.split(':');
    let (slice, prefix, name) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() || path.starts_with('/') {
        return None;
    }
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let mut directory = PathBuf::new();
    let stem = slice.strip_suffix(".slice").unwrap_or(slice);
    if stem != "-" {
        let mut grown = String::new();
        for part in stem.split('-') {
            if !grown.is_empty() {
                grown.push('-');
            }
            grown.push_str(part);
            directory.push(format!("{grown}.slice"));
        }
    }
    directory.push(if prefix.is_empty() {
        format!("{name}.scope")
    } else {
        format!("{prefix}-{name}.scope")
    });
    Some(directory)
}

/// What limits the use of disks: each file of the group's, and what is written to it.
pub(crate) fn disks(block: &LinuxBlockIo) -> Vec<(&'static str, String)> {
    let weights = block.weight_device().iter().flatten().filter_map(|device| {
        // The scales begin with 10 and 1 and end with 1000 and 10000.
        let weight =
            1 + (u32::from(device.weight().filter(|weight| *weight > 0)?.clamp(10, 1000)) - 10) * 9999 / 990;
        Some(("io.weight", format!("{}:{} {weight}", device.major(), device.minor())))
    });
    let throttles = [
        ("rbps", block.throttle_read_bps_device()),
        ("wbps", block.throttle_write_bps_device()),
        ("riops", block.throttle_read_iops_device()),
        ("wiops", block.throttle_write_iops_device()),
    ];
    let throttles = throttles.into_iter().flat_map(|(key, devices)| {
        devices.iter().flatten().map(move |device| {
            // A rate of nothing was no limit in cgroup v1.
            let rate = if device.rate() == 0 { "max".into() } else { device.rate().to_string() };
            ("io.max", format!("{}:{} {key}={rate}", device.major(), device.minor()))
        })
    });
    weights.chain(throttles).collect()
}

/// The OCI specification's shares, 2 to 262144, as cgroup v2's weight, 1 to 10000: the formula of its conversion from v1.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_a_group_below_the_root_and_nothing_else() {
        let at = |path: &str| SandboxCgroup::of(path).map(|group| group.directory.display().to_string());
        assert_eq!(at("/default/a").unwrap(), "/sys/fs/cgroup/default/a");
        assert_eq!(at("kube/b").unwrap(), "/sys/fs/cgroup/kube/b");
        for bad in ["", "/", "/../etc", "a/../../b"] {
            assert!(at(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn systemds_names_become_its_directories() {
        let at = |path: &str| SandboxCgroup::of(path).unwrap().directory.display().to_string();
        assert_eq!(
            at("kubepods-burstable-pod1.slice:cri-containerd:x"),
            "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-x.scope"
        );
        assert_eq!(at(":docker:x"), "/sys/fs/cgroup/system.slice/docker-x.scope");
        assert_eq!(at("-.slice::x"), "/sys/fs/cgroup/x.scope");
        assert!(SandboxCgroup::of("a.slice:p:../../x").is_err());
    }

    #[test]
    fn disks_are_limited_as_the_kernel_reads_it() {
        let block = serde_json::json!({
            "weight": 10,
            "weightDevice": [{"major": 8, "minor": 0, "weight": 1000}, {"major": 8, "minor": 16, "weight": 10}],
            "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 5}],
            "throttleWriteIOPSDevice": [{"major": 8, "minor": 16, "rate": 0}],
        });
        let written = [
            ("io.weight", "8:0 10000"),
            ("io.weight", "8:16 1"),
            ("io.max", "8:0 rbps=5"),
            ("io.max", "8:16 wiops=max"),
        ];
        let block = serde_json::from_value(block).unwrap();
        assert_eq!(disks(&block), written.map(|(file, value)| (file, value.to_owned())));
    }

    #[test]
    fn shares_become_weights_from_end_to_end() {
        assert_eq!([2, 1024, 262_144].map(weight), [1, 39, 10_000]);
        assert_eq!(weight(u64::MAX), 10_000);
    }
}
