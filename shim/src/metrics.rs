//! What a container uses, as containerd's metrics of cgroup v2.

use std::collections::HashMap;

use bulkhead_sandbox::agent::messages::StatsContainerResponse;
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};

/// Most block devices that are told of: a guest has fewer, but its words are bounded here.
const DEVICES_MAX: usize = 64;

/// Translates the agent's answer.
pub(crate) fn metrics(stats: &StatsContainerResponse) -> Metrics {
    Metrics {
        pids: Some(pids(&stats.numbers)).into(),
        cpu: Some(cpu(&stats.cpu)).into(),
        memory: Some(memory(&stats.memory, &stats.numbers)).into(),
        memory_events: Some(memory_events(&stats.memory_events)).into(),
        io: Some(io(stats)).into(),
        ..Default::default()
    }
}

/// The number of a line, 0 when the kernel has none of that name.
fn get(lines: &HashMap<String, u64>, name: &str) -> u64 {
    lines.get(name).copied().unwrap_or(0)
}

/// A limit; the agent leaves out one that says `max`, for which containerd has the largest number.
fn limit(numbers: &HashMap<String, u64>, name: &str) -> u64 {
    numbers.get(name).copied().unwrap_or(u64::MAX)
}

fn pids(numbers: &HashMap<String, u64>) -> PidsStat {
    // Of pids alone, containerd writes 0 for no limit.
    PidsStat { current: get(numbers, "pids.current"), limit: get(numbers, "pids.max"), ..Default::default() }
}

fn cpu(lines: &HashMap<String, u64>) -> CPUStat {
    CPUStat {
        usage_usec: get(lines, "usage_usec"),
        user_usec: get(lines, "user_usec"),
        system_usec: get(lines, "system_usec"),
        nr_periods: get(lines, "nr_periods"),
        nr_throttled: get(lines, "nr_throttled"),
        throttled_usec: get(lines, "throttled_usec"),
        nr_bursts: get(lines, "nr_bursts"),
        burst_usec: get(lines, "burst_usec"),
        ..Default::default()
    }
}

fn memory(lines: &HashMap<String, u64>, numbers: &HashMap<String, u64>) -> MemoryStat {
    MemoryStat {
        anon: get(lines, "anon"),
        file: get(lines, "file"),
        kernel_stack: get(lines, "kernel_stack"),
        slab: get(lines, "slab"),
        sock: get(lines, "sock"),
        shmem: get(lines, "shmem"),
        file_mapped: get(lines, "file_mapped"),
        file_dirty: get(lines, "file_dirty"),
        file_writeback: get(lines, "file_writeback"),
        anon_thp: get(lines, "anon_thp"),
        inactive_anon: get(lines, "inactive_anon"),
        active_anon: get(lines, "active_anon"),
        inactive_file: get(lines, "inactive_file"),
        active_file: get(lines, "active_file"),
        unevictable: get(lines, "unevictable"),
        slab_reclaimable: get(lines, "slab_reclaimable"),
        slab_unreclaimable: get(lines, "slab_unreclaimable"),
        pgfault: get(lines, "pgfault"),
        pgmajfault: get(lines, "pgmajfault"),
        workingset_refault: get(lines, "workingset_refault"),
        workingset_activate: get(lines, "workingset_activate"),
        workingset_nodereclaim: get(lines, "workingset_nodereclaim"),
        pgrefill: get(lines, "pgrefill"),
        pgscan: get(lines, "pgscan"),
        pgsteal: get(lines, "pgsteal"),
        pgactivate: get(lines, "pgactivate"),
        pgdeactivate: get(lines, "pgdeactivate"),
        pglazyfree: get(lines, "pglazyfree"),
        pglazyfreed: get(lines, "pglazyfreed"),
        thp_fault_alloc: get(lines, "thp_fault_alloc"),
        thp_collapse_alloc: get(lines, "thp_collapse_alloc"),
        usage: get(numbers, "memory.current"),
        usage_limit: limit(numbers, "memory.max"),
        max_usage: get(numbers, "memory.peak"),
        swap_usage: get(numbers, "memory.swap.current"),
        swap_limit: limit(numbers, "memory.swap.max"),
        ..Default::default()
    }
}

fn memory_events(lines: &HashMap<String, u64>) -> MemoryEvents {
    MemoryEvents {
        low: get(lines, "low"),
        high: get(lines, "high"),
        max: get(lines, "max"),
        oom: get(lines, "oom"),
        oom_kill: get(lines, "oom_kill"),
        oom_group_kill: get(lines, "oom_group_kill"),
        ..Default::default()
    }
}

fn io(stats: &StatsContainerResponse) -> IOStat {
    let entries = stats.io.iter().take(DEVICES_MAX).map(|device| IOEntry {
        major: device.major,
        minor: device.minor,
        rbytes: device.read_bytes,
        wbytes: device.written_bytes,
        rios: device.reads,
        wios: device.writes,
        ..Default::default()
    });
    IOStat { usage: entries.collect(), ..Default::default() }
}

#[cfg(test)]
mod tests {
    use bulkhead_sandbox::agent::messages::IoStat;

    use super::*;

    #[test]
    fn what_the_guest_says_is_found_again_and_no_limit_is_the_largest_number() {
        let lines =
            |pairs: &[(&str, u64)]| pairs.iter().map(|(name, value)| ((*name).into(), *value)).collect();
        let stats = StatsContainerResponse {
            cpu: lines(&[("usage_usec", 7), ("nr_throttled", 2)]),
            memory: lines(&[("anon", 4096), ("unknown", 1)]),
            memory_events: lines(&[("oom_kill", 3)]),
            numbers: lines(&[("memory.current", 8192), ("pids.current", 2), ("pids.max", 100)]),
            io: vec![IoStat { major: 254, minor: 1, read_bytes: 5, ..Default::default() }; DEVICES_MAX + 1],
            ..Default::default()
        };
        let metrics = metrics(&stats);
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.nr_throttled), (7, 2));
        assert_eq!((metrics.memory.anon, metrics.memory.usage), (4096, 8192));
        assert_eq!((metrics.memory.usage_limit, metrics.memory.swap_limit), (u64::MAX, u64::MAX));
        assert_eq!((metrics.pids.current, metrics.pids.limit), (2, 100));
        assert_eq!(metrics.memory_events.oom_kill, 3);
        assert_eq!((metrics.io.usage.len(), metrics.io.usage[0].rbytes), (DEVICES_MAX, 5));
    }
}
