//! The host's cgroups of sandboxes: what is in them, what bounds them, and that they go with the container.

use std::fs::read_to_string;
use std::path::Path;

use bulkhead_tests::bulkhead::{bulkhead, detach, eventually, expect_code, run_command, stdout};
use bulkhead_tests::files::config;
use bulkhead_tests::residue::entries;
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::roots::Bundle;
use crate::trial;

const MIB: u64 = 1 << 20;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial(
            "cgroup: VMM and file server are in one that bounds their memory, and that goes with them",
            bounded,
        ),
        trial("cgroup: a bundle has the one that it names, with its CPUs and its shares", named),
        trial("cgroup: that of a killed supervisor is removed by the next command", killed),
        trial("cgroup: without a parent there is none", without),
    ]
}

fn listed(name: &str) -> Result<Value> {
    let rows: Value = serde_json::from_str(&stdout(&bulkhead(["ps", "--json"]).output()?))?;
    let row = rows.as_array().into_iter().flatten().find(|row| row["name"] == name);
    Ok(row.ok_or_else(|| format!("no container {name} in {rows}"))?.clone())
}

/// The group of a process, below the root of all.
fn group_of(pid: u64) -> Result<String> {
    let group = read_to_string(format!("/proc/{pid}/cgroup"))?;
    Ok(group.trim().strip_prefix("0::/").ok_or_else(|| group.clone())?.to_owned())
}

fn setting(group: &str, file: &str) -> Result<String> {
    let path = Path::new("/sys/fs/cgroup").join(group).join(file);
    Ok(read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?.trim().to_owned())
}

fn names(group: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for pid in setting(group, "cgroup.procs")?.lines() {
        names.push(read_to_string(format!("/proc/{pid}/comm"))?.trim().to_owned());
    }
    names.sort();
    Ok(names)
}

fn bounded() -> Result {
    let directory = tempfile::tempdir()?;
    let volume = format!("{}:/data", directory.path().display());
    detach("bounded", &["--memory", "256M", "-v", &volume], &["sleep", "1000"])?;
    let row = listed("bounded")?;
    let group = group_of(row["vmm_pid"].as_u64().ok_or("no VMM")?)?;
    ensure(group == format!("bulkhead/{}", row["id"].as_str().unwrap_or_default()), || group.clone())?;
    let inside = names(&group)?;
    ensure(inside == ["bulkhead-fs", "bulkhead-vmm"], || format!("{inside:?}"))?;
    // The machine, the kernel's account of its pages, and what VMM and file server need.
    let most = setting(&group, "memory.max")?;
    ensure(most == ((256 + 1 + 32 + 64) * MIB).to_string(), || most.clone())?;
    let used: u64 = setting(&group, "memory.current")?.parse()?;
    ensure(used > 8 * MIB, || format!("only {used} bytes are accounted for"))?;
    expect_code(&bulkhead(["stop", "-t", "0", "bounded"]).output()?, 0)?;
    eventually("the cgroup is gone", || Ok(!Path::new("/sys/fs/cgroup").join(&group).exists()))?;
    expect_code(&bulkhead(["rm", "bounded"]).output()?, 0)
}

fn named() -> Result {
    let group = "bulkhead-suite/named";
    let bundle = Bundle::new("sleep 1000", |config| {
        config["linux"]["cgroupsPath"] = json!(format!("/{group}"));
        config["linux"]["resources"] = json!({
            "cpu": { "shares": 1024, "cpus": "0" },
            "memory": { "limit": 128 * MIB }
        });
    })?;
    let output = bulkhead(["run", "-d", "--name", "named", "--bundle"]).arg(bundle.path()).output()?;
    expect_code(&output, 0)?;
    let found = group_of(listed("named")?["vmm_pid"].as_u64().ok_or("no VMM")?)?;
    ensure(found == group, || found)?;
    // As large as the limit and what the guest takes besides: 128 + 4 + 96 MiB.
    for (file, expected) in [
        ("memory.max", ((228 + 228 / 8 + 64) * MIB).to_string()),
        ("cpu.weight", "39".into()),
        ("cpuset.cpus", "0".into()),
    ] {
        let value = setting(group, file)?;
        ensure(value == expected, || format!("{file}: {value}, not {expected}"))?;
    }
    expect_code(&bulkhead(["rm", "-f", "named"]).output()?, 0)?;
    eventually("the cgroup is gone", || Ok(!Path::new("/sys/fs/cgroup").join(group).exists()))?;
    Ok(std::fs::remove_dir("/sys/fs/cgroup/bulkhead-suite")?)
}

fn killed() -> Result {
    detach("headless", &["--rm"], &["sleep", "1000"])?;
    let vmm = listed("headless")?["vmm_pid"].as_u64().ok_or("no VMM")?;
    let status = read_to_string(format!("/proc/{vmm}/status"))?;
    let supervisor =
        status.lines().find_map(|line| line.strip_prefix("PPid:\t")).ok_or_else(|| status.clone())?;
    let group = group_of(vmm)?;
    kill(Pid::from_raw(supervisor.parse()?), Signal::SIGKILL)?;
    eventually("the next command removes the cgroup", || {
        expect_code(&bulkhead(["ps"]).output()?, 0)?;
        Ok(!Path::new("/sys/fs/cgroup").join(&group).exists())
    })
}

fn without() -> Result {
    let directory = tempfile::tempdir()?;
    let config = config(directory.path(), "[cgroups]\nparent = \"\"\n")?;
    let before = entries(Path::new("/sys/fs/cgroup/bulkhead"))?;
    let mut command = run_command(&["--name", "unbound"], &["sleep", "1000"])?;
    let child = command.env("BULKHEAD_CONFIG", config).spawn()?;
    eventually("it runs", || Ok(listed("unbound").is_ok_and(|row| row["vmm_pid"].is_number())))?;
    let vmm = listed("unbound")?["vmm_pid"].as_u64().ok_or("no VMM")?;
    let (group, own) = (group_of(vmm)?, group_of(std::process::id().into())?);
    ensure(group == own, || format!("the VMM is in {group:?}, not in {own:?}"))?;
    ensure(entries(Path::new("/sys/fs/cgroup/bulkhead"))? == before, || "a cgroup was made".into())?;
    expect_code(&bulkhead(["kill", "unbound"]).output()?, 0)?;
    expect_code(&child.wait_with_output()?, 137)
}
