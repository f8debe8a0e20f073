//! The namespaces of a container: its own, those that another container shares with it, those that an exec joins.
//!
//! What another container shares is pinned: PID 1 opens it while the process that has it cannot have been reaped, and the
//! worker gets the descriptor. A process id in a path could by then be another's.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use bulkhead_protocol::agent::SharedNamespace;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType};
use rustix::fs::{CWD, Mode, OFlags, openat};

/// Why namespaces are refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("a {0:?} namespace cannot be shared between containers")]
    Kind(String),
    #[error("the {0} namespace is to be shared twice")]
    Twice(LinuxNamespaceType),
    #[error("the {0} namespace has a path: a container shares another one's namespaces by its id")]
    Path(LinuxNamespaceType),
    #[error("the configuration has no mount namespace, which would give it the agent's")]
    NoMount,
}

/// Namespaces that another container has, by their type.
pub(crate) type Shared = Vec<(LinuxNamespaceType, OwnedFd)>;

/// The types of the namespaces that a call wants to be shared, in its order.
///
/// # Errors
/// [`Error::Kind`] for one that is unknown, or would take from the container what is its own; [`Error::Twice`].
pub(crate) fn kinds(shared: &[SharedNamespace]) -> Result<Vec<LinuxNamespaceType>, Error> {
    let mut kinds = Vec::new();
    for namespace in shared {
        let kind = match namespace.type_.as_str() {
            "pid" => LinuxNamespaceType::Pid,
            "ipc" => LinuxNamespaceType::Ipc,
            "uts" => LinuxNamespaceType::Uts,
            "network" => LinuxNamespaceType::Network,
            "user" => LinuxNamespaceType::User,
            other => return Err(Error::Kind(other.chars().take(20).collect())),
        };
        if kinds.contains(&kind) {
            return Err(Error::Twice(kind));
        }
        kinds.push(kind);
    }
    Ok(kinds)
}

/// The namespace that process `pid` has.
///
/// # Errors
/// What the kernel says; a process that has ended has none.
pub(crate) fn open(kind: LinuxNamespaceType, pid: i32) -> io::Result<OwnedFd> {
    Ok(openat(CWD, path_of(kind, pid), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// The namespaces of a new container, whose configuration wants `own`.
///
/// # Errors
/// [`Error::Path`] for one that would be joined from who knows where, [`Error::NoMount`].
pub(super) fn of_new(own: &[LinuxNamespace], shared: &Shared) -> Result<Vec<LinuxNamespace>, Error> {
    let is_shared = |kind| shared.iter().any(|&(other, _)| other == kind);
    let mut namespaces: Vec<_> =
        own.iter().filter(|namespace| !is_shared(namespace.typ())).cloned().collect();
    if !namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Mount) {
        return Err(Error::NoMount);
    }
    if let Some(joined) = namespaces.iter().find(|namespace| namespace.path().is_some()) {
        return Err(Error::Path(joined.typ()));
    }
    // libcontainer opens them in processes that inherit the worker's descriptors.
    namespaces.extend(shared.iter().map(|(kind, fd)| at(*kind, format!("/proc/self/fd/{}", fd.as_raw_fd()))));
    Ok(namespaces)
}

/// The same namespaces, as process `init` has them.
pub(super) fn of_process(namespaces: &[LinuxNamespace], init: i32) -> Vec<LinuxNamespace> {
    namespaces.iter().map(|namespace| at(namespace.typ(), path_of(namespace.typ(), init))).collect()
}

/// Whether a container has a network namespace that nobody has had before.
pub(super) fn has_new_network(namespaces: &[LinuxNamespace]) -> bool {
    namespaces
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Network && namespace.path().is_none())
}

fn at(kind: LinuxNamespaceType, path: String) -> LinuxNamespace {
    // Every field of the builder has a default.
    LinuxNamespaceBuilder::default().typ(kind).path(path).build().unwrap_or_default()
}

fn path_of(kind: LinuxNamespaceType, pid: i32) -> String {
    let name = match kind {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Time => "time",
    };
    format!("/proc/{pid}/ns/{name}")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::{Path, PathBuf};

    use super::*;

    fn shared(kinds: &[&str]) -> Vec<SharedNamespace> {
        let one = |kind: &&str| SharedNamespace {
            type_: (*kind).into(),
            container_id: "c".into(),
            ..SharedNamespace::default()
        };
        kinds.iter().map(one).collect()
    }

    fn own(json: &str) -> Vec<LinuxNamespace> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn only_what_leaves_a_container_its_own_files_and_limits_is_shared() {
        use LinuxNamespaceType as T;
        let all = kinds(&shared(&["pid", "ipc", "uts", "network", "user"])).unwrap();
        assert_eq!(all, [T::Pid, T::Ipc, T::Uts, T::Network, T::User]);
        for bad in ["mount", "cgroup", "time", "", "net"] {
            assert!(matches!(kinds(&shared(&[bad])), Err(Error::Kind(kind)) if kind == bad));
        }
        assert!(matches!(kinds(&shared(&["ipc", "ipc"])), Err(Error::Twice(T::Ipc))));
    }

    #[test]
    fn a_shared_namespace_takes_the_place_of_the_containers_own() {
        let own = own(r#"[{"type": "mount"}, {"type": "ipc", "path": "/x"}, {"type": "uts"}]"#);
        assert!(matches!(of_new(&own, &Vec::new()), Err(Error::Path(LinuxNamespaceType::Ipc))));
        let pinned = OwnedFd::from(File::open("/proc/self/ns/ipc").unwrap());
        let path = PathBuf::from(format!("/proc/self/fd/{}", pinned.as_raw_fd()));
        let namespaces = of_new(&own, &vec![(LinuxNamespaceType::Ipc, pinned)]).unwrap();
        let paths: Vec<_> =
            namespaces.iter().map(|namespace| (namespace.typ(), namespace.path().clone())).collect();
        assert_eq!(
            paths,
            [
                (LinuxNamespaceType::Mount, None),
                (LinuxNamespaceType::Uts, None),
                (LinuxNamespaceType::Ipc, Some(path))
            ]
        );
    }

    #[test]
    fn a_container_without_files_of_its_own_is_refused() {
        assert!(matches!(of_new(&own(r#"[{"type": "pid"}]"#), &Vec::new()), Err(Error::NoMount)));
    }

    #[test]
    fn a_new_network_is_one_without_a_path() {
        assert!(has_new_network(&own(r#"[{"type": "network"}]"#)));
        assert!(!has_new_network(&own(r#"[{"type": "network", "path": "/x"}, {"type": "mount"}]"#)));
        let joined = of_process(&own(r#"[{"type": "network"}]"#), 7);
        assert_eq!(joined[0].path().as_deref(), Some(Path::new("/proc/7/ns/net")));
    }
}
