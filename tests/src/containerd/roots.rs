//! A container's root, whichever snapshotter has made it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::bulkhead::{expect_code, stderr, stdout};
use bulkhead_tests::ctr::{Bundle, Container, Mount, ctr, in_background, run, run_command};
use bulkhead_tests::files::{busybox_tree, tool};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;

use crate::trial;

type Test = fn(&'static str) -> Result;

const EACH: [(&str, Test); 5] = [
    ("a command runs and its exit code is ctr's", exit_codes),
    ("what a container writes is its own, with owners, modes, links and attributes", own_writes),
    ("a read-only root cannot be written", read_only),
    ("a container that is started again finds what it wrote", started_again),
    ("a file of many megabytes is read as it was written", large_file),
];

pub(crate) fn tests(snapshotters: &[&'static str]) -> Vec<Trial> {
    let each = snapshotters.iter().flat_map(|snapshotter| {
        EACH.map(|(name, test)| {
            let snapshotter: &'static str = snapshotter;
            trial(format!("{snapshotter}: {name}"), move || test(snapshotter))
        })
    });
    each.chain([
        trial("rootfs: a directory of the host is a root, and both see what is written", directory),
        trial("rootfs: a block device with an ext4 is a root, and keeps what is written", block_device),
        trial("rootfs: a creation that fails leaves a directory of the host as it was", kept),
    ])
    .collect()
}

fn exit_codes(snapshotter: &'static str) -> Result {
    let options = ["--snapshotter", snapshotter];
    let output = run(&options, &["echo", "said"])?;
    expect_code(&output, 0)?;
    ensure(stdout(&output) == "said\n" && output.stderr.is_empty(), || format!("{output:?}"))?;
    expect_code(&run(&options, &["sh", "-c", "exit 7"])?, 7)
}

fn own_writes(snapshotter: &'static str) -> Result {
    let options = ["--snapshotter", snapshotter];
    let script = "mkdir /new && echo text >/new/file && chown 12:34 /new/file && chmod 4751 /new/file && \
                  ln /new/file /new/hard && ln -s file /new/soft && mkfifo /new/pipe && \
                  rm /bin/vi && echo more >>/etc/passwd && mv /new /moved && \
                  stat -c '%u:%g %a %h' /moved/file && cat /moved/soft && tail -n 1 /etc/passwd && \
                  test -p /moved/pipe && test ! -e /bin/vi && test ! -e /new && echo whole";
    let output = run(&options, &["sh", "-c", script])?;
    ensure(stdout(&output) == "12:34 4751 2\ntext\nmore\nwhole\n", || format!("{output:?}"))?;
    let output = run(&options, &["sh", "-c", "ls -d /moved; tail -n 1 /etc/passwd; ls /bin/vi"])?;
    ensure(stdout(&output).starts_with("nobody:") && stdout(&output).ends_with("/bin/vi\n"), || {
        format!("the image was changed: {output:?}")
    })
}

fn read_only(snapshotter: &'static str) -> Result {
    let output = run(&["--snapshotter", snapshotter, "--read-only"], &["sh", "-c", "echo x >/file"])?;
    expect_code(&output, 1)?;
    ensure(stderr(&output).contains("Read-only file system"), || stderr(&output))
}

fn started_again(snapshotter: &'static str) -> Result {
    let script = "echo once more >>/file; cat /file >/proc/1/fd/1; exit $(wc -l </file)";
    let container: Container =
        in_background("again", &["--snapshotter", snapshotter], &["sh", "-c", script])?;
    let first = container.wait()?;
    container.delete_task()?;
    let output = ctr(["task", "start", container.id()]).output()?;
    expect_code(&output, 2)?;
    ensure(first == 1 && stdout(&output) == "once more\nonce more\n", || format!("{first}: {output:?}"))?;
    expect_code(&ctr(["container", "delete", container.id()]).output()?, 0)
}

fn large_file(snapshotter: &'static str) -> Result {
    let script = "seq 1 1500000 >/file && stat -c %s /file && md5sum </file && cp /file /copy && cmp /file /copy && echo same";
    let output = run(&["--snapshotter", snapshotter], &["sh", "-c", script])?;
    expect_code(&output, 0)?;
    let expected = "10888896\n01b2a23e74272b44e6745c851c2462da  -\nsame\n";
    ensure(stdout(&output) == expected, || format!("{output:?}"))
}

fn directory() -> Result {
    let directory = tempfile::tempdir()?;
    let tree = directory.path().join("tree");
    busybox_tree(&tree)?;
    std::fs::write(tree.join("from-host"), "host\n")?;
    let root = tree.to_str().ok_or("a temporary directory")?;
    let script = "cat /from-host; echo container >/from-container";
    let output =
        run_command("once", &["--rm", "--env", "PATH=/bin", "--rootfs", root], &["sh", "-c", script])?
            .output()?;
    expect_code(&output, 0)?;
    let written = std::fs::read_to_string(tree.join("from-container"))?;
    ensure(stdout(&output) == "host\n" && written == "container\n", || format!("{output:?}, {written:?}"))
}

/// A loop device, which goes with it.
pub(crate) struct Loop(String);

impl Loop {
    pub(crate) fn new(file: &Path) -> Result<Self> {
        let made = tool(Command::new("losetup").args(["--find", "--show"]).arg(file))?;
        Ok(Self(String::from_utf8(made)?.trim().to_owned()))
    }

    /// Its file in `/dev`.
    pub(crate) fn name(&self) -> &str {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// As devmapper hands it over.
fn block_device() -> Result {
    let script = "echo once more >>/file; exit $(wc -l </file)";
    let bundle = Bundle::new("disk", &["sh", "-c", script])?;
    let image = bundle.path().join("image");
    let tree = bundle.path().join("rootfs");
    tool(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg("32M"))?;
    // The mount point alone, as containerd has it.
    std::fs::remove_dir_all(&tree)?;
    std::fs::create_dir(&tree)?;
    let disk = Loop::new(&image)?;
    for times in 1..=2 {
        let shim = bundle.start_shim()?;
        let mut request = bundle.request();
        request.rootfs.push(Mount {
            type_: "ext4".into(),
            source: disk.name().to_owned(),
            ..Mount::default()
        });
        shim.create(&request).map_err(|error| format!("create: {error}; {}", bundle.log()))?;
        shim.start("disk", "")?;
        let code = shim.wait("disk", "")?;
        ensure(code == times, || format!("exit code {code} of start {times}"))?;
        shim.delete("disk", "")?;
        shim.shutdown("disk")?;
        bundle.clean_up()?;
    }
    Ok(())
}

fn kept() -> Result {
    let tree = KeptTree::new()?;
    for more in [&["--cwd", "/etc/passwd"][..], &["--cwd", "/etc/passwd", "--read-only"]] {
        let options = [&["--rm", "--env", "PATH=/bin"], more, &["--rootfs", tree.root()?]].concat();
        let output = run_command("once", &options, &["true"])?.output()?;
        expect_code(&output, 1)?;
        ensure(stderr(&output).contains("/etc/passwd"), || stderr(&output))?;
        tree.all_there()?;
    }
    Ok(())
}

/// A directory of the host, to be a root of which nothing may get lost.
pub(crate) struct KeptTree {
    _directory: tempfile::TempDir,
    pub(crate) path: PathBuf,
    before: BTreeSet<PathBuf>,
}

impl KeptTree {
    pub(crate) fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("tree");
        busybox_tree(&path)?;
        let before = paths_below(&path)?;
        Ok(Self { _directory: directory, path, before })
    }

    /// As an argument.
    pub(crate) fn root(&self) -> Result<&str> {
        Ok(self.path.to_str().ok_or("a temporary directory")?)
    }

    /// A runtime may add mount points.
    pub(crate) fn all_there(&self) -> Result {
        let (before, after) = (&self.before, paths_below(&self.path)?);
        ensure(before.is_subset(&after), || format!("{} of {} files are left", after.len(), before.len()))
    }
}

/// Everything below a directory.
fn paths_below(directory: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(paths_below(&entry.path())?);
        }
        found.insert(entry.path());
    }
    Ok(found)
}
