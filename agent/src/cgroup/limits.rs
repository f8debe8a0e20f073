//! What a container may have: from `linux.resources` of a configuration to files of its cgroup.
//!
//! The same for a container that is made and for one whose limits change. What a configuration does not mention, or mentions
//! as zero, stays as it is; -1 is no limit. libcgroups 0.7 is not asked: it has no other way for a container that runs than
//! for one that is made, its errors name neither what was asked nor the device, and its arithmetic overflows for block I/O
//! weights.

use std::path::Path;

use oci_spec::runtime::{
    LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxPids, LinuxResources, LinuxThrottleDevice,
};

use super::Cgroup;
use super::settings::{self, Error, Setting, Value};

/// Limits that can be enforced, as far as is known without a group.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    settings: Vec<Setting>,
    /// The limit that the container must not exceed already.
    check_usage: Option<u64>,
}

impl Limits {
    /// What a `linux.resources` object asks for, in JSON.
    ///
    /// # Errors
    /// [`Error`] names what is wrong or cannot be enforced.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, Error> {
        Self::of(&serde_json::from_slice(json)?)
    }

    /// The same of one that has been parsed. Its `devices` are not looked at.
    ///
    /// # Errors
    /// As [`Limits::parse`].
    pub(crate) fn of(resources: &LinuxResources) -> Result<Self, Error> {
        Self::with(resources, Path::new("/proc/swaps").exists())
    }

    /// A kernel that cannot swap enforces every limit on it, and has no file to write it to.
    fn with(resources: &LinuxResources, swap: bool) -> Result<Self, Error> {
        for (asked, name) in [
            (resources.network().is_some(), "linux.resources.network"),
            (resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()), "linux.resources.rdma"),
        ] {
            if asked {
                return Err(Error::Unsupported(name));
            }
        }
        let mut limits = Self::default();
        if let Some(cpu) = resources.cpu() {
            limits.cpu(cpu)?;
        }
        if let Some(memory) = resources.memory() {
            limits.memory(memory, swap)?;
        }
        if let Some(limit) = resources.pids().as_ref().map(LinuxPids::limit).filter(|&limit| limit != 0) {
            let value = if limit < 0 { "max".into() } else { limit.to_string() };
            limits.set("pids.limit", "pids.max", value);
        }
        if let Some(block) = resources.block_io() {
            limits.block_io(block)?;
        }
        for huge in resources.hugepage_limits().iter().flatten() {
            let size = huge.page_size();
            if !is_page_size(size) {
                return Err(Error::PageSize(size.clone()));
            }
            let value = unlimited("hugepageLimits", huge.limit())?;
            // Kubernetes limits pages of every size that the host has. Reservations are limited as what is used is, as runc does.
            for file in [format!("hugetlb.{size}.max"), format!("hugetlb.{size}.rsvd.max")] {
                let value = Value::Text(value.clone());
                limits.settings.push(Setting { field: "hugepageLimits".into(), file, value, needed: false });
            }
        }
        let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
        unified.sort();
        for (file, value) in unified {
            if file.contains('/') || file.starts_with("cgroup.") || !file.contains('.') {
                return Err(Error::Unified(file.clone()));
            }
            if swap || file != "memory.swap.max" {
                limits.set("unified", file, value.clone());
            }
        }
        Ok(limits)
    }

    fn set(&mut self, field: &str, file: &str, value: String) {
        let value = Value::Text(value);
        self.settings.push(Setting { field: field.into(), file: file.into(), value, needed: true });
    }

    fn cpu(&mut self, cpu: &LinuxCpu) -> Result<(), Error> {
        // cgroup v2 has no such limits.
        if cpu.realtime_runtime().is_some_and(|runtime| runtime != 0) {
            return Err(Error::Unsupported("cpu.realtimeRuntime"));
        }
        if cpu.realtime_period().is_some_and(|period| period != 0) {
            return Err(Error::Unsupported("cpu.realtimePeriod"));
        }
        if let Some(shares) = cpu.shares().filter(|&shares| shares != 0) {
            self.set("cpu.shares", "cpu.weight", weight_of_shares(shares).to_string());
        }
        if let Some(burst) = cpu.burst() {
            self.set("cpu.burst", "cpu.max.burst", burst.to_string());
        }
        let period = cpu.period().filter(|&period| period != 0);
        let quota = cpu.quota().filter(|&quota| quota != 0);
        match (quota.map(|quota| if quota < 0 { "max".into() } else { quota.to_string() }), period) {
            (Some(quota), Some(period)) => self.set("cpu.quota", "cpu.max", format!("{quota} {period}")),
            // The kernel leaves the period as it is.
            (Some(quota), None) => self.set("cpu.quota", "cpu.max", quota),
            (None, Some(period)) => self.settings.push(Setting {
                field: "cpu.period".into(),
                file: "cpu.max".into(),
                value: Value::Period(period),
                needed: true,
            }),
            (None, None) => {}
        }
        if let Some(idle) = cpu.idle() {
            self.set("cpu.idle", "cpu.idle", idle.to_string());
        }
        for (field, file, list) in
            [("cpu.cpus", "cpuset.cpus", cpu.cpus()), ("cpu.mems", "cpuset.mems", cpu.mems())]
        {
            if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
                self.set(field, file, list.clone());
            }
        }
        Ok(())
    }

    fn memory(&mut self, memory: &LinuxMemory, swap_exists: bool) -> Result<(), Error> {
        #[allow(deprecated)]
        let kernel = memory.kernel().is_some_and(|limit| limit > 0);
        for (asked, name) in [
            (kernel, "memory.kernel"),
            (memory.kernel_tcp().is_some_and(|limit| limit > 0), "memory.kernelTCP"),
            (memory.swappiness().is_some(), "memory.swappiness"),
            (memory.disable_oom_killer() == Some(true), "memory.disableOOMKiller"),
        ] {
            if asked {
                return Err(Error::Unsupported(name));
            }
        }
        let mentioned = |value: Option<i64>| value.filter(|&value| value != 0);
        let limit = mentioned(memory.limit());
        let swap = match (mentioned(memory.swap()), limit) {
            // What may have all memory need not be kept from swapping.
            (Some(-1), _) | (None, Some(-1)) => Some("max".to_owned()),
            // cgroup v2 limits swap alone.
            (Some(both), Some(limit)) if limit > 0 && both >= limit => Some((both - limit).to_string()),
            (Some(both), _) => return Err(Error::Swap(both)),
            (None, _) => None,
        };
        if let Some(swap) = swap.filter(|_| swap_exists) {
            self.set("memory.swap", "memory.swap.max", swap);
        }
        if let Some(limit) = limit {
            self.set("memory.limit", "memory.max", unlimited("memory.limit", limit)?);
            if memory.check_before_update() == Some(true) {
                self.check_usage = u64::try_from(limit).ok();
            }
        }
        if let Some(reservation) = mentioned(memory.reservation()) {
            self.set("memory.reservation", "memory.low", unlimited("memory.reservation", reservation)?);
        }
        Ok(())
    }

    fn block_io(&mut self, block: &LinuxBlockIo) -> Result<(), Error> {
        let devices = block.weight_device().as_deref().unwrap_or_default();
        if block.leaf_weight().is_some_and(|weight| weight > 0)
            || devices.iter().any(|device| device.leaf_weight().is_some_and(|weight| weight > 0))
        {
            return Err(Error::Unsupported("blockIO.leafWeight"));
        }
        if let Some(weight) = block.weight().filter(|&weight| weight > 0) {
            self.set("blockIO.weight", "io.weight", io_weight(weight).to_string());
        }
        for device in devices {
            if let Some(weight) = device.weight().filter(|&weight| weight > 0) {
                let value = format!("{}:{} {}", device.major(), device.minor(), io_weight(weight));
                self.set("blockIO.weightDevice", "io.weight", value);
            }
        }
        self.throttle("blockIO.throttleReadBpsDevice", "rbps", block.throttle_read_bps_device().as_ref());
        self.throttle("blockIO.throttleWriteBpsDevice", "wbps", block.throttle_write_bps_device().as_ref());
        self.throttle("blockIO.throttleReadIOPSDevice", "riops", block.throttle_read_iops_device().as_ref());
        self.throttle(
            "blockIO.throttleWriteIOPSDevice",
            "wiops",
            block.throttle_write_iops_device().as_ref(),
        );
        Ok(())
    }

    fn throttle(&mut self, field: &str, key: &str, devices: Option<&Vec<LinuxThrottleDevice>>) {
        for device in devices.into_iter().flatten() {
            // A rate of nothing was no limit in cgroup v1, and is refused by the kernel's v2.
            let rate = if device.rate() == 0 { "max".into() } else { device.rate().to_string() };
            self.set(field, "io.max", format!("{}:{} {key}={rate}", device.major(), device.minor()));
        }
    }

    /// Has the kernel enforce them. Blocks for as long as it takes to reclaim what is too much.
    ///
    /// # Errors
    /// [`Error`] with the first that the kernel refused; those before it hold. Nothing is changed when the kernel has no
    /// file for one of them.
    pub(crate) fn apply(&self, cgroup: &Cgroup) -> Result<(), Error> {
        if let Some(limit) = self.check_usage {
            let usage = cgroup.number("memory.current").unwrap_or(0);
            if usage > limit {
                return Err(Error::Usage(usage, limit));
            }
        }
        settings::write(&self.settings, &cgroup.directory)
    }
}

