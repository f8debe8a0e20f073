//! The version of the protocol between containerd and its shims.

use std::fs::{Permissions, set_permissions, write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use bulkhead_tests::bulkhead::{expect_code, stdout};
use bulkhead_tests::ctr::{self, NAMESPACE, in_background_of, is_runc, is_version_2, runtime, status};
use bulkhead_tests::vm::{Result, artifact, ensure};
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::Message;
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn tests() -> Result<Vec<Trial>> {
    // Older versions refuse it.
    Ok(if is_version_2()? {
        vec![trial("shim: version 3 of the protocol, of the task service and of its reattachment", version_3)]
    } else {
        Vec::new()
    })
}

/// A shim as containerd 2.3 starts it, which says by its standard input that it knows version 3; with 2.1 a shim of ours answers
/// with version 2, because 2.1 does not say whether it knows more.
fn asking(directory: &Path, id: &str) -> Result<String> {
    let (shim, parameters) = (directory.join("containerd-shim-asking-v2"), directory.join("parameters"));
    let said = BootstrapParams { instance_id: id.into(), namespace: NAMESPACE.into(), ..Default::default() };
    write(&parameters, said.write_to_bytes()?)?;
    let script = format!(
        "#!/bin/sh\nfor verb; do :; done\n[ $verb != start ] || exec <{}\nexec {} \"$@\"\n",
        parameters.display(),
        artifact("bin/containerd-shim-bulkhead-v2").display()
    );
    write(&shim, script)?;
    set_permissions(&shim, Permissions::from_mode(0o755))?;
    Ok(shim.display().to_string())
}

fn version_3() -> Result {
    let directory = tempfile::tempdir()?;
    // runc's shim answers so to everybody.
    let shim = if is_runc() { runtime() } else { asking(directory.path(), "third")? };
    let container = in_background_of(&shim, "third", &[], &["sleep", "1000"])?;
    let version = container.shim()?.version();
    ensure(version == 3, || format!("version {version}"))?;
    let output = container.exec(&["sh", "-c", "echo said; exit 3"])?;
    expect_code(&output, 3)?;
    ensure(stdout(&output) == "said\n", || format!("{output:?}"))?;
    ctr::kill()?;
    ctr::start()?;
    ensure(status("third")? == "RUNNING", || "it is not said to run".to_owned())?;
    expect_code(&container.exec(&["true"])?, 0)?;
    container.end()
}
