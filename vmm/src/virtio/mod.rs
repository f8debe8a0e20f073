//! virtio 1.2, over MMIO.
//!
//! - [`device`]: what a device is to the rest of the VMM
//! - [`io`]: what a device works with: its queues, guest memory, its interrupt
//! - [`registers`]: the register pages of all slots
//! - [`watch`]: the events of a device's host side that its thread waits for
//! - [`slot`]: the MMIO transport, and the plugging of devices into it

pub mod device;
pub mod io;
pub mod registers;
pub mod slot;
pub mod watch;
