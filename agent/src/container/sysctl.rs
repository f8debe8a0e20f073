//! Kernel parameters of the guest's own network: `net.*` of a container that is in it.
//!
//! The host gives a pod's network to the guest as a whole, so what a container asks for there is the pod's. libcontainer would refuse it, as
//! it is not of a namespace of the container's own.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxNamespaceType};

/// Where they are.
const DIRECTORY: &str = "/proc/sys";

/// Why a parameter is not set.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{0:?} is no name of a sysctl")]
    Name(String),
    #[error("set the sysctl {0:?} to {1:?}")]
    Set(String, String, #[source] io::Error),
}

/// A parameter with the value that it is to have.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Parameter {
    name: String,
    path: PathBuf,
    value: String,
}

impl Parameter {
    /// Reads `net.a.b` or `net/a/b`, as runc does; none for a parameter of something else.
    fn parse(name: &str, value: &str) -> Result<Option<Self>, Error> {
        // No dot is left, so no part is `..`.
        let path = name.replace('.', "/");
        let mut parts = path.split('/');
        if parts.next() != Some("net") {
            return Ok(None);
        }
        if parts.any(str::is_empty) {
            return Err(Error::Name(name.to_owned()));
        }
        let path = Path::new(DIRECTORY).join(&path);
        Ok(Some(Self { name: name.to_owned(), path, value: value.to_owned() }))
    }

    /// Sets it in the network namespace that this process is in.
    ///
    /// # Errors
    /// [`Error::Set`] when there is no such parameter, or the kernel does not want the value.
    pub(super) fn set(&self) -> Result<(), Error> {
        let opened = File::options().write(true).open(&self.path);
        opened
            .and_then(|mut file| file.write_all(self.value.as_bytes()))
            .map_err(|error| Error::Set(self.name.clone(), self.value.clone(), error))
    }
}

/// Takes the parameters of the guest's network out of the configuration of a container that is in it, in the order of their names: `all`
/// interfaces before one of them.
///
/// # Errors
/// [`Error::Name`].
pub(super) fn take(linux: &mut Linux) -> Result<Vec<Parameter>, Error> {
    let mut namespaces = linux.namespaces().iter().flatten();
    if namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::Network) {
        return Ok(Vec::new());
    }
    let mut kept = linux.sysctl().clone().unwrap_or_default();
    let mut taken = Vec::new();
    for (name, value) in linux.sysctl().iter().flatten() {
        if let Some(parameter) = Parameter::parse(name, value)? {
            kept.remove(name);
            taken.push(parameter);
        }
    }
    taken.sort_by(|one, other| one.path.cmp(&other.path));
    linux.set_sysctl(Some(kept));
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn linux(namespaces: &Value, sysctl: &Value) -> Linux {
        serde_json::from_value(json!({"namespaces": namespaces, "sysctl": sysctl})).unwrap()
    }

    #[test]
    fn both_spellings_lead_below_net() {
        for name in ["net.ipv4.ip_forward", "net/ipv4/ip_forward", "net/ipv4.ip_forward"] {
            let parameter = Parameter::parse(name, "1").unwrap().unwrap();
            assert_eq!(parameter.path, Path::new("/proc/sys/net/ipv4/ip_forward"), "{name}");
        }
        assert_eq!(Parameter::parse("kernel.shmmax", "1").unwrap(), None);
        assert_eq!(Parameter::parse("network.x", "1").unwrap(), None);
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["net.", "net..ipv4", "net/../kernel/panic", "net//ipv4", "net.ipv4.", "net/./x"] {
            assert!(matches!(Parameter::parse(name, "1"), Err(Error::Name(told)) if told == name), "{name}");
        }
    }

    #[test]
    fn those_of_the_guests_network_are_taken_in_order() {
        let sysctl = json!({
            "net.ipv4.conf.eth0.rp_filter": "2", "net.ipv4.conf.all.rp_filter": "1", "kernel.shmmax": "4096"
        });
        let mut guests = linux(&json!([{"type": "ipc"}]), &sysctl);
        let names: Vec<_> = take(&mut guests).unwrap().into_iter().map(|parameter| parameter.name).collect();
        assert_eq!(names, ["net.ipv4.conf.all.rp_filter", "net.ipv4.conf.eth0.rp_filter"]);
        assert_eq!(
            guests.sysctl().iter().flatten().collect::<Vec<_>>(),
            [(&"kernel.shmmax".into(), &"4096".into())]
        );

        let mut own = linux(&json!([{"type": "network"}]), &sysctl);
        assert_eq!(take(&mut own).unwrap(), []);
        assert_eq!(own.sysctl().as_ref().map(std::collections::HashMap::len), Some(3));
    }

    #[test]
    fn a_parameter_that_does_not_exist_is_named() {
        for (name, value) in [("net.ipv4.nonesuch", "1"), ("net.ipv4", "1"), ("net.a\0b", "1")] {
            let error = Parameter::parse(name, value).unwrap().unwrap().set().unwrap_err();
            assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
        }
    }
}
