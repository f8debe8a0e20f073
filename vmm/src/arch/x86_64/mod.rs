//! x86_64: where things are in the guest's address space, how it boots, and what a vCPU's state is.
//!
//! - [`layout`]: addresses and interrupt lines
//! - [`boot`]: PVH entry and the registers it wants
//! - [`mptable`]: the description of CPUs and interrupt lines, in place of ACPI
//! - [`cpuid`]: what each vCPU is told about itself
//! - [`state`]: a vCPU's and the interrupt controllers' state, saved and restored

pub mod boot;
pub mod cpuid;
pub mod layout;
pub mod mptable;
pub mod state;
