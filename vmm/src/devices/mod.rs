//! The virtio devices, one folder or file each, and the two I/O ports of the machine.
//!
//! - [`balloon`]: gives memory that the guest has freed back to the host
//! - [`block`]: disks of one file or of several
//! - [`console`]: the guest's console
//! - [`factory`]: devices from what the owner asks for
//! - [`fs`]: files of the host, by way of a file server
//! - [`ports`]: the status port, the reset port and the serial port
//! - [`rng`]: random bytes
//! - [`transfer`]: bytes of files, moved straight into and out of guest memory
//! - [`vsock`]: stream sockets between guest and host

pub mod balloon;
pub mod block;
pub mod console;
pub mod factory;
pub mod fs;
pub mod ports;
pub mod rng;
pub mod transfer;
pub mod vsock;

use serde::{Deserialize, Serialize};

/// What a device saves beyond its features and queues. On the way back it is untrusted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// [`balloon::Balloon`]
    Balloon,
    /// [`block::Block`]: what the guest has learned of its size and may not change behind its back.
    Block {
        /// Size in 512-byte sectors.
        sectors: u64,
        /// Writes are refused.
        read_only: bool,
    },
    /// [`console::Console`]
    Console,
    /// [`fs::Fs`]: what its server knows of the guest does not outlive the machine.
    Fs {
        /// What the guest mounts it by.
        tag: String,
        /// The guest has files of it in use, or had them.
        in_use: bool,
    },
    /// [`rng::Rng`]
    Rng,
    /// [`vsock::Vsock`]: connections do not outlive the machine that held them.
    Vsock {
        /// The guest's context id.
        cid: u64,
    },
}
