//! How large a machine is, from what its containers may use.
//!
//! A limit of a container is enforced in the guest; the machine is made large enough for it. What a user asks for in person comes
//! before annotations of the operator's choice, these before limits, limits before the defaults of the configuration.

use bulkhead_vmm::arch::layout::VCPUS_MAX;
use bulkhead_vmm::memory::{MEMORY_MAX_MIB, MEMORY_MIN_MIB};
use oci_spec::runtime::{LinuxResources, Spec};
use rustix::system::sysinfo;

use crate::config::{Annotations, Config};
use crate::oci::annotation;
use crate::size::Size;

/// Memory of the machine, in MiB: the annotation.
pub const MEMORY_ANNOTATION: &str = "io.bulkhead.vm.memory";
/// CPUs of the machine: the annotation.
pub const CPUS_ANNOTATION: &str = "io.bulkhead.vm.cpus";
/// Every annotation that the configuration can allow.
pub const ANNOTATIONS: [&str; 2] = [MEMORY_ANNOTATION, CPUS_ANNOTATION];
/// What begins like this is for us.
const ANNOTATION_PREFIX: &str = "io.bulkhead.";

/// What containerd's CRI plugin says of a pod as a whole.
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const POD_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// The kernel's default for `cpu.max`, in microseconds.
const CPU_PERIOD: u64 = 100_000;

/// What a guest needs besides its containers' memory, in MiB: its kernel and agent, what the agent keeps from containers, and the
/// kernel's account of each page, which is a 64th.
const GUEST_MIB: u64 = 96;

/// The size of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineSize {
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// Its CPUs.
    pub cpus: u8,
}

/// What a user asks for in person. Only the command line has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Memory of the machine.
    pub memory: Option<Size>,
    /// CPUs of the machine.
    pub cpus: Option<u32>,
}

/// What a host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// All of its memory.
    pub memory: Size,
    /// CPUs that this process may use, at least 1 and at most [`VCPUS_MAX`].
    pub cpus: u8,
}

impl Host {
    /// This one.
    pub fn examine() -> Self {
        let info = sysinfo();
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            memory: Size(u64::from(info.mem_unit).saturating_mul(info.totalram)),
            cpus: u8::try_from(cpus).unwrap_or(u8::MAX).min(VCPUS_MAX),
        }
    }
}

/// Why a machine cannot have the size that is asked for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizeError {
    /// Its memory is out of bounds.
    #[error(
        "{what} asks for a virtual machine of {mib} MiB: {MEMORY_MIN_MIB} to {MEMORY_MAX_MIB} MiB are possible"
    )]
    Memory {
        /// What asks.
        what: &'static str,
        /// For how much.
        mib: u64,
    },
    /// A user asks for more memory than there is.
    #[error("--memory asks for a virtual machine of {0}: this host has {1} in all, so give less")]
    Host(Size, Size),
    /// The number of CPUs is out of bounds.
    #[error("{what} asks for {cpus} CPUs: 1 to {VCPUS_MAX} are possible")]
    Cpus {
        /// What asks.
        what: &'static str,
        /// For how many.
        cpus: u64,
    },
    /// An annotation's value is not of its type.
    #[error("the annotation {0} is not valid: {1}")]
    Annotation(&'static str, String),
    /// An annotation that nobody allowed.
    #[error(
        "the annotation {0} is not allowed: name it in `annotations.allow` of the configuration, or remove it"
    )]
    NotAllowed(String),
    /// An annotation that does not exist.
    #[error("there is no annotation {0}; there are {list}", list = ANNOTATIONS.join(" and "))]
    Unknown(String),
}

/// The machine for a container, or for a pod whose first container this is.
///
/// It has no more CPUs than the host, unless a user or an annotation asks for them: they would only wait for each other.
///
/// # Errors
/// [`SizeError`] for an annotation that is not allowed or not valid, and for a size that no machine can have.
pub fn machine_size(
    spec: &Spec,
    config: &Config,
    asked: Asked,
    host: Host,
) -> Result<MachineSize, SizeError> {
    check_annotations(spec, &config.annotations)?;
    if let Some(size) = asked.memory.filter(|size| *size > host.memory) {
        return Err(SizeError::Host(size, host.memory));
    }
    Ok(MachineSize { memory_mib: memory(spec, config, asked)?, cpus: cpus(spec, config, asked, host)? })
}

