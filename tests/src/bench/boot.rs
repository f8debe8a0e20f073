//! From the spawn of the VMM to the agent's ready, and what the VMM's process weighs then.

use std::time::{Duration, Instant};

use bulkhead_tests::vm::{CMDLINE, Plan, Result, Vm};
use bulkhead_vmm::control::message::Reply;
use bulkhead_vmm::server::now_ns;

use crate::memory::beyond_guest;
use crate::microvm::Microvm;
use crate::repeat::repeat;
use crate::report::{Bar, Row};

/// The command line that both machines boot with, as quiet as the launcher's.
pub(crate) const QUIET: [&str; 2] = [CMDLINE, "quiet loglevel=4"];

const PARTS: [&str; 4] = ["process", "jail and request", "KVM, devices, kernel loaded", "kernel and agent"];

struct Boot {
    total: Duration,
    parts: [Duration; 4],
    memory: u64,
}

pub(crate) fn measure() -> Result<Vec<Row>> {
    let plan = Plan { cmdline: QUIET.join(" "), ..Plan::default() };
    let own = repeat(|| boot(&plan))?;
    let peer = repeat(|| Microvm::boot(&plan))?;
    let all = |part: &dyn Fn(&Boot) -> Duration| own.iter().map(part).collect::<Vec<_>>();
    let peer_times: Vec<Duration> = peer.iter().map(|peer| peer.ready).collect();
    let peer_memory: Vec<u64> = peer.iter().map(|peer| peer.memory).collect();
    let mut rows = vec![
        Row::ms("VMM spawn to agent ready, 1 vCPU, 256 MiB", &all(&|boot| boot.total))
            .beside("QEMU microvm", &peer_times)
            .bar(Bar::AtMost(100.0)),
    ];
    rows.extend(
        PARTS.iter().enumerate().map(|(i, part)| Row::ms(format!("  {part}"), &all(&|boot| boot.parts[i]))),
    );
    rows.push(
        Row::ms("  all of it again, as a part of the peer's", &all(&|boot| boot.total))
            .beside("QEMU microvm", &peer_times)
            .bar(Bar::TimesPeer(1.0)),
    );
    let memory: Vec<u64> = own.iter().map(|boot| boot.memory).collect();
    rows.push(
        Row::mib("VMM memory beyond the guest's", &memory)
            .beside_mib("QEMU microvm", &peer_memory)
            .bar(Bar::AtMost(5.0)),
    );
    Ok(rows)
}

fn boot(plan: &Plan) -> Result<Boot> {
    let spawned = now_ns();
    let start = Instant::now();
    let mut vm = Vm::boot(plan)?;
    vm.wait_ready()?;
    let (total, ready) = (start.elapsed(), now_ns());
    let Reply::Running { started_ns, configured_ns, entered_ns } = vm.running() else {
        return Err("the VMM did not say when it started the machine".into());
    };
    let stamps = [spawned, started_ns, configured_ns, entered_ns, ready];
    let parts = std::array::from_fn(|i| Duration::from_nanos(stamps[i + 1] - stamps[i]));
    Ok(Boot { total, parts, memory: beyond_guest(vm.pid(), plan.memory_mib)? })
}
