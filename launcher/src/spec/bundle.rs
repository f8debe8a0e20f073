//! The configuration of an OCI bundle. It goes to the agent as it is; what would need the host is refused here, where it can be
//! said what to do instead.

use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_protocol::limits::SPEC_MAX;
use oci_spec::runtime::Spec;

use crate::failure::Failure;

/// A bundle's configuration.
#[derive(Debug)]
pub(crate) struct Bundle {
    /// `config.json`.
    pub(crate) json: Vec<u8>,
    /// The same, understood.
    pub(crate) spec: Spec,
    /// The directory that is the container's root.
    pub(crate) root: PathBuf,
}

impl Bundle {
    /// Reads `config.json` of the bundle in `directory`.
    pub(crate) fn read(directory: &Path) -> Result<Self, Failure> {
        let path = directory.join("config.json");
        let context = format!("cannot use the bundle's {}", path.display());
        let json = fs::read(&path).map_err(|e| Failure::from(e).context(&context))?;
        if json.len() > SPEC_MAX {
            return Err(Failure::new(format!("it has more than {SPEC_MAX} bytes")).context(&context));
        }
        let spec: Spec = serde_json::from_slice(&json).map_err(|e| Failure::from(e).context(&context))?;
        check(&spec).map_err(|e| e.context(&context))?;
        let root = spec.root().as_ref().map_or_else(|| PathBuf::from("rootfs"), |root| root.path().clone());
        Ok(Self { json, root: directory.join(root), spec })
    }
}

fn check(spec: &Spec) -> Result<(), Failure> {
    if spec.process().is_none() {
        return Err(Failure::new("it has no process: add what shall run"));
    }
    let hooks = serde_json::to_value(spec.hooks())?;
    let hooked = hooks.as_object().and_then(|hooks| {
        hooks.iter().find(|(_, list)| list.as_array().is_some_and(|list| !list.is_empty()))
    });
    if let Some((name, _)) = hooked {
        return Err(Failure::new(format!("it has {name} hooks, which are not supported yet: remove them")));
    }
    for mount in spec.mounts().iter().flatten() {
        let is_bind = |option: &String| option == "bind" || option == "rbind";
        if mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(is_bind) {
            return Err(Failure::new(format!(
                "it binds {} of the host to {}: host directories cannot be shared yet, so copy what is needed into the root \
                 and remove the mount",
                mount.source().clone().unwrap_or_default().display(),
                mount.destination().display()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: &str) -> Result<Bundle, Failure> {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config).unwrap();
        Bundle::read(dir.path())
    }

    const PROCESS: &str =
        r#""ociVersion":"1.0.2","process":{"user":{"uid":0,"gid":0},"args":["x"],"cwd":"/"}"#;

    #[test]
    fn the_root_is_the_bundles_directory_of_that_name() {
        let bundle = read(&format!(r#"{{{PROCESS},"root":{{"path":"tree"}}}}"#)).unwrap();
        assert!(bundle.root.ends_with("tree"));
    }

    #[test]
    fn what_needs_the_host_is_refused_by_name() {
        for (config, word) in [
            (format!(r#"{{{PROCESS},"hooks":{{"poststop":[{{"path":"/x"}}]}}}}"#), "poststop"),
            (
                format!(
                    r#"{{{PROCESS},"mounts":[{{"destination":"/data","type":"bind","source":"/srv"}}]}}"#
                ),
                "/srv",
            ),
            (
                format!(
                    r#"{{{PROCESS},"mounts":[{{"destination":"/data","source":"/x","options":["rbind"]}}]}}"#
                ),
                "/data",
            ),
            (r#"{"ociVersion":"1.0.2"}"#.into(), "process"),
            ("{".into(), "config.json"),
        ] {
            let error = read(&config).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(Bundle::read(Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn an_empty_list_of_hooks_is_no_hook() {
        read(&format!(r#"{{{PROCESS},"hooks":{{"poststop":[]}}}}"#)).unwrap();
    }
}
