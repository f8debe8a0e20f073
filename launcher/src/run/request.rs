//! What the command line of `run` asks for, checked against the configuration and the host before anything is made.

use std::path::{Path, PathBuf};

use bulkhead_protocol::limits::HOSTNAME_MAX;
use bulkhead_sandbox::artifacts::Artifacts;
use bulkhead_sandbox::config::Config;
use bulkhead_sandbox::oci::{self, Network, SpecError};
use bulkhead_sandbox::paths::Paths;
use bulkhead_sandbox::size::Size;
use bulkhead_sandbox::sizing::{Asked, Host, MachineSize, machine_size};
use bulkhead_sandbox::storage::SCRATCH_MIN;
use oci_spec::runtime::Spec;
use rustix::process::geteuid;

use super::root::Root;
use crate::cli::{RunArgs, TimingsFormat};
use crate::container::record::{Record, new_record};
use crate::failure::Failure;
use crate::message;
use crate::spec::build::{ImageDefaults, process, spec};

/// A container that can be made.
#[derive(Debug)]
pub(crate) struct Request {
    /// Where containers are kept.
    pub(crate) paths: Paths,
    /// The configuration of this host.
    pub(crate) config: Config,
    /// What the machine is started from.
    pub(crate) artifacts: Artifacts,
    /// How large the machine is.
    pub(crate) size: MachineSize,
    /// What is run in it.
    pub(crate) workload: Workload,
    /// Size of its scratch disk; without one, it writes to memory.
    pub(crate) storage: Option<Size>,
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

/// What is run, from an image, a root or a bundle.
#[derive(Debug)]
pub(crate) struct Workload {
    /// What its root is made of.
    pub(crate) root: Root,
    /// Its configuration.
    pub(crate) spec: Spec,
    /// The directory that paths of the configuration begin from.
    pub(crate) bundle: PathBuf,
    /// The network namespace of its VMM.
    pub(crate) network: Network,
}

impl Request {
    /// Checks a command line.
    pub(crate) fn new(args: &RunArgs) -> Result<Self, Failure> {
        let config = Config::from_environment()?;
        let paths = Paths::from_environment();
        if let Some(size) = args.storage.filter(|size| *size < SCRATCH_MIN) {
            return Err(Failure::new(format!("--storage {size}: give at least {SCRATCH_MIN}")));
        }
        let mut record = new_record(args.name.as_deref())?;
        record.auto_remove = args.remove;
        let workload = if let Some(directory) = &args.bundle {
            from_bundle(args, directory, &mut record)?
        } else {
            from_image(args, &paths, &mut record)?
        };
        if args.storage.is_some() && matches!(workload.root, Root::Ext4(_)) {
            return Err(Failure::new(
                "--storage does not go with an ext4 image, whose copy is written to: leave it out",
            ));
        }
        Ok(Self {
            size: size(args, &workload.spec, &config)?,
            artifacts: Artifacts::locate(&config.paths)?,
            config,
            paths,
            workload,
            storage: args.storage,
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

fn size(args: &RunArgs, spec: &Spec, config: &Config) -> Result<MachineSize, Failure> {
    let host = Host::examine();
    let size = machine_size(spec, config, Asked { memory: args.memory, cpus: args.cpus }, host)?;
    if size.cpus > host.cpus {
        message::warn(&format!(
            "{} CPUs are more than the {} of this host: they will share them",
            size.cpus, host.cpus
        ));
    }
    Ok(size)
}

fn from_image(args: &RunArgs, paths: &Paths, record: &mut Record) -> Result<Workload, Failure> {
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
    if !(args.volume.is_empty() && args.mount.is_empty()) {
        require_root()?;
    }
    let hostname = args.hostname.as_deref().unwrap_or(&record.id);
    check_hostname(hostname)?;
    record.command = defaults.command(words)?;
    record.stop_signal = defaults.stop_signal()?;
    record.user = args.process.user.clone().unwrap_or_else(|| defaults.user.clone());
    record.process = process(args, &defaults, &record.command, hostname)?;
    let spec = spec(args, record.process.clone(), hostname)?;
    // Nobody looks for the VMM's network, and to make one takes milliseconds.
    Ok(Workload { root, spec, bundle: PathBuf::new(), network: Network::Owners })
}

fn from_bundle(args: &RunArgs, directory: &Path, record: &mut Record) -> Result<Workload, Failure> {
    if !args.words.is_empty() {
        return Err(Failure::new("a bundle says itself what to run: leave out the image and the command"));
    }
    let spec = oci::read_spec(directory)?;
    record.image = directory.display().to_string();
    record.process = spec.process().clone().ok_or(SpecError::Missing("process"))?;
    if args.process.tty != record.process.terminal().unwrap_or(false) {
        return Err(Failure::new("-t must agree with process.terminal of the bundle's config.json"));
    }
    record.command = record.process.args().clone().unwrap_or_default();
    require_root()?;
    let network = match oci::network(&spec)? {
        Network::New => Network::Owners,
        network => network,
    };
    Ok(Workload { root: Root::Bundle, spec, bundle: directory.to_owned(), network })
}

/// The kernel lets nobody else make a mount of what is shared.
fn require_root() -> Result<(), Failure> {
    if geteuid().is_root() {
        return Ok(());
    }
    Err(Failure::new("only root can share files of the host with a container: run this as root"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostnames_that_would_not_be_one_are_refused() {
        for bad in ["", "a b", "a/b", "a\n", &"x".repeat(65)] {
            assert!(check_hostname(bad).is_err(), "{bad:?}");
        }
        check_hostname("web-1.example").unwrap();
    }
}
