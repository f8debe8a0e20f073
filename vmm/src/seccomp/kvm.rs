//! The ioctls of KVM, under the names and numbers of Linux's `include/uapi/linux/kvm.h`, by the threads that make them.

use kvm_bindings::{
    KVMIO, kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_ioeventfd, kvm_irqchip, kvm_irqfd, kvm_lapic_state,
    kvm_mp_state, kvm_msr_list, kvm_msrs, kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

const KVM_CREATE_VM: u32 = io(0x01);
const KVM_GET_MSR_INDEX_LIST: u32 = iowr::<kvm_msr_list>(0x02);
const KVM_CHECK_EXTENSION: u32 = io(0x03);
const KVM_GET_VCPU_MMAP_SIZE: u32 = io(0x04);
const KVM_GET_SUPPORTED_CPUID: u32 = iowr::<kvm_cpuid2>(0x05);
const KVM_CREATE_VCPU: u32 = io(0x41);
const KVM_SET_USER_MEMORY_REGION: u32 = iow::<kvm_userspace_memory_region>(0x46);
const KVM_SET_TSS_ADDR: u32 = io(0x47);
const KVM_SET_IDENTITY_MAP_ADDR: u32 = iow::<u64>(0x48);
const KVM_CREATE_IRQCHIP: u32 = io(0x60);
const KVM_GET_IRQCHIP: u32 = iowr::<kvm_irqchip>(0x62);
const KVM_SET_IRQCHIP: u32 = ior::<kvm_irqchip>(0x63);
const KVM_IRQFD: u32 = iow::<kvm_irqfd>(0x76);
const KVM_IOEVENTFD: u32 = iow::<kvm_ioeventfd>(0x79);
const KVM_SET_CLOCK: u32 = iow::<kvm_clock_data>(0x7b);
const KVM_GET_CLOCK: u32 = ior::<kvm_clock_data>(0x7c);
const KVM_RUN: u32 = io(0x80);
const KVM_GET_REGS: u32 = ior::<kvm_regs>(0x81);
const KVM_SET_REGS: u32 = iow::<kvm_regs>(0x82);
const KVM_GET_SREGS: u32 = ior::<kvm_sregs>(0x83);
const KVM_SET_SREGS: u32 = iow::<kvm_sregs>(0x84);
const KVM_GET_MSRS: u32 = iowr::<kvm_msrs>(0x88);
const KVM_SET_MSRS: u32 = iow::<kvm_msrs>(0x89);
const KVM_GET_LAPIC: u32 = ior::<kvm_lapic_state>(0x8e);
const KVM_SET_LAPIC: u32 = iow::<kvm_lapic_state>(0x8f);
const KVM_SET_CPUID2: u32 = iow::<kvm_cpuid2>(0x90);
const KVM_GET_CPUID2: u32 = iowr::<kvm_cpuid2>(0x91);
const KVM_GET_MP_STATE: u32 = ior::<kvm_mp_state>(0x98);
const KVM_SET_MP_STATE: u32 = iow::<kvm_mp_state>(0x99);
const KVM_GET_VCPU_EVENTS: u32 = ior::<kvm_vcpu_events>(0x9f);
const KVM_SET_VCPU_EVENTS: u32 = iow::<kvm_vcpu_events>(0xa0);
const KVM_GET_DEBUGREGS: u32 = ior::<kvm_debugregs>(0xa1);
const KVM_SET_DEBUGREGS: u32 = iow::<kvm_debugregs>(0xa2);
const KVM_SET_TSC_KHZ: u32 = io(0xa2);
const KVM_GET_TSC_KHZ: u32 = io(0xa3);
const KVM_SET_XSAVE: u32 = iow::<kvm_xsave>(0xa5);
const KVM_GET_XCRS: u32 = ior::<kvm_xcrs>(0xa6);
const KVM_SET_XCRS: u32 = iow::<kvm_xcrs>(0xa7);
const KVM_KVMCLOCK_CTRL: u32 = io(0xad);
const KVM_GET_XSAVE2: u32 = ior::<kvm_xsave>(0xcf);

/// A vCPU's thread: it runs, stands still, and reads the state. The first is by far the most frequent.
pub(super) const VCPU: &[u32] = &[
    KVM_RUN,
    KVM_KVMCLOCK_CTRL,
    KVM_GET_MP_STATE,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_GET_XSAVE2,
    KVM_GET_XCRS,
    KVM_GET_DEBUGREGS,
    KVM_GET_LAPIC,
    KVM_GET_TSC_KHZ,
    KVM_GET_CPUID2,
    KVM_GET_MSRS,
    KVM_GET_VCPU_EVENTS,
];

/// The control thread: it makes machines, wires devices and restores state.
pub(super) const CONTROL: &[u32] = &[
    KVM_CREATE_VM,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_CHECK_EXTENSION,
    KVM_GET_SUPPORTED_CPUID,
    KVM_GET_MSR_INDEX_LIST,
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_IDENTITY_MAP_ADDR,
    KVM_SET_TSS_ADDR,
    KVM_CREATE_IRQCHIP,
    KVM_CREATE_VCPU,
    KVM_IRQFD,
    KVM_IOEVENTFD,
    KVM_SET_CPUID2,
    KVM_SET_MSRS,
    KVM_SET_SREGS,
    KVM_SET_REGS,
    KVM_SET_LAPIC,
    KVM_SET_TSC_KHZ,
    KVM_SET_MP_STATE,
    KVM_SET_XSAVE,
    KVM_SET_XCRS,
    KVM_SET_DEBUGREGS,
    KVM_SET_VCPU_EVENTS,
    KVM_GET_IRQCHIP,
    KVM_SET_IRQCHIP,
    KVM_GET_CLOCK,
    KVM_SET_CLOCK,
];

const fn io(number: u32) -> u32 {
    request::<()>(_IOC_NONE, number)
}

const fn ior<T>(number: u32) -> u32 {
    request::<T>(_IOC_READ, number)
}

const fn iow<T>(number: u32) -> u32 {
    request::<T>(_IOC_WRITE, number)
}

const fn iowr<T>(number: u32) -> u32 {
    request::<T>(_IOC_READ | _IOC_WRITE, number)
}

#[allow(clippy::cast_possible_truncation)] // the kernel reads 32 bits of it, and a size has 14
const fn request<T>(direction: u32, number: u32) -> u32 {
    ioctl_expr(direction, KVMIO, number, size_of::<T>() as u32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_that_strace_shows() {
        assert_eq!(KVM_RUN, 0xae80);
        assert_eq!(KVM_GET_REGS, 0x8090_ae81);
        assert_eq!(KVM_SET_USER_MEMORY_REGION, 0x4020_ae46);
        assert_eq!(KVM_IOEVENTFD, 0x4040_ae79);
        assert_eq!(KVM_GET_CPUID2, 0xc008_ae91);
        assert_eq!(KVM_GET_XSAVE2, 0x9000_aecf);
    }
}
