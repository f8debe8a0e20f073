//! Several containers of one pod.

use std::fs::{create_dir, read_to_string, write};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::bulkhead::{eventually, expect_code, stderr, stdout};
use bulkhead_tests::ctr::{
    Container, NAMESPACE, in_background, is_runc, processes_called, run_command, status, tasks,
};
use bulkhead_tests::files::tool;
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{major, minor, stat};
use nix::unistd::Pid;

use crate::roots::{KeptTree, Loop};
use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("pods: containers of a pod share a shim, a network and a hostname, not a root", shared),
        trial("pods: a container of a pod ends and is deleted without the others", one_ends),
        trial("pods: a container that is deleted leaves a directory of the host as it was", root_kept),
        trial("pods: a directory that containers have in common is one, where they meet", in_common),
        trial("pods: the shared memory of a pod is that of all its containers", shared_memory),
        trial("pods: a container joins after another one has gone", joins_later),
        trial("pods: a container joins after the machine has been killed", joins_after_kill),
        trial("pods: who reads much at once from a slow disk is killed, and the others go on", slow_reader),
        trial(
            "pods: an annotation that is not allowed is refused in a container that joins, too",
            annotations,
        ),
    ]
}

/// The container that holds a pod together, as Kubernetes makes it.
pub(crate) fn sandbox(id: &str, options: &[&str]) -> Result<Container> {
    let own = [
        "--annotation",
        "io.kubernetes.cri.container-type=sandbox",
        "--annotation",
        &format!("io.kubernetes.cri.sandbox-id={id}"),
        "--hostname",
        "pod",
    ];
    in_background(id, &[&own, options].concat(), &["sleep", "1000"])
}

/// One more container of the pod.
fn member(pod: &str, id: &str, options: &[&str], program: &[&str]) -> Result<Container> {
    let membership = membership(pod)?;
    let membership: Vec<_> = membership.iter().map(String::as_str).collect();
    in_background(id, &[&membership, options].concat(), program)
}

/// The options that make a container one of the pod.
pub(crate) fn membership(pod: &str) -> Result<Vec<String>> {
    let pid = tasks()?.remove(pod).ok_or("no pod")?.0;
    let annotations = ["container-type=container".to_owned(), format!("sandbox-id={pod}")]
        .map(|annotation| ["--annotation".to_owned(), format!("io.kubernetes.cri.{annotation}")]);
    let joined = [("network", "net"), ("ipc", "ipc"), ("uts", "uts")]
        .map(|(kind, file)| ["--with-ns".to_owned(), format!("{kind}:/proc/{pid}/ns/{file}")]);
    Ok([annotations.concat(), joined.concat()].concat())
}

fn shims() -> Result<usize> {
    Ok(processes_called("containerd-shim", NAMESPACE)?.len())
}

fn shared() -> Result {
    let pod = sandbox("pod", &[])?;
    let server = member(
        "pod",
        "server",
        &[],
        &["sh", "-c", "echo mine >/file; while :; do nc -l -p 80 -e cat /file; done"],
    )?;
    let client = member("pod", "client", &[], &["sleep", "1000"])?;
    let (shims, machines) = (shims()?, processes_called("bulkhead-vmm", "--control-fd")?.len());
    ensure(shims == 1 && (is_runc() || machines == 1), || format!("{shims} shims, {machines} machines"))?;
    let script = "timeout 60 sh -c 'until nc 127.0.0.1 80 2>/dev/null; do sleep 0.1; done'; test ! -e /file && hostname";
    let output = client.exec(&["sh", "-c", script])?;
    ensure(stdout(&output) == "mine\npod\n", || format!("{output:?}"))?;
    for container in [client, server, pod] {
        container.end()?;
    }
    Ok(())
}

fn one_ends() -> Result {
    let pod = sandbox("pod", &[])?;
    let short = member("pod", "short", &[], &["sh", "-c", "exit 3"])?;
    let code = short.wait()?;
    ensure(code == 3, || format!("exit code {code}"))?;
    short.delete()?;
    ensure(status("pod")? == "RUNNING", || "the pod has ended, too".to_owned())?;
    expect_code(&pod.exec(&["true"])?, 0)?;
    pod.end()
}

