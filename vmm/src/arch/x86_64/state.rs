//! The state of a vCPU and of the machine's interrupt controllers and clock, saved and restored.
//!
//! The orders of the calls are those of the kernel's documentation and of what other monitors found: see the comments.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, Msrs,
    Xsave, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

use super::cpuid;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// What Intel's performance counters can do. KVM shows the host's value to us even if the guest has none, and refuses to take it back.
const MSR_PERF_CAPABILITIES: u32 = 0x345;
/// 32-bit words of XSAVE state before `KVM_CAP_XSAVE2`.
const XSAVE_WORDS: usize = 1024;
/// A TSC that differs by less than this is the same (`KVM_SET_TSC_KHZ` allows 250 ppm).
const TSC_TOLERANCE_PPM: u64 = 250;

/// Why state was not saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A call to KVM failed.
    #[error("{0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// KVM took only some of the MSRs.
    #[error("the host refuses MSR {0:#x} of the saved machine: it has another processor or another kernel")]
    Msr(u32),
    /// A list or an area that no machine can have.
    #[error("the saved vCPU state is not valid: {0}")]
    Invalid(&'static str),
}

/// Turns KVM's errors into ours.
fn kvm<T>(what: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, StateError> {
    result.map_err(|source| StateError::Kvm(what, source))
}

/// The state of one vCPU.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Vec<u32>,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    tsc_khz: u32,
    cpuid: Vec<kvm_cpuid_entry2>,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// The MSRs that make up a vCPU's state on this host.
///
/// # Errors
/// When KVM cannot list them.
pub fn msr_list(kvm_fd: &Kvm) -> Result<Vec<u32>, StateError> {
    let list = kvm("KVM_GET_MSR_INDEX_LIST", kvm_fd.get_msr_index_list())?;
    Ok(list.as_slice().iter().copied().filter(|index| *index != MSR_PERF_CAPABILITIES).collect())
}

/// Bytes of a vCPU's XSAVE state on this host.
pub fn xsave_len(vm: &VmFd) -> usize {
    usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(XSAVE_WORDS * size_of::<u32>())
}

impl VcpuState {
    /// Reads the state of a vCPU that stands still.
    ///
    /// # Errors
    /// When KVM does.
    pub fn save(vcpu: &VcpuFd, msr_list: &[u32], xsave_len: usize) -> Result<Self, StateError> {
        // First: reading it makes KVM act on pending INIT and SIPI, which changes the rest.
        let mp_state = kvm("KVM_GET_MP_STATE", vcpu.get_mp_state())?;
        let regs = kvm("KVM_GET_REGS", vcpu.get_regs())?;
        let sregs = kvm("KVM_GET_SREGS", vcpu.get_sregs())?;
        let xsave = get_xsave(vcpu, xsave_len)?;
        let xcrs = kvm("KVM_GET_XCRS", vcpu.get_xcrs())?;
        let debug_regs = kvm("KVM_GET_DEBUGREGS", vcpu.get_debug_regs())?;
        let lapic = kvm("KVM_GET_LAPIC", vcpu.get_lapic())?;
        let tsc_khz = kvm("KVM_GET_TSC_KHZ", vcpu.get_tsc_khz())?;
        let cpuid = kvm("KVM_GET_CPUID2", vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES))?.as_slice().to_vec();
        let msrs = get_msrs(vcpu, msr_list)?;
        // Last: what came before may have injected something.
        let events = kvm("KVM_GET_VCPU_EVENTS", vcpu.get_vcpu_events())?;
        Ok(Self { mp_state, regs, sregs, xsave, xcrs, debug_regs, lapic, tsc_khz, cpuid, msrs, events })
    }

    /// Gives a new vCPU this state.
    ///
    /// # Errors
    /// When KVM refuses it.
    pub fn restore(&self, vcpu: &VcpuFd, xsave_len: usize) -> Result<(), StateError> {
        let host_khz = kvm("KVM_GET_TSC_KHZ", vcpu.get_tsc_khz())?;
        let difference = u64::from(host_khz.abs_diff(self.tsc_khz)) * 1_000_000;
        if difference > u64::from(host_khz) * TSC_TOLERANCE_PPM {
            kvm("KVM_SET_TSC_KHZ", vcpu.set_tsc_khz(self.tsc_khz))?;
        }
        let mut entries = self.cpuid.clone();
        // No file gives a guest what a boot does not.
        cpuid::hide(&mut entries);
        let cpuid =
            CpuId::from_entries(&entries).map_err(|_| StateError::Invalid("too many CPUID leaves"))?;
        // CPUID first: it decides which of the rest is allowed.
        kvm("KVM_SET_CPUID2", vcpu.set_cpuid2(&cpuid))?;
        kvm("KVM_SET_MP_STATE", vcpu.set_mp_state(self.mp_state))?;
        kvm("KVM_SET_REGS", vcpu.set_regs(&self.regs))?;
        kvm("KVM_SET_SREGS", vcpu.set_sregs(&self.sregs))?;
        set_xsave(vcpu, &self.xsave, xsave_len)?;
        kvm("KVM_SET_XCRS", vcpu.set_xcrs(&self.xcrs))?;
        kvm("KVM_SET_DEBUGREGS", vcpu.set_debug_regs(&self.debug_regs))?;
        // The local APIC before the MSRs: its timer mode decides whether TSC_DEADLINE is taken.
        kvm("KVM_SET_LAPIC", vcpu.set_lapic(&self.lapic))?;
        // TSC_DEADLINE after the TSC that it is measured against.
        let (deadline, others): (Vec<_>, Vec<_>) =
            self.msrs.iter().partition(|msr| msr.index == MSR_TSC_DEADLINE);
        set_msrs(vcpu, &others)?;
        set_msrs(vcpu, &deadline)?;
        kvm("KVM_SET_VCPU_EVENTS", vcpu.set_vcpu_events(&self.events))?;
        Ok(())
    }
}

