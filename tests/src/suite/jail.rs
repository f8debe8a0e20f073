//! A VMM has no privileges, and nothing of the host but what it was handed.

use std::collections::BTreeSet;
use std::fs::{read_dir, read_link};

use bulkhead_tests::vm::{JAIL_ID, Plan, Result, Vm, ensure, proc_file};
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("jail: uid, groups, capabilities and no_new_privs of every thread", identity),
        trial("jail: the root is empty and read-only", root),
        trial("jail: namespaces are the VMM's own but for the network", namespaces),
        trial("jail: only descriptors that were handed over are open", descriptors),
    ]
}

fn identity() -> Result {
    let vm = Vm::ready(&Plan::default())?;
    let mut threads = 0;
    for task in read_dir(format!("/proc/{}/task", vm.pid()))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(|value| value.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
                .unwrap_or_default()
        };
        let id = JAIL_ID.to_string();
        ensure(field("Uid") == vec![id.clone(); 4], || format!("uids: {:?}", field("Uid")))?;
        ensure(field("Gid") == vec![id.clone(); 4], || format!("gids: {:?}", field("Gid")))?;
        ensure(field("Groups").is_empty(), || format!("groups: {:?}", field("Groups")))?;
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            ensure(field(set) == ["0000000000000000"], || format!("{set}: {:?}", field(set)))?;
        }
        ensure(field("NoNewPrivs") == ["1"], || "no_new_privs is not set".to_owned())?;
        threads += 1;
    }
    ensure(threads >= 3, || format!("{threads} threads: main, devices and a vCPU were expected"))
}

fn root() -> Result {
    let vm = Vm::ready(&Plan::default())?;
    let entries: Vec<_> = read_dir(format!("/proc/{}/root", vm.pid()))?.collect();
    ensure(entries.is_empty(), || format!("the root holds {entries:?}"))?;
    let mounts = proc_file(vm.pid(), "mountinfo")?;
    ensure(mounts.lines().count() == 1, || format!("mounts:\n{mounts}"))?;
    ensure(mounts.contains(" ro,nosuid,nodev,noexec"), || format!("mounts:\n{mounts}"))
}

fn namespaces() -> Result {
    let vm = Vm::ready(&Plan::default())?;
    let shared = |name: &str| -> Result<bool> {
        Ok(read_link(format!("/proc/{}/ns/{name}", vm.pid()))? == read_link(format!("/proc/self/ns/{name}"))?)
    };
    for name in ["mnt", "ipc", "uts", "cgroup"] {
        ensure(!shared(name)?, || format!("the {name} namespace is the host's"))?;
    }
    ensure(shared("net")?, || "the network namespace is not the owner's".to_owned())
}

fn descriptors() -> Result {
    let vm = Vm::ready(&Plan::default())?;
    let mut kinds = BTreeSet::new();
    for entry in read_dir(format!("/proc/{}/fd", vm.pid()))? {
        let target = read_link(entry?.path())?.to_string_lossy().into_owned();
        kinds.insert(target.split(':').next().unwrap_or_default().trim_end_matches(" (deleted)").to_owned());
    }
    let guest = Plan::default().root.to_string_lossy().into_owned();
    let allowed = ["/dev/kvm", "/dev/null", "anon_inode", "socket", "/memfd", "pipe", &guest];
    let unexpected: Vec<_> = kinds.iter().filter(|kind| !allowed.contains(&kind.as_str())).collect();
    // The console, the standard output and error of the test itself.
    let own: BTreeSet<String> = (0..3)
        .filter_map(|fd| read_link(format!("/proc/self/fd/{fd}")).ok())
        .map(|path| path.to_string_lossy().into_owned())
        .collect();
    let unexpected: Vec<_> = unexpected.into_iter().filter(|kind| !own.contains(*kind)).collect();
    ensure(unexpected.is_empty(), || format!("open: {unexpected:?}"))
}