fn annotations() -> Result {
    let pod = sandbox("pod", &[])?;
    let membership = membership("pod")?;
    let mut options: Vec<_> = membership.iter().map(String::as_str).collect();
    options.extend(["--rm", "--annotation", "io.bulkhead.vm.cpus=2"]);
    let output = run_command("joining", &options, &["true"])?.output()?;
    // To runc it means nothing.
    if is_runc() {
        expect_code(&output, 0)?;
    } else {
        expect_code(&output, 1)?;
        let said = stderr(&output);
        ensure(said.contains("the annotation io.bulkhead.vm.cpus is not allowed"), || said)?;
    }
    expect_code(&pod.exec(&["true"])?, 0)?;
    pod.end()
}

/// A mounted disk of 64 MiB with a file that takes up half of it.
struct SlowDisk {
    directory: tempfile::TempDir,
    disk: Loop,
}

impl SlowDisk {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let [image, tree, mounted] = ["image", "tree", "mounted"].map(|name| directory.path().join(name));
        create_dir(&tree)?;
        create_dir(&mounted)?;
        write(tree.join("large"), vec![1; 32 << 20])?;
        tool(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&image).arg("64M"))?;
        let disk = Loop::new(&image)?;
        mount(Some(disk.name()), &mounted, Some("ext4"), MsFlags::empty(), None::<&str>)?;
        Ok(Self { directory, disk })
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("mounted")
    }

    /// Lets a control group read a megabyte in a second. Returns its file that tells how much it has read of what.
    fn limit(&self, group: &Path) -> Result<PathBuf> {
        let device = stat(self.disk.name())?.st_rdev;
        write(group.join("io.max"), format!("{}:{} rbps=1000000", major(device), minor(device)))?;
        Ok(group.join("io.stat"))
    }
}

impl Drop for SlowDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.path(), MntFlags::empty());
    }
}

fn slow_reader() -> Result {
    let disk = SlowDisk::new()?;
    let pod = sandbox("pod", &[])?;
    let bind = format!("type=bind,src={},dst=/disk,options=rbind", disk.path().display());
    let script = "until test -e /disk/go; do sleep 0.1; done; exec dd if=/disk/large of=/dev/null bs=32M";
    let reader = member("pod", "reader", &["--mount", &bind], &["sh", "-c", script])?;
    // Who reads for it is in the pod's group.
    let group = if is_runc() { "reader" } else { "pod" };
    let read = disk.limit(&Path::new("/sys/fs/cgroup").join(NAMESPACE).join(group))?;
    write(disk.path().join("go"), "")?;
    eventually("the disk is read", || Ok(read_to_string(&read)?.contains(" rbytes=")))?;
    reader.kill("KILL")?;
    let code = reader.wait()?;
    ensure(code == 137, || format!("exit code {code}"))?;
    reader.delete()?;
    expect_code(&pod.exec(&["true"])?, 0)?;
    pod.end()
}

fn root_kept() -> Result {
    let tree = KeptTree::new()?;
    let pod = sandbox("pod", &[])?;
    for _ in 0..2 {
        let membership = membership("pod")?;
        let mut options: Vec<_> = membership.iter().map(String::as_str).collect();
        options.extend(["--env", "PATH=/bin", "--rootfs", tree.root()?]);
        let member =
            in_background("member", &options, &["sh", "-c", "echo text >>/written; exec sleep 1000"])?;
        expect_code(&member.exec(&["test", "-s", "/written"])?, 0)?;
        member.end()?;
        tree.all_there()?;
    }
    let written = std::fs::read_to_string(tree.path.join("written"))?;
    ensure(written == "text\ntext\n", || format!("{written:?}"))?;
    pod.end()
}

