//! What the benchmarks ran on and beside.

use std::fs::read_to_string;
use std::process::Command;

use bulkhead_tests::bulkhead::bulkhead;
use bulkhead_tests::vm::Result;
use serde_json::{Value, json};

use crate::microvm::QEMU;
use crate::repeat::{RUNS, stdout_of};

pub(crate) fn describe() -> Result<Value> {
    let version = |program: &str| -> Result<String> {
        let text = stdout_of(Command::new(program).arg("--version"))?;
        Ok(text.lines().next().unwrap_or_default().to_owned())
    };
    let file = |path: &str| read_to_string(path).map(|text| text.trim().to_owned());
    let instructions = file("/proc/cmdline")?.split(' ').any(|word| word == "lab.boot=bench");
    Ok(json!({
        "clock": if instructions { "instructions of the lab, one a nanosecond" } else { "wall" },
        // Tells the version of the QEMU that the lab runs in.
        "machine": file("/sys/class/dmi/id/product_version").unwrap_or_default(),
        "processor": processor(&file("/proc/cpuinfo")?),
        "kernel": file("/proc/sys/kernel/osrelease")?,
        "bulkhead": stdout_of(&mut bulkhead(["version"]))?.lines().map(columns).collect::<Value>(),
        "qemu": version(QEMU)?,
        "crun": version("crun")?,
        "containerd": version("containerd")?,
        "runtime": bulkhead_tests::ctr::runtime(),
        "runs": RUNS,
    }))
}

fn columns(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn processor(cpuinfo: &str) -> &str {
    let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
    name.unwrap_or_default().trim_start_matches([' ', '\t', ':'])
}