fn get_xsave(vcpu: &VcpuFd, length: usize) -> Result<Vec<u32>, StateError> {
    let mut area = new_xsave(length)?;
    // SAFETY: the area is as long as KVM_CAP_XSAVE2 said that KVM would write.
    kvm("KVM_GET_XSAVE2", unsafe { vcpu.get_xsave2(&mut area) })?;
    Ok([&area.as_fam_struct_ref().xsave.region[..], area.as_slice()].concat())
}

fn set_xsave(vcpu: &VcpuFd, words: &[u32], length: usize) -> Result<(), StateError> {
    let mut area = new_xsave(length)?;
    let (region, extra) = words.split_at_checked(XSAVE_WORDS).ok_or(StateError::Invalid("XSAVE area"))?;
    if extra.len() != area.as_slice().len() {
        return Err(StateError::Invalid("XSAVE area of another processor"));
    }
    // SAFETY: the length of the flexible array is not touched.
    unsafe { area.as_mut_fam_struct() }.xsave.region.copy_from_slice(region);
    area.as_mut_slice().copy_from_slice(extra);
    // SAFETY: the area is as long as KVM_CAP_XSAVE2 says that KVM reads.
    kvm("KVM_SET_XSAVE", unsafe { vcpu.set_xsave2(&area) })
}

fn new_xsave(length: usize) -> Result<Xsave, StateError> {
    let extra = length.saturating_sub(XSAVE_WORDS * size_of::<u32>()).div_ceil(size_of::<u32>());
    Xsave::new(extra).map_err(|_| StateError::Invalid("XSAVE area"))
}

fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut rest: Vec<kvm_msr_entry> =
        indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    while !rest.is_empty() {
        let mut msrs = Msrs::from_entries(&rest).map_err(|_| StateError::Invalid("too many MSRs"))?;
        let got = kvm("KVM_GET_MSRS", vcpu.get_msrs(&mut msrs))?;
        saved.extend_from_slice(&msrs.as_slice()[..got]);
        // KVM stops at the first MSR that this vCPU does not have: that one is no part of its state.
        rest.drain(..(got + 1).min(rest.len()));
    }
    // A deadline that has passed reads as zero, and writing zero would disarm the timer whose interrupt is still to come.
    let tsc = saved.iter().find(|msr| msr.index == MSR_TSC).map_or(0, |msr| msr.data);
    for msr in &mut saved {
        if msr.index == MSR_TSC_DEADLINE && msr.data == 0 {
            msr.data = tsc;
        }
    }
    Ok(saved)
}

/// Sets MSRs; all of them or it is an error.
///
/// # Errors
/// [`StateError::Msr`] names the first that KVM refuses.
pub fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    if entries.is_empty() {
        return Ok(());
    }
    let msrs = Msrs::from_entries(entries).map_err(|_| StateError::Invalid("too many MSRs"))?;
    let set = kvm("KVM_SET_MSRS", vcpu.set_msrs(&msrs))?;
    entries.get(set).map_or(Ok(()), |refused| Err(StateError::Msr(refused.index)))
}

/// The interrupt controllers and the clock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    irqchips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl VmState {
    /// Reads the state of a machine whose vCPUs stand still.
    ///
    /// # Errors
    /// When KVM does.
    pub fn save(vm: &VmFd) -> Result<Self, StateError> {
        let mut clock = kvm("KVM_GET_CLOCK", vm.get_clock())?;
        // KVM_SET_CLOCK takes no flags but these, and the time since the save is not to be added.
        clock.flags = 0;
        let irqchip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            kvm("KVM_GET_IRQCHIP", vm.get_irqchip(&mut chip)).map(|()| chip)
        };
        Ok(Self { irqchips: IRQCHIPS.into_iter().map(irqchip).collect::<Result<_, _>>()?, clock })
    }

    /// Gives a machine with vCPUs, not yet running, this state.
    ///
    /// # Errors
    /// When KVM refuses it.
    pub fn restore(&self, vm: &VmFd) -> Result<(), StateError> {
        if self.irqchips.iter().map(|chip| chip.chip_id).ne(IRQCHIPS) {
            return Err(StateError::Invalid("interrupt controllers"));
        }
        for chip in &self.irqchips {
            kvm("KVM_SET_IRQCHIP", vm.set_irqchip(chip))?;
        }
        kvm("KVM_SET_CLOCK", vm.set_clock(&self.clock))
    }
}
