//! A minimal virtual machine monitor on KVM. It runs a Linux kernel with virtio devices over MMIO, plugs and unplugs devices
//! while the guest runs, and saves and restores the whole machine. It knows nothing of containers.
//!
//! The owner of a VMM starts `bulkhead-vmm` with one end of a [`control`] socket and steers it through that for its whole life.
//!
//! - [`control`]: the socket and what is said on it; all that an owner needs
//! - [`console_ring`]: the guest's console, readable by the owner
//! - [`server`]: the VMM's end of it
//! - [`machine`]: KVM, memory, vCPUs and board put together; [`board`], [`vcpu`], [`worker`]: its parts
//! - [`snapshot`]: a machine in a file
//! - [`memory`], [`arch`]: guest memory, and what is peculiar to x86_64
//! - [`virtio`], [`devices`]: the transport and what is plugged into it
//! - [`jail`], [`seccomp`]: giving up every privilege, and all but a few system calls
//! - [`complaint`]: messages on standard error
//! - [`probe`]: whether this host can run guests

pub mod arch;
pub mod board;
pub mod complaint;
pub mod console_ring;
pub mod control;
pub mod devices;
#[cfg(test)]
mod hostile;
pub mod jail;
pub mod machine;
pub mod memory;
pub mod probe;
pub mod seccomp;
pub mod server;
pub mod snapshot;
pub mod vcpu;
pub mod virtio;
pub mod worker;
