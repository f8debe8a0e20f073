//! What a vCPU is told about itself: what KVM supports but for virtualization and performance counters, and its own number.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use super::layout::VCPUS_MAX;

/// Leaf 1: 64-bit debug store area, VMX, and the MSR that describes the performance counters.
const ECX_DTES64: u32 = 1 << 2;
const ECX_VMX: u32 = 1 << 5;
const ECX_PDCM: u32 = 1 << 15;
/// Leaf 1: the debug store, to which performance counters write.
const EDX_DS: u32 = 1 << 21;
/// Leaf 0x8000_0001.
const ECX_SVM: u32 = 1 << 2;
const ECX_PERFCTR_CORE: u32 = 1 << 23;
/// The counters of Intel (two leaves), SVM, and the counters of AMD. What is left out reads as zero.
const HIDDEN_LEAVES: [u32; 4] = [0xa, 0x23, 0x8000_000a, 0x8000_0022];
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
const EAX_ARAT: u32 = 1 << 2;
/// The local APIC timer of KVM counts nanoseconds.
const APIC_BUS_KHZ: u32 = 1_000_000;
const LEAF_TIMING: u32 = 0x4000_0010;
const LEAF_KVM: u32 = 0x4000_0000;

/// What the host supports, before it is made a vCPU's own.
///
/// # Errors
/// When KVM cannot tell.
pub fn supported(kvm: &Kvm) -> Result<CpuId, kvm_ioctls::Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
}

/// The CPUID of vCPU `id` in a machine that may have [`VCPUS_MAX`] of them: CPUs are cores of one package, without threads, and their
/// APIC ids are their numbers. `tsc_khz` spares the guest a calibration, for which it would need a PIT.
///
/// # Errors
/// When the entries are more than KVM takes.
pub fn for_vcpu(supported: &CpuId, id: u8, tsc_khz: u32) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut entries: Vec<kvm_cpuid_entry2> = supported.as_slice().to_vec();
    entries.retain(|entry| entry.function != LEAF_TIMING);
    hide(&mut entries);
    for entry in &mut entries {
        match entry.function {
            0x1 => {
                entry.ecx |= ECX_TSC_DEADLINE | ECX_HYPERVISOR;
                entry.edx |= EDX_HTT;
                entry.ebx = entry.ebx & 0xffff | u32::from(VCPUS_MAX) << 16 | u32::from(id) << 24;
            }
            // Cores that share a cache: none, each is on its own.
            0x4 => entry.eax = entry.eax & 0x3fff | (u32::from(VCPUS_MAX) - 1) << 26,
            0x6 => entry.eax |= EAX_ARAT,
            0xb | 0x1f => topology(entry, id),
            LEAF_KVM => entry.eax = entry.eax.max(LEAF_TIMING),
            // AMD: cores of the package less one, and the width of the core's number.
            0x8000_0008 => entry.ecx = VCPUS_MAX.ilog2() << 12 | (u32::from(VCPUS_MAX) - 1),
            0x8000_001e => {
                entry.eax = u32::from(id);
                entry.ebx = u32::from(id);
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    entries.push(kvm_cpuid_entry2 {
        function: LEAF_TIMING,
        eax: tsc_khz,
        ebx: APIC_BUS_KHZ,
        ..Default::default()
    });
    CpuId::from_entries(&entries)
}

/// Takes away what no container needs and what would put much more of KVM within the guest's reach: virtual machines in the virtual
/// machine, and performance counters.
pub fn hide(entries: &mut Vec<kvm_cpuid_entry2>) {
    entries.retain(|entry| !HIDDEN_LEAVES.contains(&entry.function));
    for entry in entries {
        match entry.function {
            0x1 => {
                entry.ecx &= !(ECX_DTES64 | ECX_VMX | ECX_PDCM);
                entry.edx &= !EDX_DS;
            }
            0x8000_0001 => entry.ecx &= !(ECX_SVM | ECX_PERFCTR_CORE),
            _ => {}
        }
    }
}

/// Extended topology: one thread a core, and every core in one package.
fn topology(entry: &mut kvm_cpuid_entry2, id: u8) {
    let (shift, count, kind) = match entry.index {
        0 => (0, 1, 1),
        1 => (VCPUS_MAX.ilog2(), u32::from(VCPUS_MAX), 2),
        _ => (0, 0, 0),
    };
    entry.eax = shift;
    entry.ebx = count;
    entry.ecx = entry.index | kind << 8;
    entry.edx = u32::from(id);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vcpu_has_its_own_number_and_the_machines_timing() {
        let leaf = |function, index| kvm_cpuid_entry2 { function, index, ..Default::default() };
        let host =
            CpuId::from_entries(&[leaf(1, 0), leaf(6, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(LEAF_KVM, 0)])
                .unwrap();
        let guest = for_vcpu(&host, 3, 2_500_000).unwrap();
        let find = |function, index| {
            *guest.as_slice().iter().find(|entry| (entry.function, entry.index) == (function, index)).unwrap()
        };
        assert_eq!(find(1, 0).ebx >> 24, 3);
        assert_ne!(find(1, 0).ecx & ECX_TSC_DEADLINE, 0);
        assert_ne!(find(6, 0).eax & EAX_ARAT, 0);
        assert_eq!((find(0xb, 0).edx, find(0xb, 1).edx), (3, 3));
        assert_eq!(find(LEAF_TIMING, 0).eax, 2_500_000);
        assert!(find(LEAF_KVM, 0).eax >= LEAF_TIMING);
    }

    fn guest_of(host: &[kvm_cpuid_entry2]) -> Vec<kvm_cpuid_entry2> {
        for_vcpu(&CpuId::from_entries(host).unwrap(), 0, 2_500_000).unwrap().as_slice().to_vec()
    }

    /// A leaf with every bit set.
    fn full(function: u32) -> kvm_cpuid_entry2 {
        let (eax, ebx, ecx, edx) = (u32::MAX, u32::MAX, u32::MAX, u32::MAX);
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn a_guest_cannot_virtualize() {
        let guest = guest_of(&[full(0x1), full(0x8000_0001), full(0x8000_000a)]);
        assert_eq!(guest[0].ecx & 1 << 5, 0, "VMX");
        assert_eq!(guest[1].ecx & 1 << 2, 0, "SVM");
        assert!(guest.iter().all(|entry| entry.function != 0x8000_000a), "what SVM can do");
    }

    #[test]
    fn a_guest_has_no_performance_counters() {
        let guest = guest_of(&[full(0x1), full(0xa), full(0x23), full(0x8000_0001), full(0x8000_0022)]);
        let functions: Vec<u32> = guest.iter().map(|entry| entry.function).collect();
        assert_eq!(functions, [0x1, 0x8000_0001, LEAF_TIMING]);
        assert_eq!((guest[0].ecx & (1 << 2 | 1 << 15), guest[0].edx & 1 << 21), (0, 0), "DTES64, PDCM, DS");
        assert_eq!(guest[1].ecx & 1 << 23, 0, "PerfCtrExtCore");
    }

    #[test]
    fn nothing_else_is_hidden() {
        let guest = guest_of(&[full(0x1), full(0x7), full(0xd), full(0x8000_0001)]);
        assert_eq!(guest[0].ecx, !(1 << 2 | 1 << 5 | 1 << 15));
        assert_eq!(guest[0].edx, !(1 << 21));
        assert_eq!((guest[1], guest[2]), (full(0x7), full(0xd)));
        assert_eq!(guest[3].ecx, !(1 << 2 | 1 << 23));
    }
}
