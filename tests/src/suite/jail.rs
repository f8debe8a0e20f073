//! A VMM has no privileges, and nothing of the host but what it was handed.

use std::fs::{read_dir, read_link};
use std::path::{Path, PathBuf};

use bulkhead_tests::bulkhead::{bulkhead, data_directory, expect_code, image, run_directory, stdout};
use bulkhead_tests::vm::{JAIL_ID, Plan, Result, Vm, ensure, proc_file};
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("jail: uid, groups, capabilities, no_new_privs and seccomp of every thread", || {
            by_hand(|pid| identity(pid, JAIL_ID))
        }),
        trial("jail: the root is empty and read-only", || by_hand(root)),
        trial("jail: namespaces are the VMM's own but for the network", || by_hand(namespaces)),
        trial("jail: only descriptors that were handed over are open", || by_hand(handed_over)),
        trial("jail: a VMM in the background of the launcher is locked up as well", launched),
    ]
}

/// Audits a VMM that the test steers.
fn by_hand(audit: impl FnOnce(u32) -> Result) -> Result {
    let vm = Vm::ready(&Plan::default())?;
    audit(vm.pid())
}

/// The fields of `/proc/PID/status` of one thread.
struct Status(String);

impl Status {
    fn field(&self, name: &str) -> Vec<&str> {
        let line = self.0.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(|value| value.split_whitespace().collect()).unwrap_or_default()
    }
}

fn identity(pid: u32, id: u32) -> Result {
    let mut threads = 0;
    for task in read_dir(format!("/proc/{pid}/task"))? {
        let status = Status(std::fs::read_to_string(task?.path().join("status"))?);
        let field = |name| status.field(name);
        let id = id.to_string();
        ensure(field("Uid") == [&id; 4], || format!("uids: {:?}", field("Uid")))?;
        ensure(field("Gid") == [&id; 4], || format!("gids: {:?}", field("Gid")))?;
        ensure(field("Groups").is_empty(), || format!("groups: {:?}", field("Groups")))?;
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure(field(set) == ["0000000000000000"], || format!("{set}: {:?}", field(set)))?;
        }
        ensure(field("NoNewPrivs") == ["1"], || "no_new_privs is not set".to_owned())?;
        ensure(field("Seccomp") == ["2"], || format!("no filter: {:?}", field("Name")))?;
        // The control thread's filter, and in every other thread one of its own.
        let filters = if field("Pid") == field("Tgid") { "1" } else { "2" };
        ensure(field("Seccomp_filters") == [filters], || {
            format!("{:?}: {:?} filters", field("Name"), field("Seccomp_filters"))
        })?;
        threads += 1;
    }
    ensure(threads >= 3, || format!("{threads} threads: main, devices and a vCPU were expected"))?;
    let limits = proc_file(pid, "limits")?;
    let most =
        |what: &str| limits.lines().find_map(|line| line.strip_prefix(what)?.split_whitespace().next());
    ensure(most("Max processes") == Some("64"), || limits.clone())?;
    ensure(most("Max core file size") == Some("0"), || limits.clone())
}

fn root(pid: u32) -> Result {
    let entries: Vec<_> = read_dir(format!("/proc/{pid}/root"))?.collect();
    ensure(entries.is_empty(), || format!("the root holds {entries:?}"))?;
    let mounts = proc_file(pid, "mountinfo")?;
    ensure(mounts.lines().count() == 1, || format!("mounts:\n{mounts}"))?;
    ensure(mounts.contains(" ro,nosuid,nodev,noexec"), || format!("mounts:\n{mounts}"))
}

fn shares(pid: u32, namespace: &str) -> Result<bool> {
    Ok(read_link(format!("/proc/{pid}/ns/{namespace}"))? == read_link(format!("/proc/self/ns/{namespace}"))?)
}

fn namespaces(pid: u32) -> Result {
    for name in ["mnt", "ipc", "uts", "cgroup"] {
        ensure(!shares(pid, name)?, || format!("the {name} namespace is the host's"))?;
    }
    ensure(shares(pid, "net")?, || "the network namespace is not the owner's".to_owned())
}

/// What the descriptors of a process stand for.
fn open_files(pid: u32) -> Result<Vec<PathBuf>> {
    read_dir(format!("/proc/{pid}/fd"))?.map(|entry| Ok(read_link(entry?.path())?)).collect()
}

/// Checks that nothing is open but what every VMM has, and files at or below `handed`.
fn descriptors(pid: u32, handed: &[PathBuf]) -> Result {
    let usual = ["/dev/kvm", "/dev/null", "anon_inode:", "socket:", "pipe:", "/memfd:console"];
    let unexpected: Vec<PathBuf> = open_files(pid)?
        .into_iter()
        .filter(|path| !usual.iter().any(|usual| path.to_string_lossy().starts_with(usual)))
        .filter(|path| !handed.iter().any(|handed| path.starts_with(handed)))
        .collect();
    ensure(unexpected.is_empty(), || format!("open: {unexpected:?}"))
}

fn handed_over(pid: u32) -> Result {
    // The guest's image, and the test's own standard output and error.
    let own = (0..3).filter_map(|fd| read_link(Path::new("/proc/self/fd").join(fd.to_string())).ok());
    descriptors(pid, &own.chain([Plan::default().root]).collect::<Vec<_>>())
}

fn launched() -> Result {
    image("busybox")?;
    let name = "audited";
    let mut run =
        bulkhead(["run", "-d", "--name", name, "--storage", "64M", "busybox:1", "--", "sleep", "1000"]);
    expect_code(&run.output()?, 0)?;
    let audited = vmm_of(name).and_then(|pid| {
        let uid = Status(proc_file(pid, "status")?).field("Uid").first().map_or(Ok(0), |uid| uid.parse())?;
        ensure(uid != 0, || "it runs as root".to_owned())?;
        identity(pid, uid)?;
        root(pid)?;
        namespaces(pid)?;
        ensure(!shares(pid, "pid")?, || "the pid namespace is the host's".to_owned())?;
        let handed = ["images", "containers"].map(|part| data_directory().join(part));
        let handed = [&handed[..], &[run_directory().join(".uids"), Plan::default().root]].concat();
        descriptors(pid, &handed)
    });
    expect_code(&bulkhead(["stop", "-t", "0", name]).output()?, 0)?;
    expect_code(&bulkhead(["rm", name]).output()?, 0)?;
    audited
}

/// The process id of a container's VMM.
fn vmm_of(container: &str) -> Result<u32> {
    let listed = stdout(&bulkhead(["ps", "--json"]).output()?);
    let rest = listed.split_once(&format!("\"name\": \"{container}\"")).map(|(_, rest)| rest);
    let pid = rest.and_then(|rest| rest.split_once("\"vmm_pid\": ")).map(|(_, pid)| pid);
    let digits = pid.and_then(|pid| pid.split(|c: char| !c.is_ascii_digit()).next());
    Ok(digits.ok_or_else(|| format!("no VMM of {container} in {listed}"))?.parse()?)
}
