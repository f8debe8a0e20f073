//! Scripts for tests to execute.

use std::path::Path;
use std::process::Command;

/// Makes a shell script. Not this process writes it: a child that another test forks meanwhile would hold it open, and it could
/// not be executed ("text file busy").
pub(crate) fn script(path: &Path, script: &str) {
    let write = r#"printf '#!/bin/sh\n%s\n' "$0" >"$1" && chmod 755 "$1""#;
    let written = Command::new("sh").args(["-c", write, script]).arg(path).status();
    assert!(written.is_ok_and(|status| status.success()), "cannot write {}", path.display());
}