/// Who opens a fifo waits for another who opens the same one: were the directory another file system to each, nobody would come.
fn in_common() -> Result {
    let shared = tempfile::tempdir()?;
    let bind = |options| format!("type=bind,src={},dst=/shared,options={options}", shared.path().display());
    let (writable, read_only) = (bind("rbind:rw"), bind("rbind:ro"));
    let says = ["sh", "-c", "mkfifo /shared/fifo; while :; do echo text >/shared/fifo; done"];
    let hears = ["timeout", "60", "head", "-n", "1", "/shared/fifo"];
    let pod = sandbox("pod", &[])?;
    let speaker = member("pod", "speaker", &["--mount", &writable], &says)?;
    let other = member("pod", "other", &["--mount", &writable], &["sleep", "1000"])?;
    let reader = member("pod", "reader", &["--mount", &read_only], &["sleep", "1000"])?;
    eventually("the fifo is there", || Ok(shared.path().join("fifo").exists()))?;
    for listener in [&other, &reader] {
        let heard = listener.exec(&hears)?;
        ensure(stdout(&heard) == "text\n", || format!("{heard:?}"))?;
    }
    expect_code(&reader.exec(&["sh", "-c", "! touch /shared/new"])?, 0)?;
    // The one that brought the directory goes; the others have it still, and one that comes has the same.
    speaker.end()?;
    expect_code(&other.exec(&["touch", "/shared/new"])?, 0)?;
    expect_code(&reader.exec(&["test", "-e", "/shared/new"])?, 0)?;
    let again = member("pod", "speaker", &["--mount", &writable], &says)?;
    let heard = reader.exec(&hears)?;
    ensure(stdout(&heard) == "text\n", || format!("{heard:?}"))?;
    for container in [again, reader, other, pod] {
        container.end()?;
    }
    Ok(())
}

/// As containerd's CRI plugin has it: a tmpfs of the host's for each pod.
fn shared_memory() -> Result {
    let directory = tempfile::tempdir()?;
    let shm = directory.path().join("shm");
    std::fs::create_dir(&shm)?;
    mount(Some("shm"), &shm, Some("tmpfs"), MsFlags::empty(), Some("mode=1777,size=1m"))?;
    let tried = share_memory(&shm);
    umount2(&shm, MntFlags::MNT_DETACH)?;
    tried
}

fn share_memory(shm: &Path) -> Result {
    let mounted = format!("type=bind,src={},dst=/dev/shm,options=rbind:rw", shm.display());
    let mounted = ["--mount", mounted.as_str()];
    let pod = sandbox("pod", &mounted)?;
    let (first, second) = (
        member("pod", "first", &mounted, &["sleep", "1000"])?,
        member("pod", "second", &mounted, &["sleep", "1000"])?,
    );
    expect_code(&first.exec(&["sh", "-c", "echo text >/dev/shm/file"])?, 0)?;
    let read =
        second.exec(&["sh", "-c", "cat /dev/shm/file; stat -f -c %T /dev/shm; stat -c %a /dev/shm"])?;
    ensure(stdout(&read) == "text\ntmpfs\n1777\n", || format!("{read:?}"))?;
    let full = second.exec(&["dd", "if=/dev/zero", "of=/dev/shm/much", "bs=1k", "count=2000"])?;
    ensure(stderr(&full).contains("No space left"), || format!("{full:?}"))?;
    for container in [second, first, pod] {
        container.end()?;
    }
    Ok(())
}

fn joins_later() -> Result {
    let pod = sandbox("pod", &[])?;
    for id in ["first", "second"] {
        let container = member("pod", id, &[], &["sleep", "1000"])?;
        expect_code(&container.exec(&["true"])?, 0)?;
        container.end()?;
    }
    ensure(shims()? == 1, || "more than one shim".to_owned())?;
    pod.end()
}

/// With runc it is the first container alone that is killed.
fn joins_after_kill() -> Result {
    let pod = sandbox("pod", &[])?;
    let membership = membership("pod")?;
    let first = member("pod", "first", &[], &["sleep", "1000"])?;
    let pid = tasks()?.remove("pod").ok_or("no pod")?.0;
    // The namespaces are held by the pod's process alone: later containers have their own.
    let annotations: Vec<_> = membership.iter().map(String::as_str).take(4).collect();
    kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    pod.wait()?;
    if !is_runc() {
        first.wait()?;
    }
    let later = in_background("later", &annotations, &["sleep", "1000"])?;
    expect_code(&later.exec(&["true"])?, 0)?;
    // Nobody who cleans up after it has the shim to himself: what is left of its cgroup stays.
    pod.delete()?;
    if is_runc() {
        first.end()?;
    } else {
        first.delete()?;
    }
    later.end()
}