/// As in the names of files: `2MB`, `64KB`.
fn is_page_size(size: &str) -> bool {
    let digits = size.strip_suffix('B').and_then(|size| size.strip_suffix(['K', 'M', 'G']));
    digits.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A value of which -1 is no limit.
fn unlimited(field: &'static str, value: i64) -> Result<String, Error> {
    match value {
        -1 => Ok("max".into()),
        ..0 => Err(Error::Value(field, value)),
        _ => Ok(value.to_string()),
    }
}

/// From cgroup v1's 2 to 262144, usually 1024, to v2's 1 to 10000, usually 100: the curve through these three that runc has
/// used since 1.3.2.
fn weight_of_shares(shares: u64) -> u64 {
    const SHARES_MAX: u64 = 1 << 18;
    match shares {
        ..=2 => 1,
        SHARES_MAX.. => 10_000,
        _ => {
            let log = f64::from(u32::try_from(shares).unwrap_or(u32::MAX)).log2();
            let weight = 10f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0).ceil();
            // Between 1 and 10000, so exact.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let weight = weight as u64;
            weight.clamp(1, 10_000)
        }
    }
}

/// From cgroup v1's 10 to 1000 to v2's 1 to 10000.
fn io_weight(weight: u16) -> u64 {
    1 + u64::from(weight.saturating_sub(10)) * 9999 / 990
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;
    use serde_json::{Value as Json, json};

    use super::*;
    use crate::zygote::protocol::FailureKind;

    fn limits(resources: &Json) -> Result<Limits, Error> {
        Limits::with(&serde_json::from_value(resources.clone()).unwrap(), true)
    }

    fn writes(resources: &Json) -> Vec<(String, String)> {
        let text = |value| match value {
            Value::Text(text) => text,
            Value::Period(period) => format!("period {period}"),
        };
        limits(resources).unwrap().settings.into_iter().map(|s| (s.file, text(s.value))).collect()
    }

    fn refused(resources: &Json) -> String {
        let error = limits(resources).unwrap_err();
        assert_eq!(error.kind(), FailureKind::Invalid);
        error.to_string()
    }

    #[test]
    fn what_is_mentioned_is_written_and_nothing_else() {
        for (resources, expected) in [
            (json!({}), vec![]),
            (
                json!({"memory": {}, "cpu": {}, "pids": {}, "blockIO": {}, "devices": [{"allow": false}]}),
                vec![],
            ),
            (
                json!({"memory": {"limit": 0, "swap": 0}, "cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": ""}}),
                vec![],
            ),
            (json!({"memory": {"limit": 4096}}), vec![("memory.max", "4096")]),
            (
                json!({"memory": {"limit": 4096, "swap": 4096}}),
                vec![("memory.swap.max", "0"), ("memory.max", "4096")],
            ),
            (
                json!({"memory": {"limit": 4096, "swap": 5000}}),
                vec![("memory.swap.max", "904"), ("memory.max", "4096")],
            ),
            (json!({"memory": {"limit": -1}}), vec![("memory.swap.max", "max"), ("memory.max", "max")]),
            (
                json!({"memory": {"swap": -1, "reservation": -1}}),
                vec![("memory.swap.max", "max"), ("memory.low", "max")],
            ),
            (json!({"cpu": {"quota": 5000}}), vec![("cpu.max", "5000")]),
            (json!({"cpu": {"quota": -1, "period": 50000}}), vec![("cpu.max", "max 50000")]),
            (json!({"cpu": {"period": 50000}}), vec![("cpu.max", "period 50000")]),
            (json!({"cpu": {"burst": 0, "idle": 1}}), vec![("cpu.max.burst", "0"), ("cpu.idle", "1")]),
            (json!({"pids": {"limit": -1}}), vec![("pids.max", "max")]),
            (json!({"pids": {"limit": 7}}), vec![("pids.max", "7")]),
            (json!({"blockIO": {"weight": 1000}}), vec![("io.weight", "10000")]),
            (
                json!({"blockIO": {"throttleWriteIOPSDevice": [{"major": 254, "minor": 1, "rate": 0}]}}),
                vec![("io.max", "254:1 wiops=max")],
            ),
            (
                json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4096}]}),
                vec![("hugetlb.2MB.max", "4096"), ("hugetlb.2MB.rsvd.max", "4096")],
            ),
            (
                json!({"unified": {"memory.high": "1", "cpu.weight": "3"}}),
                vec![("cpu.weight", "3"), ("memory.high", "1")],
            ),
        ] {
            let expected: Vec<_> = expected.iter().map(|(f, v)| ((*f).to_owned(), (*v).to_owned())).collect();
            assert_eq!(writes(&resources), expected, "{resources}");
        }
    }

    #[test]
    fn what_cannot_be_enforced_is_refused_by_name() {
        for (resources, word) in [
            (json!({"memory": {"limit": -2}}), "memory.limit"),
            (json!({"memory": {"reservation": -2}}), "memory.reservation"),
            (json!({"memory": {"swap": 4096}}), "memory.swap"),
            (json!({"memory": {"limit": 4096, "swap": 4095}}), "memory.swap"),
            (json!({"memory": {"limit": -1, "swap": 4095}}), "memory.swap"),
            (json!({"memory": {"swappiness": 1}}), "memory.swappiness"),
            (json!({"memory": {"kernelTCP": 1}}), "memory.kernelTCP"),
            (json!({"cpu": {"realtimeRuntime": 1}}), "cpu.realtimeRuntime"),
            (json!({"blockIO": {"leafWeight": 10}}), "blockIO.leafWeight"),
            (json!({"hugepageLimits": [{"pageSize": "../2MB", "limit": 1}]}), "../2MB"),
            (json!({"hugepageLimits": [{"pageSize": "MB", "limit": 1}]}), "MB"),
            (json!({"unified": {"../memory.max": "1"}}), "../memory.max"),
            (json!({"unified": {"cgroup.procs": "1"}}), "cgroup.procs"),
            (json!({"rdma": {"mlx5_1": {"hcaHandles": 1}}}), "rdma"),
            (json!({"network": {"classID": 1}}), "network"),
        ] {
            let text = refused(&resources);
            assert!(text.contains(word), "{resources}: {text}");
        }
    }

    #[test]
    fn without_swap_there_is_nothing_to_write_for_it() {
        let resources = json!({"memory": {"limit": 4096, "swap": 4096}, "unified": {"memory.swap.max": "0"}});
        let limits = Limits::with(&serde_json::from_value(resources).unwrap(), false).unwrap();
        assert_eq!(limits.settings.iter().map(|s| s.file.as_str()).collect::<Vec<_>>(), ["memory.max"]);
    }

    #[test]
    fn shares_and_weights_meet_at_their_ends_and_defaults() {
        let shares = [0, 2, 3, 1024, 262_144, u64::MAX].map(weight_of_shares);
        assert_eq!(shares, [1, 1, 2, 100, 10_000, 10_000]);
        assert_eq!([1, 10, 11, 1000].map(io_weight), [1, 1, 11, 10_000]);
    }

    #[test]
    fn usage_is_looked_at_when_that_is_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("memory.max"), "").unwrap();
        fs::write(directory.path().join("memory.current"), "5000\n").unwrap();
        let resources = |check| json!({"memory": {"limit": 4096, "checkBeforeUpdate": check}});
        let cgroup = Cgroup { directory: directory.path().to_owned() };
        let error = limits(&resources(true)).unwrap().apply(&cgroup).unwrap_err();
        assert_eq!(error.kind(), FailureKind::Precondition);
        limits(&resources(false)).unwrap().apply(&cgroup).unwrap();
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Limits::parse(&bytes);
        }

        #[test]
        fn any_numbers_become_values_that_the_kernel_could_read(
            limit in any::<i64>(), swap in any::<i64>(), shares in any::<u64>(), quota in any::<i64>(), weight in any::<u16>(),
        ) {
            let resources = json!({
                "memory": {"limit": limit, "swap": swap}, "cpu": {"shares": shares, "quota": quota}, "blockIO": {"weight": weight}
            });
            if let Ok(limits) = limits(&resources) {
                for setting in limits.settings {
                    let Value::Text(text) = setting.value else { panic!("a text") };
                    prop_assert!(text == "max" || text.parse::<u64>().is_ok(), "{text}");
                    if setting.file.ends_with(".weight") {
                        prop_assert!((1..=10_000).contains(&text.parse::<u64>().unwrap_or(0)) || weight > 1000);
                    }
                }
            }
        }
    }
}
