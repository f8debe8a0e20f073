//! What a bundle's `config.json` says about the machine that its container needs.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use bulkhead_protocol::limits::SPEC_MAX;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

/// Annotations that name the pod of a container, in the order in which they count: the one that containerd's own runtime has for
/// anybody, Kubernetes' as containerd and as CRI-O write it.
const GROUPS: [&str; 3] =
    ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID"];
/// Annotations that tell what a container is to its pod.
const CONTAINER_TYPES: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("cannot read the bundle's {0}")]
    Read(PathBuf, #[source] io::Error),
    /// The file is too long.
    #[error("the bundle's {0} has more than {SPEC_MAX} bytes")]
    Long(PathBuf),
    /// The file is no configuration.
    #[error("the bundle's {0} is no configuration of the OCI runtime specification")]
    Parse(PathBuf, #[source] serde_json::Error),
    /// The configuration lacks a part.
    #[error("the bundle's configuration has no {0}")]
    Missing(&'static str),
    /// The host's network is asked for.
    #[error(
        "the container is to use the network of the host, which a virtual machine cannot: give it a network namespace, or run it \
         with another runtime"
    )]
    HostNetwork,
}

/// The network namespace that a machine's VMM lives in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// That of its owner. It can do nothing with it.
    Owners,
    /// One of its own.
    New,
    /// One that somebody has made.
    Path(PathBuf),
}

/// Reads a bundle's `config.json`.
///
/// # Errors
/// [`SpecError`] when it is missing, too long or not valid.
pub fn read_spec(bundle: &Path) -> Result<Spec, SpecError> {
    let path = bundle.join("config.json");
    let mut json = Vec::new();
    let read = File::open(&path).and_then(|file| file.take(SPEC_MAX as u64 + 1).read_to_end(&mut json));
    if let Err(error) = read {
        return Err(SpecError::Read(path, error));
    }
    if json.len() > SPEC_MAX {
        return Err(SpecError::Long(path));
    }
    serde_json::from_slice(&json).map_err(|error| SpecError::Parse(path, error))
}

/// The network namespace that a configuration asks for.
///
/// # Errors
/// [`SpecError::HostNetwork`] when it is the host's.
pub fn network(spec: &Spec) -> Result<Network, SpecError> {
    let linux = spec.linux().as_ref().ok_or(SpecError::Missing("linux section"))?;
    let mut namespaces = linux.namespaces().iter().flatten();
    let network = namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
    match network.ok_or(SpecError::HostNetwork)?.path() {
        Some(path) if !path.as_os_str().is_empty() => Ok(Network::Path(path.clone())),
        _ => Ok(Network::New),
    }
}

/// The host's cgroup that a configuration names.
pub fn cgroups_path(spec: &Spec) -> Option<&str> {
    spec.linux().as_ref()?.cgroups_path().as_ref()?.to_str()
}

/// The pod that a container belongs to: that of its annotations, otherwise one of its own.
pub fn group(spec: &Spec, own_id: &str) -> String {
    let group = GROUPS.iter().find_map(|name| annotation(spec, name));
    group.unwrap_or(own_id).to_owned()
}

/// True for the container that only keeps a Kubernetes pod's namespaces: what it asks for itself says nothing of the pod.
pub fn is_pod_sandbox(spec: &Spec) -> bool {
    CONTAINER_TYPES.iter().any(|name| annotation(spec, name) == Some("sandbox"))
}

/// The value of an annotation that is there and not empty.
pub fn annotation<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    let annotations: &HashMap<String, String> = spec.annotations().as_ref()?;
    annotations.get(name).map(String::as_str).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(value: &Value) -> Spec {
        serde_json::from_value(value.clone()).unwrap()
    }

    #[test]
    fn a_bundle_without_a_valid_configuration_is_refused_by_the_files_name() {
        let bundle = tempfile::tempdir().unwrap();
        let error = read_spec(bundle.path()).unwrap_err();
        assert!(matches!(&error, SpecError::Read(path, _) if path.ends_with("config.json")), "{error}");
        std::fs::write(bundle.path().join("config.json"), "{").unwrap();
        assert!(matches!(read_spec(bundle.path()), Err(SpecError::Parse(..))));
        std::fs::write(bundle.path().join("config.json"), " ".repeat(SPEC_MAX + 1)).unwrap();
        assert!(matches!(read_spec(bundle.path()), Err(SpecError::Long(_))));
    }

    #[test]
    fn the_network_is_a_new_one_or_one_with_a_path_but_never_the_hosts() {
        let with = |namespaces: Value| {
            network(&spec(&json!({"ociVersion": "1.2.0", "linux": {"namespaces": namespaces}})))
        };
        assert_eq!(with(json!([{"type": "network"}])).unwrap(), Network::New);
        let path = with(json!([{"type": "pid"}, {"type": "network", "path": "/run/netns/a"}])).unwrap();
        assert_eq!(path, Network::Path("/run/netns/a".into()));
        assert!(matches!(with(json!([{"type": "pid"}])), Err(SpecError::HostNetwork)));
        assert!(network(&spec(&json!({"ociVersion": "1.2.0"}))).is_err());
    }

    #[test]
    fn containers_are_grouped_by_the_first_annotation_that_says_so() {
        let with = |annotations: Value| {
            group(&spec(&json!({"ociVersion": "1.2.0", "annotations": annotations})), "own")
        };
        assert_eq!(with(json!({})), "own");
        assert_eq!(with(json!({"io.kubernetes.cri.sandbox-id": ""})), "own");
        assert_eq!(with(json!({"io.kubernetes.cri.sandbox-id": "pod"})), "pod");
        assert_eq!(
            with(json!({"io.kubernetes.cri.sandbox-id": "pod", "io.containerd.runc.v2.group": "group"})),
            "group"
        );
    }

    #[test]
    fn a_pods_sandbox_is_told_from_its_containers() {
        let is = |annotations: Value| {
            is_pod_sandbox(&spec(&json!({"ociVersion": "1.2.0", "annotations": annotations})))
        };
        assert!(is(json!({"io.kubernetes.cri.container-type": "sandbox"})));
        assert!(is(json!({"io.kubernetes.cri-o.ContainerType": "sandbox"})));
        assert!(!is(json!({"io.kubernetes.cri.container-type": "container"})));
        assert!(!is(json!({})));
    }
}
