//! Whether this host can run guests, and how fast: for `bulkhead check`.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_API_VERSION, kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{self, MEMORY_MIN_MIB, MemoryError};

/// Every capability of KVM that the VMM uses, by name. `KVM_CAP_TSC_CONTROL` is none of them: without it a saved machine is only restored
/// where the TSC is as fast.
pub const REQUIRED: [(&str, Cap); 20] = [
    ("KVM_CAP_IRQCHIP", Cap::Irqchip),
    ("KVM_CAP_USER_MEMORY", Cap::UserMemory),
    ("KVM_CAP_SYNC_MMU", Cap::SyncMmu),
    ("KVM_CAP_SET_TSS_ADDR", Cap::SetTssAddr),
    ("KVM_CAP_SET_IDENTITY_MAP_ADDR", Cap::SetIdentityMapAddr),
    ("KVM_CAP_EXT_CPUID", Cap::ExtCpuid),
    ("KVM_CAP_MP_STATE", Cap::MpState),
    ("KVM_CAP_IRQFD", Cap::Irqfd),
    ("KVM_CAP_IOEVENTFD", Cap::Ioeventfd),
    ("KVM_CAP_READONLY_MEM", Cap::ReadonlyMem),
    ("KVM_CAP_IMMEDIATE_EXIT", Cap::ImmediateExit),
    ("KVM_CAP_GET_TSC_KHZ", Cap::GetTscKhz),
    ("KVM_CAP_TSC_DEADLINE_TIMER", Cap::TscDeadlineTimer),
    ("KVM_CAP_KVMCLOCK_CTRL", Cap::KvmclockCtrl),
    ("KVM_CAP_ADJUST_CLOCK", Cap::AdjustClock),
    ("KVM_CAP_VCPU_EVENTS", Cap::VcpuEvents),
    ("KVM_CAP_DEBUGREGS", Cap::Debugregs),
    ("KVM_CAP_XSAVE", Cap::Xsave),
    ("KVM_CAP_XSAVE2", Cap::Xsave2),
    ("KVM_CAP_XCRS", Cap::Xcrs),
];

/// Turns of the loop that is timed. Real KVM takes well under a millisecond, one that emulates ring 0 a tenth of a second.
const TURNS: u32 = 100_000;
/// Instructions of one turn.
const TURN_INSTRUCTIONS: u32 = 2;
/// `mov ecx, TURNS` (its operand is put in), then `dec ecx; jnz` and `hlt`, in 16-bit code.
const CODE: [u8; 12] = [0x66, 0xb9, 0, 0, 0, 0, 0x66, 0x49, 0x75, 0xfc, 0xf4, 0xf4];
const CODE_START: u64 = 0x1000;

/// The best of so many runs counts: the first pays for mapping the guest's memory, and any may be interrupted.
const RUNS: usize = 4;

/// Below this many instructions a second of ring 0, the KVM is emulated in software, and no ordinary kernel boots in a useful time. Real
/// ones make a hundred times as many; the lab's, which is emulated as a whole, some ten times.
pub const RING0_USABLE_PER_SECOND: u64 = 50_000_000;

/// Why a guest could not be tried.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// A call to KVM failed.
    #[error("{0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// See [`MemoryError`].
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The guest's code cannot be written.
    #[error("cannot write the guest's code")]
    Code(#[from] vm_memory::GuestMemoryError),
    /// The guest did something else than halt.
    #[error("the guest ended with {0} instead of halting")]
    Exit(String),
}

fn kvm<T>(what: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, ProbeError> {
    result.map_err(|source| ProbeError::Kvm(what, source))
}

/// The names of the capabilities that this KVM lacks.
pub fn missing_capabilities(kvm: &Kvm) -> Vec<&'static str> {
    REQUIRED.into_iter().filter(|(_, cap)| !kvm.check_extension(*cap)).map(|(name, _)| name).collect()
}

/// The API version that KVM has, and the one that it must have.
pub fn api_versions(kvm: &Kvm) -> (i32, i32) {
    (kvm.get_api_version(), i32::try_from(KVM_API_VERSION).expect("12"))
}

/// Instructions a second of a loop in ring 0 of a real guest.
///
/// # Errors
/// [`ProbeError`] when no guest can be run.
pub fn ring0_instructions_per_second(kvm_fd: &Kvm) -> Result<u64, ProbeError> {
    let memory = memory::anonymous(MEMORY_MIN_MIB)?;
    let mut code = CODE;
    code[2..6].copy_from_slice(&TURNS.to_le_bytes());
    memory.write_slice(&code, GuestAddress(CODE_START))?;
    let vm = kvm("KVM_CREATE_VM", kvm_fd.create_vm())?;
    for region in GuestMemoryBackend::iter(&memory) {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping outlives the VM, which is dropped first.
        kvm("KVM_SET_USER_MEMORY_REGION", unsafe { vm.set_user_memory_region(region) })?;
    }
    let mut vcpu = kvm("KVM_CREATE_VCPU", vm.create_vcpu(0))?;
    let mut sregs = kvm("KVM_GET_SREGS", vcpu.get_sregs())?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    kvm("KVM_SET_SREGS", vcpu.set_sregs(&sregs))?;
    let registers = kvm_regs { rip: CODE_START, rflags: 2, ..Default::default() };
    let mut taken = Duration::MAX;
    for _ in 0..RUNS {
        kvm("KVM_SET_REGS", vcpu.set_regs(&registers))?;
        let start = Instant::now();
        match kvm("KVM_RUN", vcpu.run())? {
            VcpuExit::Hlt => taken = taken.min(start.elapsed()),
            other => return Err(ProbeError::Exit(format!("{other:?}"))),
        }
    }
    let instructions = u128::from(TURNS) * u128::from(TURN_INSTRUCTIONS);
    Ok(u64::try_from(instructions * 1_000_000_000 / taken.as_nanos().max(1)).unwrap_or(u64::MAX))
}
