//! Roots that are no images: directories and file system images, whose container keeps what it writes, and OCI bundles.

use std::fs::{read, write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use bulkhead_rootfs_builder::directory::pack;
use bulkhead_tests::bulkhead::{bulkhead, expect_code, expect_refusal, stderr, stdout};
use bulkhead_tests::files::{busybox_tree, tool};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::trial;

/// "Function not implemented".
const ENOSYS: u32 = 38;
/// Says what is in the root, and writes to it.
const SCRIPT: &str = "cat /marker; echo changed >/marker; cat /marker; grep ' / ' /proc/mounts";

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("root: a directory is packed, and stays as it was", directory),
        trial("root: an EROFS image gets a layer to write to", erofs),
        trial("root: an ext4 image is copied, and stays as it was", ext4),
        trial("root: what is none is refused", refused),
        trial("bundle: its process, hostname and environment hold", bundle),
        trial("bundle: its limits, seccomp profile and paths hold", restricted),
        trial("bundle: a user namespace maps its users", user_namespace),
        trial("faults: a guest kernel that panics under a container is told with its last words", panic),
    ]
}

/// A busybox system with a marker, in the new directory `tree`.
fn marked(tree: &Path) -> Result {
    busybox_tree(tree)?;
    Ok(write(tree.join("marker"), "original\n")?)
}

fn expect_changed(root: &Path, kind: &str) -> Result {
    let output =
        bulkhead(["run", "--rm", "--rootfs"]).arg(root).args(["--", "/bin/sh", "-c", SCRIPT]).output()?;
    expect_code(&output, 0)?;
    let said = stdout(&output);
    ensure(said.starts_with("original\nchanged\n") && said.contains(kind), || said)
}

fn directory() -> Result {
    let scratch = tempfile::tempdir()?;
    let tree = scratch.path().join("tree");
    marked(&tree)?;
    expect_changed(&tree, "overlay / overlay rw")?;
    ensure(read(tree.join("marker"))? == b"original\n", || "the directory was written to".to_owned())
}

fn erofs() -> Result {
    let scratch = tempfile::tempdir()?;
    let (tree, image) = (scratch.path().join("tree"), scratch.path().join("image"));
    marked(&tree)?;
    pack(&tree, &image, 1 << 30, &mut |_| {})?;
    let before = read(&image)?;
    expect_changed(&image, "overlay / overlay rw")?;
    ensure(read(&image)? == before, || "the image was written to".to_owned())
}

fn ext4() -> Result {
    let scratch = tempfile::tempdir()?;
    let (tree, image) = (scratch.path().join("tree"), scratch.path().join("image"));
    marked(&tree)?;
    tool(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg("32M"))?;
    let before = read(&image)?;
    expect_changed(&image, " / ext4 rw")?;
    ensure(read(&image)? == before, || "the image was written to".to_owned())
}

fn refused() -> Result {
    let scratch = tempfile::tempdir()?;
    let text = scratch.path().join("text");
    write(&text, "no file system\n")?;
    let missing = scratch.path().join("missing");
    for (path, said) in [(&text, "neither an EROFS nor an ext4 image"), (&missing, "No such file")] {
        let output = bulkhead(["run", "--rm", "--rootfs"]).arg(path).args(["--", "true"]).output()?;
        expect_refusal(&output, 125, &[said, &path.display().to_string()])?;
    }
    Ok(())
}

/// A bundle of a busybox system with a marker.
pub(crate) struct Bundle(tempfile::TempDir);

