//! From the spawn of the VMM to the agent's ready, and what the VMM's process weighs then.

use std::time::{Duration, Instant};

use bulkhead_tests::vm::{Plan, Result, Vm, proc_file};
use bulkhead_vmm::control::message::Reply;
use bulkhead_vmm::server::now_ns;

use crate::Row;

const RUNS: usize = 5;

pub(crate) fn measure() -> Result<Vec<Row>> {
    let plan =
        Plan { cmdline: format!("{} quiet loglevel=0", bulkhead_tests::vm::CMDLINE), ..Plan::default() };
    let mut totals = Vec::new();
    let mut parts: [Vec<Duration>; 4] = Default::default();
    let mut memory = 0.0;
    for _ in 0..RUNS {
        let spawned = now_ns();
        let start = Instant::now();
        let mut vm = Vm::boot(&plan)?;
        vm.wait_ready()?;
        totals.push(start.elapsed());
        let ready = now_ns();
        if let Reply::Running { started_ns, configured_ns, entered_ns } = vm.running() {
            let stamps = [spawned, started_ns, configured_ns, entered_ns, ready];
            for (part, pair) in parts.iter_mut().zip(stamps.windows(2)) {
                part.push(Duration::from_nanos(pair[1] - pair[0]));
            }
        }
        memory = overhead_kib(&vm, plan.memory_mib)?;
    }
    let mut rows =
        vec![Row::ms("VMM spawn to agent ready (1 vCPU, 256 MiB, 4 devices and a console)", totals)];
    let names = ["  process", "  jail and request", "  KVM, devices, kernel loaded", "  kernel and agent"];
    rows.extend(names.iter().zip(parts).map(|(name, part)| Row::ms(name, part)));
    rows.push(Row::new("VMM memory beyond the guest's", memory / 1024.0, "MiB"));
    Ok(rows)
}

/// Resident memory of the VMM but for the guest's, in KiB.
fn overhead_kib(vm: &Vm, memory_mib: u32) -> Result<f64> {
    let smaps = proc_file(vm.pid(), "smaps")?;
    let guest = format!("Size: {} kB", memory_mib * 1024);
    let (mut sum, mut skip) = (0.0, false);
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["Size:", ..] => skip = words.join(" ") == guest,
            ["Rss:", size, _] if !skip => sum += size.parse::<f64>()?,
            _ => {}
        }
    }
    Ok(sum)
}
