//! The peer of the launcher: crun, with an OCI bundle on tmpfs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bulkhead_tests::vm::Result;
use serde_json::{Value, json};

use crate::repeat::timed;

/// An OCI bundle. Its root is the directory `rootfs` in it.
pub(crate) struct Bundle {
    directory: PathBuf,
    config: Value,
}

impl Bundle {
    /// A bundle in a directory, configured as crun does by default but without a terminal.
    pub(crate) fn new(directory: &Path) -> Result<Self> {
        timed(Command::new("crun").arg("spec").current_dir(directory))?;
        let mut config: Value = serde_json::from_slice(&fs::read(directory.join("config.json"))?)?;
        config["process"]["terminal"] = json!(false);
        Ok(Self { directory: directory.to_owned(), config })
    }

    /// `crun run` of a program in it.
    pub(crate) fn run(&self, options: &[&str], program: &[&str]) -> Result<Command> {
        let mut config = self.config.clone();
        config["process"]["args"] = json!(program);
        fs::write(self.directory.join("config.json"), config.to_string())?;
        let mut command = crun(&["run", "--bundle"]);
        command.arg(&self.directory).args(options).arg(CONTAINER);
        Ok(command)
    }
}

/// The name of the container: there is one at a time.
const CONTAINER: &str = "bench";

/// `crun exec` in the container.
pub(crate) fn exec(program: &[&str]) -> Command {
    crun(&[&["exec", CONTAINER], program].concat())
}

/// Ends the container, if it runs.
pub(crate) fn delete() -> Result {
    timed(&mut crun(&["delete", "--force", CONTAINER])).map(drop)
}

fn crun(arguments: &[&str]) -> Command {
    let mut command = Command::new("crun");
    command.args(arguments).stdin(Stdio::null());
    command
}