impl Bundle {
    /// One whose process is a script, with whatever else `change` makes of its configuration.
    pub(crate) fn new(script: &str, change: impl FnOnce(&mut Value)) -> Result<Self> {
        let bundle = Self(tempfile::tempdir()?);
        marked(&bundle.root())?;
        let kinds = ["pid", "ipc", "uts", "mount", "cgroup", "network"];
        let namespaces: Vec<Value> = kinds.iter().map(|kind| json!({ "type": kind })).collect();
        let mut config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "args": ["sh", "-c", script], "cwd": "/tmp", "env": ["PATH=/bin", "FROM=bundle"],
                "user": { "uid": 0, "gid": 0 }
            },
            "root": { "path": "tree" },
            "hostname": "bundled",
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs" }
            ],
            "linux": { "namespaces": namespaces }
        });
        change(&mut config);
        write(bundle.path().join("config.json"), config.to_string())?;
        Ok(bundle)
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// The directory that is its root.
    pub(crate) fn root(&self) -> PathBuf {
        self.path().join("tree")
    }

    /// Runs it to its end.
    pub(crate) fn run(&self, options: &[&str]) -> Result<Output> {
        Ok(bulkhead(["run", "--rm"]).args(options).arg("--bundle").arg(self.path()).output()?)
    }
}

/// Runs such a bundle.
fn run_bundle(options: &[&str], script: &str, change: impl FnOnce(&mut Value)) -> Result<Output> {
    Bundle::new(script, change)?.run(options)
}

fn bundle() -> Result {
    let output = run_bundle(&[], "hostname; pwd; echo $FROM; cat /marker; exit 4", |_| {})?;
    expect_code(&output, 4)?;
    ensure(stdout(&output) == "bundled\n/tmp\nbundle\noriginal\n", || stdout(&output))
}

/// What the agent asks of the guest's kernel on a container's behalf: an option that it lacks shows here.
fn restricted() -> Result {
    let script = "ulimit -n; umask; mkdir /tmp/x 2>&1; wc -c </proc/version; echo x 2>&1 >/proc/sys/kernel/hostname
        grep NoNewPrivs /proc/self/status; cd /sys/fs/cgroup; cat cpu.max cpuset.cpus memory.max pids.max; nproc";
    let output = run_bundle(&["--cpus", "2"], script, |config| {
        config["process"]["noNewPrivileges"] = json!(true);
        config["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 50, "hard": 100 }]);
        config["process"]["user"]["umask"] = json!(0o077);
        let cgroup = json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"] });
        let mounts = config["mounts"].as_array_mut().expect("an array");
        mounts.push(json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"] }));
        mounts.push(cgroup);
        let linux = &mut config["linux"];
        linux["maskedPaths"] = json!(["/proc/version"]);
        linux["readonlyPaths"] = json!(["/proc/sys"]);
        linux["resources"] = json!({
            "cpu": { "quota": 50_000, "period": 100_000, "cpus": "1" },
            "memory": { "limit": 64 << 20 },
            "pids": { "limit": 40 }
        });
        linux["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS }]
        });
    })?;
    let expected = "50\n0077\nmkdir: can't create directory '/tmp/x': Function not implemented\n0\n\
        sh: can't create /proc/sys/kernel/hostname: Read-only file system\nNoNewPrivs:\t1\n\
        50000 100000\n0\n67108864\n40\n1\n";
    ensure(stdout(&output) == expected, || format!("{}{}", stdout(&output), stderr(&output)))
}

fn user_namespace() -> Result {
    let output =
        run_bundle(&[], "id -u; tr -s ' ' </proc/self/uid_map; ls -ln /marker | cut -d' ' -f1", |config| {
            let ids = json!([{ "containerID": 0, "hostID": 100_000, "size": 1000 }]);
            config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "user" }));
            config["linux"]["uidMappings"] = ids.clone();
            config["linux"]["gidMappings"] = ids;
        })?;
    ensure(stdout(&output) == "0\n 0 100000 1000\n-rw-r--r--\n", || {
        format!("{}{}", stdout(&output), stderr(&output))
    })
}

fn panic() -> Result {
    // A bundle may leave /proc/sys writable: the guest is the container's own. One system call takes all memory, so that no code
    // need be read again and again while there is hardly any left.
    let script = "echo 2 >/proc/sys/vm/panic_on_oom && dd if=/dev/zero of=/dev/null bs=96M count=1";
    let output = run_bundle(&["--memory", "128M"], script, |_| {})?;
    expect_code(&output, 125)?;
    let said = stderr(&output);
    ensure(said.starts_with("bulkhead: the guest's kernel panicked"), || said.clone())?;
    ensure(said.contains("Kernel panic - not syncing: Out of memory"), || said)
}
