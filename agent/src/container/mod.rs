//! What a worker does to a container: create it, join a process to it, remove it.
//!
//! [`spec`] makes the configuration fit with [`mounts`] and [`namespaces`], [`rootfs`] mounts the root, which may be one of
//! [`shares`], as bind mounts are unless they are [`memory`], [`user`] finds out who the process is, [`program`] becomes its
//! program; between the last two, libcontainer makes and enters the namespaces and filters.

mod launch;
mod memory;
mod mounts;
pub(crate) mod namespaces;
mod program;
mod rootfs;
mod seccomp;
pub(crate) mod shares;
mod spec;
mod sysctl;
mod user;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_protocol::agent::{CreateContainerRequest, ExecProcessRequest, SharedNamespace};
use libcontainer::oci_spec::runtime::{Process, Spec};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, User as SpecUser};
use protobuf::Message as _;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

use crate::cgroup::{self, Cgroup, settings};
use crate::chain;
use crate::zygote::protocol::{Failure, FailureKind, Job};
use launch::{Launch, Membership};
use mounts::Source;
use namespaces::Shared;
use shares::Shares;
use sysctl::Parameter;

/// Where the agent keeps what belongs to containers, each in a directory of its id's name.
pub(crate) const DIRECTORY: &str = "/run/bulkhead/containers";
/// Where processes wait for their start.
pub(crate) const START_DIRECTORY: &str = "/run/bulkhead/start";

/// How long a container's last processes may take to end after they were killed.
const REMOVE_PATIENCE: Duration = Duration::from_secs(30);

/// A process that waits to be started.
pub(crate) struct Prepared {
    /// In the guest's process id namespace.
    pub(crate) pid: i32,
    /// The master of its terminal, when it was to have one.
    pub(crate) terminal: Option<OwnedFd>,
}