/// The annotations of a container that joins a machine which ask for another size than it has: they come too late.
///
/// # Errors
/// [`SizeError`] for an annotation that is not allowed or not valid.
pub fn late_annotations(
    spec: &Spec,
    annotations: &Annotations,
    machine: MachineSize,
) -> Result<Vec<&'static str>, SizeError> {
    check_annotations(spec, annotations)?;
    let memory = memory_annotation(spec)?.is_some_and(|mib| mib != u64::from(machine.memory_mib));
    let cpus = cpus_annotation(spec)?.is_some_and(|cpus| cpus != u64::from(machine.cpus));
    let late = [(memory, MEMORY_ANNOTATION), (cpus, CPUS_ANNOTATION)];
    Ok(late.into_iter().filter_map(|(late, name)| late.then_some(name)).collect())
}

fn check_annotations(spec: &Spec, annotations: &Annotations) -> Result<(), SizeError> {
    let mut ours: Vec<&String> = spec.annotations().iter().flatten().map(|(name, _)| name).collect();
    ours.retain(|name| name.starts_with(ANNOTATION_PREFIX));
    ours.sort();
    for name in ours {
        if !ANNOTATIONS.contains(&name.as_str()) {
            return Err(SizeError::Unknown(name.chars().take(128).collect()));
        }
        if !annotations.allow.contains(name) {
            return Err(SizeError::NotAllowed(name.clone()));
        }
    }
    Ok(())
}

fn memory(spec: &Spec, config: &Config, asked: Asked) -> Result<u32, SizeError> {
    let (what, mib) = if let Some(size) = asked.memory {
        ("--memory", size.mib_rounded_up())
    } else if let Some(mib) = memory_annotation(spec)? {
        (MEMORY_ANNOTATION, mib)
    } else if let Some(bytes) = pod_number(spec, POD_MEMORY)? {
        (POD_MEMORY, with_guest(bytes))
    } else if let Some(bytes) = memory_limit(spec) {
        ("the container's memory limit", with_guest(bytes))
    } else {
        ("defaults.memory of the configuration", config.defaults.memory.mib_rounded_up())
    };
    let fits = u32::try_from(mib).ok().filter(|mib| (MEMORY_MIN_MIB..=MEMORY_MAX_MIB).contains(mib));
    fits.ok_or(SizeError::Memory { what, mib })
}

fn cpus(spec: &Spec, config: &Config, asked: Asked, host: Host) -> Result<u8, SizeError> {
    let most = u64::from(host.cpus);
    let (what, cpus) = if let Some(cpus) = asked.cpus {
        ("--cpus", cpus.into())
    } else if let Some(cpus) = cpus_annotation(spec)? {
        (CPUS_ANNOTATION, cpus)
    } else if let Some(quota) = pod_number(spec, POD_CPU_QUOTA)? {
        let period = pod_number(spec, POD_CPU_PERIOD)?.unwrap_or(CPU_PERIOD);
        (POD_CPU_QUOTA, quota.div_ceil(period.max(1)).min(most))
    } else if let Some(cpus) = cpu_limit(spec) {
        ("the container's CPU quota", cpus.min(most))
    } else {
        ("defaults.cpus of the configuration", u64::from(config.defaults.cpus).min(most))
    };
    let fits = u8::try_from(cpus).ok().filter(|cpus| (1..=VCPUS_MAX).contains(cpus));
    fits.ok_or(SizeError::Cpus { what, cpus })
}

/// The memory that an annotation asks for, in MiB.
fn memory_annotation(spec: &Spec) -> Result<Option<u64>, SizeError> {
    let Some(text) = annotation(spec, MEMORY_ANNOTATION) else { return Ok(None) };
    let size: Size = text
        .parse()
        .map_err(|e: crate::size::SizeError| SizeError::Annotation(MEMORY_ANNOTATION, e.to_string()))?;
    Ok(Some(size.mib_rounded_up()))
}

/// The number of CPUs that an annotation asks for.
fn cpus_annotation(spec: &Spec) -> Result<Option<u64>, SizeError> {
    let Some(text) = annotation(spec, CPUS_ANNOTATION) else { return Ok(None) };
    let error = |_| SizeError::Annotation(CPUS_ANNOTATION, "give a number of CPUs".into());
    text.parse().map(Some).map_err(error)
}

/// A number above zero that the CRI plugin wrote.
fn pod_number(spec: &Spec, name: &'static str) -> Result<Option<u64>, SizeError> {
    let Some(text) = annotation(spec, name) else { return Ok(None) };
    let number: i64 = text.parse().map_err(|_| SizeError::Annotation(name, "it is not a number".into()))?;
    Ok(u64::try_from(number).ok().filter(|number| *number > 0))
}

fn resources(spec: &Spec) -> Option<&LinuxResources> {
    spec.linux().as_ref()?.resources().as_ref()
}

