//! Roots that are images of EROFS, as the erofs snapshotter of containerd 2.1 hands them over: an overlay whose lower directories
//! are mounts of the images that lie beside them. A guest gets the images.

use std::ffi::OsStr;
use std::fs::{create_dir, read_dir, read_link, read_to_string, write};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::bulkhead::{expect_code, stdout};
use bulkhead_tests::ctr::{
    Bundle, Container, CreateTaskRequest, Mount, ctr, is_runc, processes_called, runtime, tasks,
};
use bulkhead_tests::files::{busybox_tree, tool};
use bulkhead_tests::layout::{Image, archive};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;
use serde_json::json;

use crate::{pods, trial};

/// How many layers an image may well have; Docker stops at 127.
const MANY: usize = 100;
const MANY_NAME: &str = "layered:100";

pub(crate) fn tests(snapshotters: &[&'static str]) -> Vec<Trial> {
    let mut tests = vec![
        trial("erofs layers: the guest gets the image beside each, and the host mounts nothing", beside),
        trial("erofs layers: what lies beside a layer and is no image is left alone", not_beside),
    ];
    if snapshotters.contains(&"erofs") {
        tests.push(trial(
            "erofs: a hundred layers with whiteouts are one tree, in a machine and in a pod's",
            many,
        ));
    }
    tests
}

/// Layer 0 is busybox. Each other one adds a file with its number, replaces `last`, and every second one removes the file of the
/// one below.
fn import_many() -> Result {
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    busybox_tree(&at("0"))?;
    let mut layers = vec![archive(&at("0"))?];
    for number in 1..MANY {
        let numbers = at(&number.to_string()).join("numbers");
        std::fs::create_dir_all(&numbers)?;
        write(numbers.join(number.to_string()), format!("{number}\n"))?;
        write(numbers.with_file_name("last"), format!("{number}\n"))?;
        if number % 2 == 0 {
            write(numbers.join(format!(".wh.{}", number - 1)), "")?;
        }
        layers.push(archive(&at(&number.to_string()))?);
    }
    let config = json!({ "Env": ["PATH=/bin"] });
    create_dir(at("layout"))?;
    Image { name: MANY_NAME, architecture: "amd64", config, layers }.write(&at("layout"))?;
    write(at("layered.tar"), archive(&at("layout"))?)?;
    tool(&mut ctr([
        OsStr::new("image"),
        OsStr::new("import"),
        OsStr::new("--no-unpack"),
        at("layered.tar").as_os_str(),
    ]))
    .map(drop)
}

/// The images that a VMM has open.
fn images_of(vmm: u32) -> Result<usize> {
    let mut images = 0;
    for descriptor in read_dir(format!("/proc/{vmm}/fd"))? {
        // One may have been closed meanwhile.
        let Ok(target) = read_link(descriptor?.path()) else { continue };
        images += usize::from(target.ends_with("layer.erofs"));
    }
    Ok(images)
}

fn many() -> Result {
    import_many()?;
    let script = "cat /last; ls /numbers | sort -n | tr '\\n' ' '; cat /numbers/* | sort -n | tail -n 1; \
                  rm /numbers/2 && echo new >/numbers/1 && cat /numbers/1 && ls /numbers | wc -l";
    let even = (2..MANY).step_by(2).map(|number| number.to_string()).collect::<Vec<_>>().join(" ");
    let top = MANY - 1;
    // The topmost one is odd, and none above it removes it.
    let expected = format!("{top}\n{even} {top} {top}\nnew\n{}\n", MANY / 2);

    let runtime = runtime();
    let run = ["run", "--runtime", &runtime, "--snapshotter", "erofs"];
    let program = [MANY_NAME, "once", "sh", "-c", script];
    let output = ctr([&run[..], &["--rm"], &program].concat()).output()?;
    expect_code(&output, 0)?;
    ensure(stdout(&output) == expected, || format!("{output:?}"))?;

    // The disk of so many partitions is plugged into a machine that runs.
    let pod = pods::sandbox("pod", &["--snapshotter", "erofs"])?;
    let membership = pods::membership("pod")?;
    let options: Vec<_> = membership.iter().map(String::as_str).collect();
    let program = [MANY_NAME, "member", "sleep", "1000"];
    expect_code(&ctr([&run[..], &["--detach"], &options, &program].concat()).output()?, 0)?;
    let member = Container::of("member");
    if !is_runc() {
        let vmm = tasks()?.remove("pod").ok_or("no pod")?.0;
        // The pod's own root is one layer of another image.
        let images = images_of(vmm)?;
        ensure(images == MANY + 1, || format!("the VMM has {images} images"))?;
        let servers = processes_called("bulkhead-fs", "--control-fd")?;
        ensure(servers.is_empty(), || format!("files are shared: {servers:?}"))?;
    }
    let output = member.exec(&["sh", "-c", script])?;
    ensure(stdout(&output) == expected, || format!("{output:?}"))?;
    member.end()?;
    pod.end()?;
    expect_code(&ctr(["image", "delete", "--sync", MANY_NAME]).output()?, 0)
}

/// What the snapshotter makes of an image with one layer, made by hand.
struct Snapshot {
    directory: tempfile::TempDir,
}

impl Snapshot {
    /// With this beside the mounted layer: an image if it is none.
    fn new(beside: Option<&str>) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let snapshot = Self { directory };
        let [tree, layer, own] = ["tree", "layer", "own"].map(|name| snapshot.at(name));
        busybox_tree(&tree)?;
        for directory in [&layer, &layer.join("fs"), &own, &own.join("fs"), &own.join("work")] {
            create_dir(directory)?;
        }
        let image = if beside.is_some() { snapshot.at("image") } else { layer.join("layer.erofs") };
        tool(Command::new("mkfs.erofs").arg("--quiet").arg(&image).arg(&tree))?;
        if let Some(content) = beside {
            write(layer.join("layer.erofs"), content)?;
        }
        tool(Command::new("mount").args(["-t", "erofs", "-o", "ro,loop"]).arg(image).arg(layer.join("fs")))?;
        Ok(snapshot)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn upper(&self) -> PathBuf {
        self.at("own").join("fs")
    }

    /// As the request to create a task has it.
    fn mount(&self) -> Mount {
        let option = |name: &str, path: &Path| format!("{name}={}", path.display());
        Mount {
            type_: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options: vec![
                option("workdir", &self.at("own").join("work")),
                option("upperdir", &self.upper()),
                option("lowerdir", &self.at("layer").join("fs")),
            ],
            ..Mount::default()
        }
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        // What is still mounted is found by the check for residue.
        let _ = Command::new("umount").arg(self.at("layer").join("fs")).status();
    }
}

/// Runs a container that writes `/file`, and looks at it, by its process, before it is started.
fn write_into(snapshot: &Snapshot, look: impl Fn(u32) -> Result) -> Result {
    let bundle = Bundle::new("layered", &["sh", "-c", "echo text >/file; exit 5"])?;
    let shim = bundle.start_shim()?;
    let created = shim.create(&CreateTaskRequest { rootfs: vec![snapshot.mount()], ..bundle.request() })?;
    let looked = look(created.pid);
    shim.start(bundle.id(), "")?;
    let code = shim.wait(bundle.id(), "")?;
    shim.delete(bundle.id(), "")?;
    shim.shutdown(bundle.id())?;
    bundle.clean_up()?;
    looked?;
    ensure(code == 5, || format!("exit code {code}"))
}

fn mounts() -> Result<usize> {
    Ok(read_to_string("/proc/self/mountinfo")?.lines().count())
}

fn beside() -> Result {
    let snapshot = Snapshot::new(None)?;
    let before = mounts()?;
    write_into(&snapshot, |pid| {
        if is_runc() {
            return Ok(());
        }
        let images = images_of(pid)?;
        ensure(images == 1, || format!("the VMM has {images} images"))?;
        let mounts = mounts()?;
        ensure(mounts == before, || format!("{before} mounts, then {mounts}"))
    })?;
    // What is written is the guest's business.
    let written = snapshot.upper().join("file").exists();
    ensure(written == is_runc(), || format!("written on the host: {written}"))?;
    if is_runc() {
        return Ok(());
    }
    // There is no file system of both, so neither is passed over.
    write(snapshot.upper().join("copied"), "into it\n")?;
    let bundle = Bundle::new("layered", &["true"])?;
    let shim = bundle.start_shim()?;
    let refused = shim.create(&CreateTaskRequest { rootfs: vec![snapshot.mount()], ..bundle.request() });
    shim.shutdown(bundle.id())?;
    bundle.clean_up()?;
    let error = refused.err().ok_or("a root in two halves")?.to_string();
    ensure(error.contains("cannot be had together"), || error)
}

fn not_beside() -> Result {
    let snapshot = Snapshot::new(Some("no image\n"))?;
    write_into(&snapshot, |_| Ok(()))?;
    let written = read_to_string(snapshot.upper().join("file"))?;
    ensure(written == "text\n", || written)
}
