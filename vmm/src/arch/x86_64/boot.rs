//! The PVH boot protocol: the kernel is entered in 32-bit protected mode without paging, with the address of the start info
//! in EBX. Sources: Xen's `docs/misc/pvh.pandoc`, Linux `arch/x86/platform/pvh/head.S`.

use std::fs::File;

use kvm_bindings::{kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_start_info};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::layout::{
    CMDLINE_MAX, CMDLINE_START, GDT_START, HIGH_MEMORY_START, MPTABLE_START, PVH_INFO_START, PVH_MEMMAP_START,
};
use crate::memory::Memory;

const START_INFO_MAGIC: u32 = 0x336e_c578;
const E820_RAM: u32 = 1;
const CR0_PROTECTED: u64 = 1;
/// Reserved bit of RFLAGS that is always set.
const RFLAGS: u64 = 2;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, memory is write-back unless they say otherwise: without it the kernel maps memory uncached.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Why a kernel cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file is not such a kernel, or is cut short.
    #[error("the kernel is not a usable ELF vmlinux")]
    Kernel(#[source] linux_loader::loader::Error),
    /// The kernel was built without `CONFIG_PVH`.
    #[error("the kernel has no PVH entry: build it with CONFIG_PVH")]
    NoPvh,
    /// The command line does not fit.
    #[error("the kernel's command line of {0} bytes is too long: at most {max} are allowed", max = CMDLINE_MAX - 1)]
    Cmdline(usize),
    /// A NUL in it would cut it short.
    #[error("the kernel's command line holds a NUL byte")]
    CmdlineNul,
    /// Guest memory is too small for what must be written to it.
    #[error("cannot write boot data to guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The same, said by the loader.
    #[error("cannot write boot data to guest memory")]
    Configurator(#[source] linux_loader::configurator::Error),
}

/// Loads the kernel and writes its command line and start info. Returns its entry.
///
/// # Errors
/// [`BootError`] when the kernel or the command line is not usable.
pub fn load(memory: &Memory, kernel: &mut File, cmdline: &str) -> Result<GuestAddress, BootError> {
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineNul);
    }
    if cmdline.len() >= CMDLINE_MAX {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    let loaded = Elf::load(memory, None, kernel, None).map_err(BootError::Kernel)?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else { return Err(BootError::NoPvh) };
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE_START))?;
    memory.write_obj(0u8, GuestAddress(CMDLINE_START + cmdline.len() as u64))?;
    write_start_info(memory)?;
    Ok(entry)
}

fn write_start_info(memory: &Memory) -> Result<(), BootError> {
    let ram = |addr, size| hvm_memmap_table_entry { addr, size, type_: E820_RAM, reserved: 0 };
    let mut map = vec![ram(0, MPTABLE_START)];
    for region in GuestMemoryBackend::iter(memory) {
        let start = region.start_addr().0.max(HIGH_MEMORY_START);
        map.push(ram(start, region.start_addr().0 + region.len() - start));
    }
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        cmdline_paddr: CMDLINE_START,
        memmap_paddr: PVH_MEMMAP_START,
        memmap_entries: u32::try_from(map.len()).expect("a few"),
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(PVH_INFO_START));
    params.set_sections(&map, GuestAddress(PVH_MEMMAP_START));
    PvhBootConfigurator::write_bootparams(&params, memory).map_err(BootError::Configurator)
}

/// The segments that the entry wants, and the GDT they stand for.
///
/// # Errors
/// When guest memory is too small for the GDT.
pub fn set_segments(memory: &Memory, sregs: &mut kvm_sregs) -> Result<(), BootError> {
    let flat = |selector, type_, s, db| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        db,
        s,
        g: 1,
        ..Default::default()
    };
    let code = flat(0x8, 0xb, 1, 1);
    let data = flat(0x10, 0x3, 1, 1);
    let task = kvm_segment { limit: 0x67, g: 0, ..flat(0x18, 0xb, 0, 0) };
    let gdt = [0, descriptor(&code), descriptor(&data), descriptor(&task)];
    for (address, entry) in (GDT_START..).step_by(8).zip(gdt) {
        memory.write_obj(entry, GuestAddress(address))?;
    }
    sregs.gdt.base = GDT_START;
    sregs.gdt.limit = 8 * 4 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = code;
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    sregs.tr = task;
    sregs.cr0 = CR0_PROTECTED;
    sregs.cr4 = 0;
    Ok(())
}

/// A segment as the GDT holds it (Intel SDM 3A, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let bits = |value: u8, shift: u32| u64::from(value) << shift;
    let limit = u64::from(segment.limit) >> if segment.g == 1 { 12 } else { 0 };
    limit & 0xffff
        | (segment.base & 0xff_ffff) << 16
        | bits(segment.type_, 40)
        | bits(segment.s, 44)
        | bits(segment.dpl, 45)
        | bits(segment.present, 47)
        | (limit >> 16 & 0xf) << 48
        | bits(segment.avl, 52)
        | bits(segment.l, 53)
        | bits(segment.db, 54)
        | bits(segment.g, 55)
        | (segment.base >> 24 & 0xff) << 56
}

/// The registers that the entry wants.
pub fn entry_registers(entry: GuestAddress) -> kvm_regs {
    kvm_regs { rip: entry.0, rbx: PVH_INFO_START, rflags: RFLAGS, ..Default::default() }
}

/// MSRs that firmware would have set.
pub fn msrs() -> [kvm_msr_entry; 2] {
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    [msr(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING), msr(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK)]
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::memory;

    #[test]
    fn what_is_not_a_kernel_is_refused() {
        let memory = memory::anonymous(64).unwrap();
        for content in [&b""[..], b"#!/bin/sh\n", &[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(content).unwrap();
            assert!(matches!(load(&memory, &mut file, ""), Err(BootError::Kernel(_))), "{content:?}");
        }
    }

    #[test]
    fn command_lines_that_the_kernel_would_cut_are_refused() {
        let memory = memory::anonymous(64).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        assert!(matches!(load(&memory, &mut file, &"x".repeat(CMDLINE_MAX)), Err(BootError::Cmdline(_))));
        assert!(matches!(load(&memory, &mut file, "a\0b"), Err(BootError::CmdlineNul)));
    }

    #[test]
    fn the_code_segment_is_flat_and_32_bit() {
        let memory = memory::anonymous(64).unwrap();
        let mut sregs = kvm_sregs::default();
        set_segments(&memory, &mut sregs).unwrap();
        assert_eq!(descriptor(&sregs.cs), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&sregs.ds), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&sregs.tr), 0x0000_8b00_0000_0067);
    }
}
