//! What the command line of `run` asks for, checked against the configuration and the host before anything is made.

use std::path::{Path, PathBuf};

use bulkhead_protocol::limits::HOSTNAME_MAX;
use bulkhead_sandbox::artifacts::Artifacts;
use bulkhead_sandbox::config::{Config, Defaults, Uids};
use bulkhead_sandbox::paths::Paths;
use bulkhead_sandbox::size::Size;
use bulkhead_sandbox::sizing::host_cpus;
use bulkhead_sandbox::storage::SCRATCH_MIN;
use bulkhead_vmm::arch::layout::VCPUS_MAX;
use bulkhead_vmm::memory::MEMORY_MIN_MIB;
use rustix::system::sysinfo;

use super::root::Root;
use crate::cli::{RunArgs, TimingsFormat};
use crate::container::record::{Record, new_record};
use crate::failure::Failure;
use crate::message;
use crate::spec::build::{ImageDefaults, process, spec};
use crate::spec::bundle::Bundle;

/// A container that can be made.
#[derive(Debug)]
pub(crate) struct Request {
    /// Where containers are kept.
    pub(crate) paths: Paths,
    /// What the machine is started from.
    pub(crate) artifacts: Artifacts,
    /// KVM's device.
    pub(crate) kvm: PathBuf,
    /// Whom its VMM may run as.
    pub(crate) uids: Uids,
    /// The machine.
    pub(crate) machine: Machine,
    /// What its root is made of.
    pub(crate) root: Root,
    /// Size of its scratch disk; without one, it writes to memory.
    pub(crate) storage: Option<Size>,
    /// Its `config.json`.
    pub(crate) spec: Vec<u8>,
    /// What is written down of it.
    pub(crate) record: Record,
    /// Its name was wanted, and must not be another's.
    pub(crate) named: bool,
    /// It has a terminal.
    pub(crate) terminal: bool,
    /// It has input.
    pub(crate) interactive: bool,
    /// Show where the time went.
    pub(crate) timings: Option<TimingsFormat>,
}

/// The size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    /// Its memory in MiB.
    pub(crate) memory_mib: u32,
    /// Its CPUs.
    pub(crate) cpus: u8,
}

impl Request {
    /// Checks a command line.
    pub(crate) fn new(args: &RunArgs) -> Result<Self, Failure> {
        let config = Config::from_environment()?;
        let paths = Paths::from_environment();
        let machine = Machine::new(args.cpus, args.memory, config.defaults, &Host::examine())?;
        if let Some(size) = args.storage.filter(|size| *size < SCRATCH_MIN) {
            return Err(Failure::new(format!("--storage {size}: give at least {SCRATCH_MIN}")));
        }
        let mut record = new_record(args.name.as_deref())?;
        record.auto_remove = args.remove;
        let (root, spec) = if let Some(directory) = &args.bundle {
            from_bundle(args, directory, &mut record)?
        } else {
            from_image(args, &paths, &mut record)?
        };
        if args.storage.is_some() && matches!(root, Root::Ext4(_)) {
            return Err(Failure::new(
                "--storage does not go with an ext4 image, whose copy is written to: leave it out",
            ));
        }
        Ok(Self {
            artifacts: Artifacts::locate(&config.paths)?,
            kvm: config.paths.kvm,
            uids: config.uids,
            paths,
            machine,
            root,
            storage: args.storage,
            spec,
            named: args.name.is_some(),
            terminal: record.process.terminal().unwrap_or(false),
            record,
            interactive: args.process.interactive,
            timings: args.timings,
        })
    }

    /// Whether the container's output is kept. What is removed at its end and seen by the user meanwhile is not.
    pub(crate) fn keeps_log(&self, seen: bool) -> bool {
        !(self.record.auto_remove && seen)
    }
}

fn from_image(args: &RunArgs, paths: &Paths, record: &mut Record) -> Result<(Root, Vec<u8>), Failure> {
    let mut words = &args.words[..];
    let (root, defaults) = if let Some(path) = &args.rootfs {
        record.image = path.display().to_string();
        (Root::from_path(path)?, ImageDefaults::default())
    } else {
        let [image, rest @ ..] = words else {
            return Err(Failure::new("run what? Give an image, or a root with --rootfs or --bundle"));
        };
        record.image.clone_from(image);
        words = rest;
        Root::from_image(paths, image)?
    };
    if let [first, rest @ ..] = words
        && first == "--"
    {
        words = rest;
    }
    let hostname = args.hostname.as_deref().unwrap_or(&record.id);
    check_hostname(hostname)?;
    record.command = defaults.command(words)?;
    record.stop_signal = defaults.stop_signal()?;
    record.user = args.process.user.clone().unwrap_or_else(|| defaults.user.clone());
    record.process = process(args, &defaults, &record.command, hostname)?;
    let spec = spec(args, record.process.clone(), hostname)?;
    Ok((root, serde_json::to_vec(&spec)?))
}