/// Why a container could not be made.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("decode the call")]
    Call(#[from] protobuf::Error),
    #[error(transparent)]
    Spec(#[from] spec::Error),
    #[error(transparent)]
    Rootfs(#[from] rootfs::Error),
    #[error(transparent)]
    User(#[from] user::Error),
    #[error(transparent)]
    Share(#[from] shares::Error),
    #[error(transparent)]
    Cgroup(#[from] cgroup::Error),
    #[error(transparent)]
    Limits(#[from] settings::Error),
    #[error(transparent)]
    Sysctl(#[from] sysctl::Error),
    #[error(transparent)]
    Launch(#[from] launch::Error),
    #[error("{0}")]
    File(&'static str, #[source] io::Error),
    #[error("the working directory {0} does not exist in the container")]
    WorkingDirectory(PathBuf),
    #[error("{0} namespaces are to be shared, {1} have come")]
    Namespaces(usize, usize),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Limits(error) => error.kind(),
            Error::Share(share) | Error::Rootfs(rootfs::Error::Share(share)) => match share {
                shares::Error::NoDevice | shares::Error::NoShare(_) => FailureKind::Precondition,
                shares::Error::Kind(..) => FailureKind::Invalid,
                _ => FailureKind::Internal,
            },
            Error::Rootfs(rootfs::Error::Device(device)) => match device {
                crate::guest::Error::NoSlot(_) | crate::guest::Error::NoPartition(..) => FailureKind::Invalid,
                crate::guest::Error::NoDevice(_) => FailureKind::Precondition,
                _ => FailureKind::Internal,
            },
            Error::Call(_)
            | Error::Spec(_)
            | Error::User(_)
            | Error::Sysctl(_)
            | Error::WorkingDirectory(_)
            | Error::Rootfs(
                rootfs::Error::Nothing
                | rootfs::Error::Both
                | rootfs::Error::NotDirectory(_)
                | rootfs::Error::WorkingDirectory(..),
            ) => FailureKind::Invalid,
            _ => FailureKind::Internal,
        };
        Failure::new(kind, chain(&error))
    }
}

/// Makes a container whose process waits for a connection to `start`, or nothing.
///
/// # Errors
/// What kept it from being made.
pub(crate) fn create(call: &[u8], start: &str, job: Job) -> Result<Prepared, Failure> {
    let call = CreateContainerRequest::parse_from_bytes(call).map_err(Error::Call)?;
    let id = call.container_id.clone();
    create_parts(&call, start, job).map_err(|error| {
        if let Err(failure) = remove(&id) {
            tracing::error!("clean up after container {id}: {}", failure.text);
        }
        error.into()
    })
}

fn create_parts(call: &CreateContainerRequest, start: &str, mut job: Job) -> Result<Prepared, Error> {
    let id = &call.container_id;
    let directory = Path::new(DIRECTORY).join(id);
    let cgroup = Cgroup::path(id);
    // They are open until libcontainer has joined them, at the end of this function.
    let shared = shared_namespaces(call, std::mem::take(&mut job.namespaces))?;
    let spec::Configuration { mut spec, limits, sources, parameters } =
        spec::container(&call.spec, &shared, &cgroup, &directory.join("rootfs"))?;
    take_mappings(&mut spec, &call.shared_namespaces)?;
    fs::create_dir(&directory).map_err(|error| Error::File("create the container's directory", error))?;
    shares::let_go();
    let root = rootfs::mount(&call.rootfs, &directory)?;
    rootfs::check(&root)?;
    for source in &sources {
        match source {
            Source::Share(name) => Shares::mounted()?.check(name)?,
            Source::Memory(memory) => memory.mount()?,
        }
    }
    mounts::check(spec.mounts().as_deref().unwrap_or_default(), &root).map_err(spec::Error::from)?;
    if let Some(process) = spec.process_mut() {
        set_user(process, &root, &call.user)?;
        process.set_terminal(Some(call.stdio.terminal));
    }
    let late_directory = prepare_working_directory(&mut spec, &root)?;
    save(&spec, &directory)?;
    let group = Cgroup::of(id);
    group.create()?;
    limits.apply(&group)?;
    parameters.iter().try_for_each(Parameter::set)?;
    let stdio = &call.stdio;
    let launch = Launch { id, spec, directory: &directory, cgroup, stdio, start, late_directory };
    Ok(launch.run(Membership::First, job)?)
}

/// Makes the working directory where it is to be: in the root, or in a share or memory that is mounted there to be written. One in a tmpfs
/// that libcontainer has yet to mount is returned: the process itself makes and enters it, from where that is mounted.
fn prepare_working_directory(spec: &mut Spec, root: &OwnedFd) -> Result<Option<PathBuf>, Error> {
    let path = spec.process().as_ref().map_or_else(PathBuf::new, |process| process.cwd().clone());
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let Some((mount, rest)) = mounts::covering(mounts, &path) else {
        rootfs::create_working_directory(root, &path, ResolveFlags::IN_ROOT)?;
        return Ok(None);
    };
    if rest.as_os_str().is_empty() {
        return Ok(None);
    }
    if mount.typ().as_deref() == Some("tmpfs") {
        let place = spec::clean(mount.destination());
        if let Some(process) = spec.process_mut() {
            process.set_cwd(place);
        }
        return Ok(Some(path));
    }
    if let Some(source) = mounts::writable_source(mount) {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let top = openat(CWD, source, flags, Mode::empty())
            .map_err(|error| rootfs::Error::WorkingDirectory(path, error.into()))?;
        rootfs::create_working_directory(&top, &rest, ResolveFlags::BENEATH)?;
    }
    Ok(None)
}

/// The namespaces that PID 1 has opened for a call.
fn shared_namespaces(call: &CreateContainerRequest, opened: Vec<OwnedFd>) -> Result<Shared, Error> {
    let kinds = namespaces::kinds(&call.shared_namespaces).map_err(spec::Error::from)?;
    if kinds.len() != opened.len() {
        return Err(Error::Namespaces(kinds.len(), opened.len()));
    }
    Ok(kinds.into_iter().zip(opened).collect())
}

/// A user namespace that is another container's has the ids that it was made with. One that the other has not is the guest's,
/// where this container is anyway.
fn take_mappings(spec: &mut Spec, shared: &[SharedNamespace]) -> Result<(), Error> {
    let Some(user) = shared.iter().find(|namespace| namespace.type_ == "user") else { return Ok(()) };
    let other = load(&Path::new(DIRECTORY).join(&user.container_id))?;
    if let (Some(linux), Some(other)) = (spec.linux_mut(), other.linux()) {
        linux.set_uid_mappings(other.uid_mappings().clone()).set_gid_mappings(other.gid_mappings().clone());
        let is_user = |namespace: &LinuxNamespace| namespace.typ() == LinuxNamespaceType::User;
        if !other.namespaces().iter().flatten().any(is_user) {
            let namespaces = linux.namespaces().iter().flatten();
            let rest = namespaces.filter(|namespace| !is_user(namespace)).cloned().collect();
            linux.set_namespaces(Some(rest));
        }
    }
    Ok(())
}

/// Prepares a process in a running container whose init is `init`.
///
/// # Errors
/// What kept it from being made.
pub(crate) fn exec(call: &[u8], start: &str, init: i32, job: Job) -> Result<Prepared, Failure> {
    let call = ExecProcessRequest::parse_from_bytes(call).map_err(Error::Call)?;
    Ok(exec_parts(&call, start, init, job)?)
}

fn exec_parts(call: &ExecProcessRequest, start: &str, init: i32, job: Job) -> Result<Prepared, Error> {
    let id = &call.container_id;
    let directory = Path::new(DIRECTORY).join(id);
    let container = load(&directory)?;
    let cgroup = cgroup_of(init, id)?;
    let mut spec = spec::joining(&container, &call.process, init, &cgroup)?;
    // A link of the kernel's, to the root that the container's init has.
    let root = openat(CWD, format!("/proc/{init}/root"), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| Error::File("open the container's root", error.into()))?;
    if let Some(process) = spec.process_mut() {
        set_user(process, &root, &call.user)?;
        check_working_directory(&root, process.cwd())?;
        process.set_terminal(Some(call.stdio.terminal));
    }
    let stdio = &call.stdio;
    let launch = Launch { id, spec, directory: &directory, cgroup, stdio, start, late_directory: None };
    Ok(launch.run(Membership::Joining { container: &container }, job)?)
}

/// Kills what runs in a container and removes its cgroup, its mounts and its files. What is not there is fine.
///
/// # Errors
/// What is left, and why.
pub(crate) fn remove(id: &str) -> Result<(), Failure> {
    let remove = || -> Result<(), Error> {
        let cgroup = Cgroup::of(id);
        cgroup.kill()?;
        cgroup.remove(REMOVE_PATIENCE)?;
        rootfs::remove(&Path::new(DIRECTORY).join(id))?;
        Ok(())
    };
    remove().map_err(Failure::from)
}

/// Resolves `user`, or takes the user that the process names itself, and sets `HOME`.
fn set_user(process: &mut Process, root: &OwnedFd, user: &str) -> Result<(), Error> {
    use std::os::fd::AsFd as _;

    // A process that is given by numbers needs no account files, not even readable ones.
    let accounts = match user::Accounts::read(root.as_fd()) {
        Ok(accounts) => accounts,
        Err(error) if user.is_empty() => {
            tracing::warn!("{}", chain(&error));
            user::Accounts::default()
        }
        Err(error) => return Err(error.into()),
    };
    if !user.is_empty() {
        let resolved = accounts.resolve(user)?;
        let mut holder = SpecUser::default();
        holder.set_uid(resolved.uid).set_gid(resolved.gid).set_umask(process.user().umask());
        holder.set_additional_gids(Some(resolved.additional_gids));
        process.set_user(holder);
    }
    let home = accounts.home(process.user().uid()).unwrap_or("/").to_owned();
    spec::set_home(process, &home);
    Ok(())
}

fn check_working_directory(root: &OwnedFd, path: &Path) -> Result<(), Error> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::WorkingDirectory(path.to_owned())),
    }
}

/// The cgroup that the container's init is in, which is the container's own unless it has made others below it.
fn cgroup_of(init: i32, id: &str) -> Result<String, Error> {
    let file = fs::read_to_string(format!("/proc/{init}/cgroup"));
    let file = file.map_err(|error| Error::File("find the container's cgroup", error))?;
    let own = Cgroup::path(id);
    let path = file.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or(&own);
    let below = path.strip_prefix(&own).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    Ok(if below { path.to_owned() } else { own })
}

fn save(spec: &Spec, directory: &Path) -> Result<(), Error> {
    let json =
        serde_json::to_vec(spec).map_err(|error| Error::File("encode the configuration", error.into()))?;
    fs::write(directory.join("config.json"), json)
        .map_err(|error| Error::File("save the configuration", error))
}

fn load(directory: &Path) -> Result<Spec, Error> {
    let fail = |error| Error::File("load the container's configuration", error);
    let json = fs::read(directory.join("config.json")).map_err(fail)?;
    serde_json::from_slice(&json).map_err(|error| fail(error.into()))
}