fn memory_limit(spec: &Spec) -> Option<u64> {
    let limit = resources(spec)?.memory().as_ref()?.limit()?;
    u64::try_from(limit).ok().filter(|limit| *limit > 0)
}

/// A quota in whole CPUs, or the number of CPUs that the container is bound to.
fn cpu_limit(spec: &Spec) -> Option<u64> {
    let cpu = resources(spec)?.cpu().as_ref()?;
    let quota = cpu.quota().and_then(|quota| u64::try_from(quota).ok()).filter(|quota| *quota > 0);
    if let Some(quota) = quota {
        return Some(quota.div_ceil(cpu.period().unwrap_or(CPU_PERIOD).max(1)));
    }
    cpu.cpus().as_deref().and_then(cpu_count)
}

/// How many CPUs a list like `0-2,5` has; none when it is empty or not valid.
pub fn cpu_count(list: &str) -> Option<u64> {
    let mut count: u64 = 0;
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        count = count.checked_add(last.checked_sub(first)?.checked_add(1)?)?;
    }
    Some(count)
}

fn with_guest(bytes: u64) -> u64 {
    let mib = Size(bytes).mib_rounded_up();
    mib.saturating_add(mib / 32).saturating_add(GUEST_MIB)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const HOST: Host = Host { memory: Size(8 << 30), cpus: 4 };

    fn size(resources: &Value, annotations: &Value) -> Result<MachineSize, SizeError> {
        asked(Asked::default(), resources, annotations)
    }

    fn asked(asked: Asked, resources: &Value, annotations: &Value) -> Result<MachineSize, SizeError> {
        let mut config = Config::default();
        config.annotations.allow = ANNOTATIONS.map(String::from).to_vec();
        let spec =
            json!({"ociVersion": "1.2.0", "annotations": annotations, "linux": {"resources": resources}});
        machine_size(&serde_json::from_value(spec).unwrap(), &config, asked, HOST)
    }

    #[test]
    fn a_container_without_limits_gets_the_default_machine() {
        let expected = MachineSize { memory_mib: 1024, cpus: 2 };
        assert_eq!(size(&json!({}), &json!({})).unwrap(), expected);
        let unlimited = json!({"memory": {"limit": -1}, "cpu": {"quota": -1, "period": 100_000}});
        assert_eq!(size(&unlimited, &json!({})).unwrap(), expected);
    }

    #[test]
    fn a_machine_has_room_for_the_container_and_the_guest() {
        let limits = json!({"memory": {"limit": 512 << 20}, "cpu": {"quota": 250_000, "period": 100_000}});
        assert_eq!(size(&limits, &json!({})).unwrap(), MachineSize { memory_mib: 512 + 16 + 96, cpus: 3 });
        let small = size(&json!({"memory": {"limit": 1}}), &json!({})).unwrap();
        assert_eq!(small.memory_mib, 97);
        assert_eq!(size(&json!({"cpu": {"cpus": "4-6,9"}}), &json!({})).unwrap().cpus, 4);
    }

    #[test]
    fn the_pods_numbers_come_before_the_containers_and_annotations_before_both() {
        let limits = json!({"memory": {"limit": 64 << 20}});
        let pod =
            json!({POD_MEMORY: (1_u64 << 30).to_string(), POD_CPU_QUOTA: "150000", POD_CPU_PERIOD: "100000"});
        assert_eq!(size(&limits, &pod).unwrap(), MachineSize { memory_mib: 1024 + 32 + 96, cpus: 2 });
        let both = json!({POD_MEMORY: "1", MEMORY_ANNOTATION: "300M", CPUS_ANNOTATION: "5"});
        assert_eq!(size(&limits, &both).unwrap(), MachineSize { memory_mib: 300, cpus: 5 });
    }

    #[test]
    fn a_machine_has_no_more_cpus_than_the_host_unless_that_is_asked_for() {
        assert_eq!(size(&json!({"cpu": {"quota": 640_000, "period": 10_000}}), &json!({})).unwrap().cpus, 4);
        assert_eq!(size(&json!({"cpu": {"cpus": "0-47"}}), &json!({})).unwrap().cpus, 4);
        assert_eq!(size(&json!({}), &json!({POD_CPU_QUOTA: "9000000"})).unwrap().cpus, 4);
        let spec = serde_json::from_value(json!({"ociVersion": "1.2.0"})).unwrap();
        let small = Host { cpus: 1, ..HOST };
        assert_eq!(machine_size(&spec, &Config::default(), Asked::default(), small).unwrap().cpus, 1);
    }

    #[test]
    fn what_a_user_asks_for_comes_before_all_else_and_may_be_more_cpus_than_the_host_has() {
        let limits = json!({"memory": {"limit": 512 << 20}, "cpu": {"quota": 250_000, "period": 100_000}});
        let annotations = json!({MEMORY_ANNOTATION: "300M", CPUS_ANNOTATION: "5"});
        let both = Asked { memory: Some(Size((512 << 20) + 1)), cpus: Some(8) };
        let expected = MachineSize { memory_mib: 513, cpus: 8 };
        assert_eq!(asked(both, &limits, &annotations).unwrap(), expected);
    }

    #[test]
    fn a_user_is_told_what_is_possible() {
        let refused = |cpus, memory: Option<u64>| {
            let size = Asked { memory: memory.map(Size), cpus };
            asked(size, &json!({}), &json!({})).unwrap_err().to_string()
        };
        for cpus in [0, 33, 256, 257, u32::MAX] {
            let error = refused(Some(cpus), None);
            assert!(error.contains("--cpus") && error.contains("1 to 32"), "{error}");
        }
        let little = refused(None, Some((63 << 20) + 1 - (1 << 20)));
        assert!(little.contains("--memory") && little.contains("64 to"), "{little}");
        let much = refused(None, Some((8 << 30) + 1));
        assert!(much.contains("8 GiB in all"), "{much}");
    }

    #[test]
    fn a_size_that_no_machine_can_have_is_refused_with_who_asks() {
        let huge = size(&json!({"memory": {"limit": i64::MAX}}), &json!({})).unwrap_err();
        assert!(huge.to_string().contains("memory limit"), "{huge}");
        assert!(size(&json!({}), &json!({MEMORY_ANNOTATION: "1M"})).is_err());
        assert!(size(&json!({}), &json!({CPUS_ANNOTATION: "33"})).is_err());
        assert!(size(&json!({}), &json!({CPUS_ANNOTATION: "many"})).is_err());
        assert!(
            size(&json!({}), &json!({"io.bulkhead.vm.kernel": "/x"}))
                .unwrap_err()
                .to_string()
                .contains("vm.cpus")
        );
    }

    #[test]
    fn an_annotation_counts_only_where_it_is_allowed() {
        let spec = json!({"ociVersion": "1.2.0", "annotations": {CPUS_ANNOTATION: "4"}});
        let spec = serde_json::from_value(spec).unwrap();
        let error = machine_size(&spec, &Config::default(), Asked::default(), HOST).unwrap_err();
        assert_eq!(error, SizeError::NotAllowed(CPUS_ANNOTATION.into()));
    }

    #[test]
    fn a_container_that_joins_a_machine_is_held_to_the_same_annotations() {
        let machine = MachineSize { memory_mib: 300, cpus: 2 };
        let joins = |allow: &[&str], annotations: &Value| {
            let spec = json!({"ociVersion": "1.2.0", "annotations": annotations});
            let allowed = Annotations { allow: allow.iter().map(ToString::to_string).collect() };
            late_annotations(&serde_json::from_value(spec).unwrap(), &allowed, machine)
        };
        let error = joins(&[], &json!({CPUS_ANNOTATION: "2"})).unwrap_err();
        assert_eq!(error, SizeError::NotAllowed(CPUS_ANNOTATION.into()));
        let error = joins(&ANNOTATIONS, &json!({"io.bulkhead.vm.kernel": "/x"})).unwrap_err();
        assert!(matches!(error, SizeError::Unknown(_)));
        for broken in [json!({CPUS_ANNOTATION: "many"}), json!({MEMORY_ANNOTATION: "much"})] {
            assert!(matches!(joins(&ANNOTATIONS, &broken), Err(SizeError::Annotation(..))));
        }
        let late = |annotations: &Value| joins(&ANNOTATIONS, annotations).unwrap();
        // A pod's own annotations, which Kubernetes gives to each of its containers, are none too late.
        assert!(late(&json!({MEMORY_ANNOTATION: "300M", CPUS_ANNOTATION: "2"})).is_empty());
        assert_eq!(late(&json!({MEMORY_ANNOTATION: "1G", CPUS_ANNOTATION: "2"})), [MEMORY_ANNOTATION]);
        assert_eq!(late(&json!({CPUS_ANNOTATION: "4"})), [CPUS_ANNOTATION]);
    }

    proptest! {
        #[test]
        fn any_list_of_cpus_is_counted_or_refused(list in "[0-9,-]{0,24}") {
            let _ = cpu_count(&list);
        }
    }
}
