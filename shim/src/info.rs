//! `-info`: what this runtime can do, as containerd 2 asks for it.

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::MessageField;
use serde_json::json;

/// How containerd names the runtime.
const NAME: &str = "io.containerd.bulkhead.v2";
/// containerd's name for the features document of the OCI runtime specification.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The answer.
pub(crate) fn info() -> RuntimeInfo {
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() };
    let features =
        Any { type_url: FEATURES.into(), value: features().to_string().into_bytes(), ..Default::default() };
    RuntimeInfo {
        name: NAME.into(),
        version: MessageField::some(version),
        features: MessageField::some(features),
        ..Default::default()
    }
}

/// What the guest enforces. What is not named (recursive read-only and id-mapped mounts, hooks) containerd and the kubelet must not
/// ask for.
fn features() -> serde_json::Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": [],
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "noatime", "nodev", "nodiratime", "noexec",
            "norelatime", "nosuid", "private", "rbind", "relatime", "remount", "ro", "rprivate", "rshared", "rslave", "rw", "shared",
            "slave", "strictatime", "suid", "sync"
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": false } }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_features_are_those_that_the_specification_knows() {
        let parsed: oci_spec::runtime::Features = serde_json::from_value(features()).unwrap();
        assert!(parsed.linux().as_ref().unwrap().namespaces().is_some());
        assert_eq!(info().features.type_url, FEATURES);
    }
}
