//! From the configuration that the host sends to the one that libcontainer gets.
//!
//! What libcontainer 0.7 would ignore, or get wrong, is refused here or put right; each place says which. Nothing that
//! a configuration asks for is dropped in silence.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{
    Hooks, Linux, LinuxCapabilities, LinuxResources, LinuxSeccomp, LinuxSeccompAction, PosixRlimit, Process,
    Spec,
};

use super::mounts::{self, Source};
use super::namespaces::{self, Shared};
use super::seccomp;
use super::sysctl::{self, Parameter};
use crate::cgroup::limits::Limits;
use crate::cgroup::settings;

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the configuration is no valid JSON of the OCI runtime specification")]
    Parse(#[from] serde_json::Error),
    #[error("the configuration has no {0}")]
    Missing(&'static str),
    #[error("{0} hooks are not supported: they are programs of the host, which the guest does not have")]
    Hook(&'static str),
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    #[error(transparent)]
    Namespace(#[from] namespaces::Error),
    #[error(transparent)]
    Mount(#[from] mounts::Error),
    #[error(transparent)]
    Limits(#[from] settings::Error),
    #[error(transparent)]
    Sysctl(#[from] sysctl::Error),
    #[error("rootfsPropagation {0:?} is not known")]
    Propagation(String),
    #[error("{0} is no path of a device: it begins with /dev/ and has no . or ..")]
    Device(PathBuf),
    #[error("the working directory {0} is not absolute")]
    WorkingDirectory(PathBuf),
    #[error(transparent)]
    Invalid(#[from] libcontainer::error::ErrInvalidSpec),
    #[error("invalid mount option")]
    MountOption(#[source] libcontainer::error::LibcontainerError),
}

/// What a container is made of.
#[derive(Debug)]
pub(super) struct Configuration {
    /// For libcontainer.
    pub(super) spec: Spec,
    /// For the container's cgroup.
    pub(super) limits: Limits,
    /// What it bind mounts.
    pub(super) sources: Vec<Source>,
    /// For the guest's network.
    pub(super) parameters: Vec<Parameter>,
}

/// Parses a `config.json` and makes it what libcontainer shall run.
///
/// # Errors
/// [`Error`] names what is wrong or not supported.
pub(super) fn container(
    json: &[u8],
    shared: &Shared,
    cgroup: &str,
    root: &Path,
) -> Result<Configuration, Error> {
    let mut spec: Spec = serde_json::from_slice(json)?;
    refuse_hooks(spec.hooks().as_ref())?;
    let mut process = spec.process().clone().ok_or(Error::Missing("process"))?;
    note_labels(&process);
    prepare_process(&mut process)?;
    spec.set_process(Some(process));

    let mut linux = spec.linux().clone().ok_or(Error::Missing("linux section"))?;
    let limits = prepare_linux(&mut linux, shared)?;
    let parameters = sysctl::take(&mut linux)?;
    linux.set_cgroups_path(Some(cgroup.into()));
    spec.set_linux(Some(linux));

    let mut sources = Vec::new();
    for mount in spec.mounts_mut().iter_mut().flatten() {
        sources.extend(mounts::prepare(mount)?);
    }
    let mut file_system = spec.root().clone().unwrap_or_default();
    // Its default is a read-only root, which a configuration without this section did not ask for.
    if spec.root().is_none() {
        file_system.set_readonly(Some(false));
    }
    file_system.set_path(root.to_owned());
    spec.set_root(Some(file_system));

    libcontainer::validator::Validator::validate_spec(&spec)?;
    if let Some(mounts) = spec.mounts() {
        libcontainer::utils::validate_mount_options(mounts).map_err(Error::MountOption)?;
    }
    Ok(Configuration { spec, limits, sources, parameters })
}

/// Parses the `process` of an exec and puts it into the configuration of the container that it joins, whose init has
/// process id `init`.
///
/// libcontainer's own way of joining leaves out the container's seccomp filter and its user namespace.
///
/// # Errors
/// [`Error`] names what is wrong or not supported.
pub(crate) fn joining(container: &Spec, json: &[u8], init: i32, cgroup: &str) -> Result<Spec, Error> {
    let mut process: Process = serde_json::from_slice(json)?;
    prepare_process(&mut process)?;
    let mut linux = container.linux().clone().ok_or(Error::Missing("linux section"))?;
    let namespaces = namespaces::of_process(linux.namespaces().as_deref().unwrap_or_default(), init);
    linux.set_namespaces(Some(namespaces)).set_cgroups_path(Some(cgroup.into()));
    // These belong to the container's creation; the namespaces they are about exist.
    linux.set_sysctl(None).set_uid_mappings(None).set_gid_mappings(None).set_time_offsets(None);
    let mut spec = container.clone();
    spec.set_process(Some(process))
        .set_linux(Some(linux))
        .set_mounts(None)
        .set_hostname(None)
        .set_domainname(None);
    Ok(spec)
}

/// The resource limits, taken out: the worker sets them on the process that is about to start, where they cannot get in
/// the way of libcontainer, and which needs no rights in the container's user namespace.
pub(crate) fn take_rlimits(spec: &mut Spec) -> Vec<PosixRlimit> {
    spec.process_mut()
        .as_mut()
        .and_then(|process| {
            let rlimits = process.rlimits().clone();
            process.set_rlimits(None);
            rlimits
        })
        .unwrap_or_default()
}

/// Sets `HOME` as Docker does, when it is not set or empty. It must be set: libcontainer would ask libc, which in a
/// static binary loads the image's NSS libraries.
pub(crate) fn set_home(process: &mut Process, home: &str) {
    let mut environment = process.env().clone().unwrap_or_default();
    let set = |variable: &String| variable.strip_prefix("HOME=").is_some_and(|home| !home.is_empty());
    if !environment.iter().any(set) {
        environment.retain(|variable| !variable.starts_with("HOME="));
        environment.push(format!("HOME={home}"));
    }
    process.set_env(Some(environment));
}

/// Resolves `.` and `..` by the names alone, as Docker does with a working directory.
pub(super) fn clean(path: &Path) -> PathBuf {
    let mut cleaned = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => cleaned.push(name),
            Component::ParentDir => {
                cleaned.pop();
            }
            _ => {}
        }
    }
    cleaned
}

fn prepare_process(process: &mut Process) -> Result<(), Error> {
    if process.args().as_ref().is_none_or(|args| args.first().is_none_or(String::is_empty)) {
        return Err(Error::Missing("process.args"));
    }
    process.set_apparmor_profile(None).set_selinux_label(None);
    // libcontainer takes any value for true when it decides when to load the seccomp filter, which without the flag
    // has to be while the process still has its capabilities.
    if process.no_new_privileges() == Some(false) {
        process.set_no_new_privileges(None);
    }
    // libcontainer leaves a process all capabilities whose set is not mentioned.
    let mut capabilities = process.capabilities().clone().unwrap_or_else(no_capabilities);
    let bounding = capabilities.bounding().clone().unwrap_or_default();
    let effective = capabilities.effective().clone().unwrap_or_default();
    let permitted = capabilities.permitted().clone().unwrap_or_default();
    let inheritable = capabilities.inheritable().clone().unwrap_or_default();
    let ambient = capabilities.ambient().clone().unwrap_or_default();
    capabilities.set_bounding(Some(bounding)).set_effective(Some(effective)).set_permitted(Some(permitted));
    capabilities.set_inheritable(Some(inheritable)).set_ambient(Some(ambient));
    process.set_capabilities(Some(capabilities));
    if !process.cwd().is_absolute() {
        return Err(Error::WorkingDirectory(process.cwd().clone()));
    }
    process.set_cwd(clean(process.cwd()));
    Ok(())
}

fn no_capabilities() -> LinuxCapabilities {
    let mut none = LinuxCapabilities::default();
    none.set_bounding(None).set_effective(None).set_permitted(None).set_inheritable(None).set_ambient(None);
    none
}

/// Says that labels are not put on anything. The guest has neither AppArmor nor SELinux, and engines on hosts that have
/// them label every container: a refusal would be one of all their containers.
fn note_labels(process: &Process) {
    let label = |text: &Option<String>| text.clone().filter(|text| !text.is_empty() && text != "unconfined");
    for (name, label) in [
        ("AppArmor profile", label(process.apparmor_profile())),
        ("SELinux label", label(process.selinux_label())),
    ] {
        if let Some(label) = label {
            tracing::warn!(
                "the {name} {label:?} of a container's processes is the host's: it has no effect here"
            );
        }
    }
}

fn prepare_linux(linux: &mut Linux, shared: &Shared) -> Result<Limits, Error> {
    let namespaces = namespaces::of_new(linux.namespaces().as_deref().unwrap_or_default(), shared)?;
    linux.set_namespaces(Some(namespaces));
    for (present, name) in [
        (linux.intel_rdt().is_some(), "linux.intelRdt"),
        (linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()), "linux.netDevices"),
    ] {
        if present {
            return Err(Error::Unsupported(name));
        }
    }
    // A label of SELinux: see `note_labels`.
    linux.set_mount_label(None);
    let propagation = linux.rootfs_propagation().as_deref().map_or(Ok(None), propagation)?;
    linux.set_rootfs_propagation(propagation.map(ToOwned::to_owned));
    if let Some(filter) = linux.seccomp_mut() {
        check_seccomp(filter)?;
        seccomp::answer_newer_calls(filter);
    }
    for device in linux.devices().iter().flatten() {
        // libcontainer compares the names alone.
        let path = device.path();
        if !path.starts_with("/dev") || path == Path::new("/dev") || *path != clean(path) {
            return Err(Error::Device(path.clone()));
        }
    }
    let resources = linux.resources().clone().unwrap_or_default();
    let limits = Limits::of(&resources)?;
    // Without this section libcontainer would not load its device filter, and the guest's disks would be open to anyone
    // who may make device nodes.
    let mut devices = LinuxResources::default();
    devices.set_devices(resources.devices().clone());
    linux.set_resources(Some(devices));
    Ok(limits)
}

/// What the propagation of the root is to libcontainer, which knows no recursive forms. Mounts of the guest are private, and so are the
/// container's copies of them; what is shared is shared with the namespaces that are made in the container.
fn propagation(word: &str) -> Result<Option<&'static str>, Error> {
    match word {
        "" | "private" | "rprivate" | "slave" | "rslave" => Ok(None),
        "shared" | "rshared" => Ok(Some("shared")),
        "unbindable" | "runbindable" => Ok(Some("unbindable")),
        unknown => Err(Error::Propagation(unknown.to_owned())),
    }
}

/// A filter that asks a supervisor needs one in the guest.
fn check_seccomp(seccomp: &LinuxSeccomp) -> Result<(), Error> {
    let rules = seccomp.syscalls().iter().flatten();
    let notifies = rules.map(oci_spec::runtime::LinuxSyscall::action).chain([seccomp.default_action()]);
    if seccomp.listener_path().is_some()
        || notifies.into_iter().any(|a| a == LinuxSeccompAction::ScmpActNotify)
    {
        return Err(Error::Unsupported("SCMP_ACT_NOTIFY"));
    }
    Ok(())
}

fn refuse_hooks(hooks: Option<&Hooks>) -> Result<(), Error> {
    let Some(hooks) = hooks else { return Ok(()) };
    #[allow(deprecated)]
    let prestart = hooks.prestart();
    for (name, hooks) in [
        ("prestart", prestart),
        ("createRuntime", hooks.create_runtime()),
        ("createContainer", hooks.create_container()),
        ("startContainer", hooks.start_container()),
        ("poststart", hooks.poststart()),
        ("poststop", hooks.poststop()),
    ] {
        if hooks.as_ref().is_some_and(|hooks| !hooks.is_empty()) {
            return Err(Error::Hook(name));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn minimal() -> Value {
        json!({
            "ociVersion": "1.2.0",
            "process": {"args": ["true"], "cwd": "/a/../b/./c", "user": {"uid": 0, "gid": 0}, "noNewPrivileges": false},
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "user"}]}
        })
    }

    fn prepare(spec: &Value) -> Result<Spec, Error> {
        let root = Path::new("/run/c/rootfs");
        Ok(container(spec.to_string().as_bytes(), &Vec::new(), "/bulkhead/c", root)?.spec)
    }

    #[test]
    fn what_is_not_mentioned_is_not_granted() {
        let spec = prepare(&minimal()).unwrap();
        let process = spec.process().as_ref().unwrap();
        let capabilities = process.capabilities().as_ref().unwrap();
        for set in [capabilities.bounding(), capabilities.effective(), capabilities.permitted()] {
            assert_eq!(set.as_ref().map(std::collections::HashSet::len), Some(0));
        }
        assert_eq!(process.no_new_privileges(), None);
        assert_eq!(process.cwd(), Path::new("/b/c"));
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.resources().is_some(), "libcontainer loads the device filter with the resources");
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/bulkhead/c")));
        let root = spec.root().as_ref().unwrap();
        assert_eq!((root.path().as_path(), root.readonly()), (Path::new("/run/c/rootfs"), Some(false)));
    }

    #[test]
    fn an_exec_joins_every_namespace_and_keeps_the_filter() {
        let mut container = minimal();
        container["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW"});
        let process = json!({"args": ["id"], "cwd": "/", "user": {"uid": 5, "gid": 5}}).to_string();
        let spec = joining(&prepare(&container).unwrap(), process.as_bytes(), 42, "/bulkhead/c/x").unwrap();
        let linux = spec.linux().as_ref().unwrap();
        let paths = linux.namespaces().iter().flatten().map(|namespace| namespace.path().clone().unwrap());
        let expected = ["mnt", "pid", "user"].map(|name| PathBuf::from(format!("/proc/42/ns/{name}")));
        assert_eq!(paths.collect::<Vec<_>>(), expected);
        assert!(linux.seccomp().is_some());
        assert_eq!(spec.process().as_ref().unwrap().user().uid(), 5);
    }

    #[test]
    fn limits_are_the_agents_and_devices_are_libcontainers() {
        let mut json = minimal();
        json["linux"]["resources"] =
            json!({"memory": {"limit": 4096}, "devices": [{"allow": false, "access": "rwm"}]});
        json["mounts"] = json!([{"destination": "/v", "source": "share:v", "type": "bind"}]);
        let root = Path::new("/r");
        let prepared = container(json.to_string().as_bytes(), &Vec::new(), "/bulkhead/c", root).unwrap();
        let linux = prepared.spec.linux().as_ref().unwrap();
        let resources = linux.resources().as_ref().unwrap();
        assert!(resources.memory().is_none());
        assert_eq!(resources.devices().as_ref().map(Vec::len), Some(1));
        assert_ne!(prepared.limits, Limits::default());
        assert_eq!(prepared.sources, [Source::Share("v".into())]);
    }

    #[test]
    fn labels_of_the_host_are_dropped() {
        let mut json = minimal();
        json["process"]["apparmorProfile"] = json!("cri-containerd.apparmor.d");
        json["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0");
        json["linux"]["mountLabel"] = json!("system_u:object_r:container_file_t:s0");
        let spec = prepare(&json).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!((process.apparmor_profile(), process.selinux_label()), (&None, &None));
        assert_eq!(spec.linux().as_ref().unwrap().mount_label(), &None);
    }

    #[test]
    fn propagation_is_what_libcontainer_knows() {
        for (word, expected) in [
            ("", None),
            ("private", None),
            ("rslave", None),
            ("shared", Some("shared")),
            ("rshared", Some("shared")),
            ("runbindable", Some("unbindable")),
        ] {
            let mut json = minimal();
            json["linux"]["rootfsPropagation"] = json!(word);
            let spec = prepare(&json).unwrap();
            assert_eq!(spec.linux().as_ref().unwrap().rootfs_propagation().as_deref(), expected, "{word}");
        }
        let mut json = minimal();
        json["linux"]["rootfsPropagation"] = json!("rhidden");
        assert!(prepare(&json).unwrap_err().to_string().contains("rhidden"));
    }

    #[test]
    fn parameters_of_the_guests_network_are_the_agents() {
        let mut json = minimal();
        json["linux"]["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "0"});
        let root = Path::new("/r");
        let prepared = container(json.to_string().as_bytes(), &Vec::new(), "/bulkhead/c", root).unwrap();
        assert_eq!(prepared.parameters.len(), 1);
        assert_eq!(prepared.spec.linux().as_ref().unwrap().sysctl().iter().flatten().count(), 0);
        // Those of a namespace that the container does not have are not.
        json["linux"]["sysctl"] = json!({"kernel.shmmax": "4096"});
        assert!(prepare(&json).unwrap_err().to_string().contains("kernel.shmmax"));
    }

    #[test]
    fn devices_are_below_dev() {
        for (path, good) in
            [("/dev/fuse", true), ("/dev/a/b", true), ("/dev", false), ("/dev/../etc/x", false)]
        {
            let mut json = minimal();
            json["linux"]["devices"] = json!([{"path": path, "type": "c", "major": 10, "minor": 229}]);
            assert_eq!(prepare(&json).is_ok(), good, "{path}");
        }
    }

    #[test]
    fn home_is_set_unless_it_is() {
        let home = |env: &[&str]| {
            let mut process = Process::default();
            process.set_env(Some(env.iter().map(ToString::to_string).collect()));
            set_home(&mut process, "/h");
            process.env().clone().unwrap()
        };
        assert_eq!(home(&["A=b"]), ["A=b", "HOME=/h"]);
        assert_eq!(home(&["HOME=", "A=b"]), ["A=b", "HOME=/h"]);
        assert_eq!(home(&["HOME=/x", "A=b"]), ["HOME=/x", "A=b"]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_prepared_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = container(&bytes, &Vec::new(), "/bulkhead/c", Path::new("/r"));
        }

        #[test]
        fn any_working_directory_becomes_a_clean_one(path in "(/|\\.|\\.\\.|a|b){0,12}") {
            let cleaned = clean(Path::new(&path));
            prop_assert!(cleaned.is_absolute());
            prop_assert!(cleaned.components().all(|part| !matches!(part, Component::ParentDir | Component::CurDir)));
        }
    }
}