fn from_bundle(args: &RunArgs, directory: &Path, record: &mut Record) -> Result<(Root, Vec<u8>), Failure> {
    if !args.words.is_empty() {
        return Err(Failure::new("a bundle says itself what to run: leave out the image and the command"));
    }
    let bundle = Bundle::read(directory)?;
    record.image = directory.display().to_string();
    record.process = bundle.spec.process().clone().unwrap_or_default();
    if args.process.tty != record.process.terminal().unwrap_or(false) {
        return Err(Failure::new("-t must agree with process.terminal of the bundle's config.json"));
    }
    record.command = record.process.args().clone().unwrap_or_default();
    Ok((Root::Directory(bundle.root), bundle.json))
}

fn check_hostname(name: &str) -> Result<(), Failure> {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    if (1..=HOSTNAME_MAX).contains(&name.len()) && name.bytes().all(good) {
        return Ok(());
    }
    Err(Failure::new(format!(
        "the hostname must be 1 to {HOSTNAME_MAX} letters, digits, '-' or '.': give another with --hostname"
    )))
}

/// What bounds a machine.
#[derive(Debug)]
struct Host {
    memory: Size,
    cpus: u8,
}

impl Host {
    fn examine() -> Self {
        let info = sysinfo();
        let memory = u64::from(info.mem_unit).saturating_mul(info.totalram);
        Self { memory: Size(memory), cpus: host_cpus() }
    }
}

impl Machine {
    fn new(
        cpus: Option<u32>,
        memory: Option<Size>,
        defaults: Defaults,
        host: &Host,
    ) -> Result<Self, Failure> {
        // The default is for hosts that have so many.
        let wanted = cpus.unwrap_or_else(|| u32::from(defaults.cpus).min(host.cpus.into()));
        let cpus = u8::try_from(wanted).ok().filter(|cpus| (1..=VCPUS_MAX).contains(cpus));
        let Some(cpus) = cpus else {
            return Err(Failure::new(format!("--cpus {wanted}: give 1 to {VCPUS_MAX}")));
        };
        if cpus > host.cpus {
            message::warn(&format!(
                "{cpus} CPUs are more than the {} of this host: they will share them",
                host.cpus
            ));
        }
        let memory = memory.unwrap_or(defaults.memory);
        let least = Size(u64::from(MEMORY_MIN_MIB) << 20);
        if memory < least {
            return Err(Failure::new(format!("--memory {memory}: a virtual machine needs at least {least}")));
        }
        if memory > host.memory {
            return Err(Failure::new(format!(
                "--memory {memory}: this host has {} in all; give less",
                host.memory
            )));
        }
        let memory_mib = u32::try_from(memory.mib_rounded_up())?;
        Ok(Self { memory_mib, cpus })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Host = Host { memory: Size(8 << 30), cpus: 4 };

    fn machine(cpus: Option<u32>, memory: Option<u64>) -> Result<Machine, Failure> {
        Machine::new(cpus, memory.map(Size), Defaults::default(), &HOST)
    }

    #[test]
    fn a_machine_has_the_configured_size_unless_another_is_asked() {
        assert_eq!(machine(None, None).unwrap(), Machine { memory_mib: 1024, cpus: 2 });
        let asked = machine(Some(4), Some((512 << 20) + 1)).unwrap();
        assert_eq!(asked, Machine { memory_mib: 513, cpus: 4 });
    }

    #[test]
    fn more_cpus_than_the_host_has_are_allowed_but_neither_none_nor_too_many() {
        assert_eq!(machine(Some(8), None).unwrap().cpus, 8);
        for cpus in [0, 33, 256, 257, u32::MAX] {
            assert!(machine(Some(cpus), None).unwrap_err().to_string().contains("1 to 32"), "{cpus}");
        }
    }

    #[test]
    fn memory_below_the_floor_or_beyond_the_host_is_refused() {
        assert!(machine(None, Some((64 << 20) - 1)).unwrap_err().to_string().contains("at least 64 MiB"));
        assert_eq!(machine(None, Some(64 << 20)).unwrap().memory_mib, 64);
        assert!(machine(None, Some((8 << 30) + 1)).unwrap_err().to_string().contains("8 GiB in all"));
    }

    #[test]
    fn hostnames_that_would_not_be_one_are_refused() {
        for bad in ["", "a b", "a/b", "a\n", &"x".repeat(65)] {
            assert!(check_hostname(bad).is_err(), "{bad:?}");
        }
        check_hostname("web-1.example").unwrap();
    }
}
