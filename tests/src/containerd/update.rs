//! Limits that are changed while a container runs.

use std::cell::Cell;
use std::fs::read_to_string;
use std::path::Path;

use bulkhead_tests::ctr::{Bundle, Code, Events, Shim, in_background};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("update: limits of memory, CPUs and processes are others inside, too", inside),
        trial("update: a container beyond a limit of processes that came later forks no more", processes),
        trial("update: a process beyond a limit of memory that came later is killed", memory),
        trial("update: what cannot be enforced is refused, and what there was holds", refused),
    ]
}

/// A running task of a bundle of our own, whose control group is mounted inside.
struct Task {
    bundle: Bundle,
    shim: Shim,
    execs: Cell<u32>,
}

const ID: &str = "changing";

impl Task {
    fn start(resources: &Value) -> Result<Self> {
        let bundle = Bundle::new(ID, &["sleep", "1000"])?;
        let mut spec = bundle.spec()?;
        let add = |list: &mut Value, item: Value| list.as_array_mut().expect("a list").push(item);
        add(&mut spec["linux"]["namespaces"], json!({ "type": "cgroup" }));
        for (kind, place) in [("sysfs", "/sys"), ("cgroup", "/sys/fs/cgroup")] {
            add(&mut spec["mounts"], json!({ "type": kind, "source": kind, "destination": place }));
        }
        spec["linux"]["resources"] = resources.clone();
        bundle.configure(&spec)?;
        let shim = bundle.start_shim()?;
        shim.create(&bundle.request()).map_err(|error| format!("create: {error}; {}", bundle.log()))?;
        shim.start(ID, "")?;
        Ok(Self { bundle, shim, execs: Cell::new(0) })
    }

    fn update(&self, resources: &Value) -> Result {
        Ok(self.shim.update(ID, resources)?)
    }

    /// Runs a command inside: its exit code, and what it has written.
    fn run(&self, script: &str) -> Result<(u32, String)> {
        let exec = format!("exec-{}", self.execs.replace(self.execs.get() + 1));
        // The root is a directory of the host, in which the host does not change what the container knows.
        let said = self.bundle.path().join("rootfs").join(&exec);
        self.shim.exec(ID, &exec, &["sh", "-c", &format!("exec >/{exec} 2>&1; {script}")], Path::new(""))?;
        self.shim.start(ID, &exec)?;
        let code = self.shim.wait(ID, &exec)?;
        self.shim.delete(ID, &exec)?;
        Ok((code, read_to_string(said)?))
    }

    /// What the files of its control group say inside.
    fn limits(&self) -> Result<Vec<String>> {
        let (_, said) =
            self.run("cd /sys/fs/cgroup && cat memory.max pids.max cpu.max cpu.weight; cat cpuset.cpus")?;
        Ok(said.lines().map(str::to_owned).collect())
    }

    fn end(self) -> Result {
        self.shim.kill(ID, "", 9)?;
        self.shim.wait(ID, "")?;
        self.shim.delete(ID, "")?;
        self.shim.shutdown(ID)?;
        self.bundle.clean_up()
    }
}

fn inside() -> Result {
    let task = Task::start(&json!({
        "memory": { "limit": 256 << 20 }, "pids": { "limit": 100 }, "cpu": { "quota": 80000, "period": 100_000 },
    }))?;
    let before = task.limits()?;
    let expected = ["268435456", "100", "80000 100000", "100", ""];
    ensure(before == expected, || format!("{before:?}, not {expected:?}"))?;
    task.update(&json!({
        "memory": { "limit": 128 << 20 }, "pids": { "limit": 50 },
        "cpu": { "quota": 30000, "period": 100_000, "shares": 8192, "cpus": "0" },
    }))?;
    let after = task.limits()?;
    ensure(after[..3] == ["134217728", "50", "30000 100000"] && after[4] == "0", || format!("{after:?}"))?;
    // Which weight that is depends on the runtime's version; for eight times the usual shares it is more than the usual one.
    let weight: u32 = after[3].parse()?;
    ensure(weight > 100, || format!("weight {weight}"))?;
    // What is not mentioned stays.
    task.update(&json!({ "pids": { "limit": 60 } }))?;
    let last = task.limits()?;
    ensure(last[1] == "60" && last[0] == after[0] && last[2..] == after[2..], || format!("{last:?}"))?;
    task.end()
}

fn processes() -> Result {
    let task = Task::start(&json!({}))?;
    let script = "for n in 1 2 3 4 5 6 7 8; do sleep 1000 & done; echo all";
    let (code, said) = task.run(script)?;
    ensure((code, said.as_str()) == (0, "all\n"), || format!("{code}: {said}"))?;
    // runc's own threads count while they enter the container.
    task.update(&json!({ "pids": { "limit": 16 } }))?;
    let (code, said) = task.run(&script.replace("sleep", "exec sleep"))?;
    ensure(code != 0 && said.contains("can't fork"), || format!("{code}: {said}"))?;
    task.update(&json!({ "pids": { "limit": -1 } }))?;
    let (code, said) = task.run(script)?;
    ensure((code, said.as_str()) == (0, "all\n"), || format!("{code}: {said}"))?;
    task.end()
}

fn memory() -> Result {
    let events = Events::listen()?;
    let container = in_background("host", &["--memory-limit", "268435456"], &["sleep", "1000"])?;
    // The last doubling takes 96 MiB, and what that leaves is more than any runtime's own part of an exec.
    let script = "BEGIN { s = \"x\"; while (length(s) < 67108864) s = s s; print length(s) }";
    let output = container.exec(&["awk", script])?;
    ensure(output.stdout == b"67108864\n", || format!("{output:?}"))?;
    container.shim()?.update("host", &json!({ "memory": { "limit": 64 << 20 } }))?;
    let output = container.exec(&["awk", script])?;
    ensure(output.status.code() == Some(137), || format!("{output:?}"))?;
    container.end()?;
    let seen = events.until("/tasks/delete")?;
    ensure(seen.iter().any(|(topic, _)| topic == "/tasks/oom"), || format!("{seen:?}"))
}

fn refused() -> Result {
    let task = Task::start(&json!({ "pids": { "limit": 100 } }))?;
    let before = task.limits()?;
    for bad in [json!("{"), json!({ "pids": { "limit": "many" } }), json!({ "cpu": { "cpus": "5-4" } })] {
        ensure(task.update(&bad).is_err(), || format!("{bad} was taken"))?;
    }
    let after = task.limits()?;
    ensure(after == before, || format!("{before:?}, then {after:?}"))?;
    Shim::expect("unknown", task.shim.update("stranger", &json!({})), Code::NOT_FOUND)?;
    task.end()
}
