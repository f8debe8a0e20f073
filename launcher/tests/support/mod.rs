//! A host of its own for each test: roots, artifacts and a configuration in a temporary directory, `fake-vmm` for the VMM.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

#[path = "../../examples/fake-vmm/artifacts.rs"]
mod artifacts;

use artifacts::{elf, erofs};

/// Its configuration: no KVM, and no cgroups of the host that the tests run on.
pub const CONFIG: &str = "[paths]\nkvm = \"/dev/null\"\n[cgroups]\nparent = \"\"\n";

/// A host.
pub struct Host(tempfile::TempDir);

impl Host {
    pub fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        for directory in ["libexec", "share", "data", "run"] {
            // Private whatever the umask: others are refused.
            fs::DirBuilder::new().mode(0o700).create(host.path(directory)).unwrap();
        }
        let bulkhead = Path::new(env!("CARGO_BIN_EXE_bulkhead"));
        let fake = bulkhead.parent().unwrap().join("examples/fake-vmm");
        assert!(fake.exists(), "cargo builds it with `cargo test -p bulkhead`");
        symlink(fake, host.path("libexec/bulkhead-vmm")).unwrap();
        fs::write(host.path("share/vmlinux"), elf()).unwrap();
        host.boots_like("");
        fs::write(host.path("root.erofs"), erofs("")).unwrap();
        fs::write(host.path("config.toml"), CONFIG).unwrap();
        host
    }

    /// Decides how the next machines boot.
    pub fn boots_like(&self, directive: &str) {
        fs::write(self.path("share/guest.erofs"), erofs(directive)).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `bulkhead` with these arguments.
    pub fn bulkhead(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
        command.args(args).stdin(Stdio::null());
        for (variable, name) in [
            ("BULKHEAD_ROOT", "data"),
            ("BULKHEAD_RUN", "run"),
            ("BULKHEAD_LIBEXEC", "libexec"),
            ("BULKHEAD_SHARE", "share"),
            ("BULKHEAD_CONFIG", "config.toml"),
        ] {
            command.env(variable, self.path(name));
        }
        command
    }

    /// `bulkhead run` with these options and this command.
    pub fn run(&self, options: &[&str], command: &[&str]) -> Command {
        let mut run = self.bulkhead(&["run"]);
        run.args(options).arg("--rootfs").arg(self.path("root.erofs")).args(command);
        run
    }

    /// Runs to the end; standard output without its last line feed.
    pub fn output(&self, args: &[&str]) -> String {
        let output = self.bulkhead(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        stdout(&output).trim_end().to_owned()
    }

    /// Starts a container in the background; its id.
    pub fn detached(&self, options: &[&str], command: &[&str]) -> String {
        let output = self.run(&[&["-d"], options].concat(), command).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output).trim_end().to_owned()
    }

    /// What is left of containers: names of files and directories that are not the host's own.
    pub fn residue(&self) -> Vec<String> {
        let list = |name: &str| fs::read_dir(self.path(name)).into_iter().flatten();
        let entries = list("run").chain(list("data/containers"));
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.starts_with('.')).collect()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Containers that a failed test has left running.
        let ids = self.bulkhead(&["ps", "--json"]).output().unwrap().stdout;
        let rows: serde_json::Value = serde_json::from_slice(&ids).unwrap_or_default();
        for id in rows.as_array().into_iter().flatten().filter_map(|row| row["id"].as_str()) {
            let _ = self.bulkhead(&["rm", "-f", id]).output();
        }
    }
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or_else(|| panic!("killed: {}", stderr(output)))
}

/// Waits for the end of a child whose output nobody has taken.
pub fn wait(child: Child) -> Output {
    child.wait_with_output().unwrap()
}

/// Waits until something is so. There is no event to wait for in another process's files.
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if is_so() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("never: {what}");
}
