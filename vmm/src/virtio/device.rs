//! What a device is to the rest of the VMM.

use std::os::fd::RawFd;

use vmm_sys_util::epoll::EventSet;

use super::io::DeviceIo;
use crate::devices::DeviceState;

/// Why a device cannot go on. The transport answers with `DEVICE_NEEDS_RESET`: the driver has broken the rules, or has lost
/// memory that its rings name.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The rings are malformed.
    #[error("malformed virtqueue: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// A descriptor names memory that is not there.
    #[error("bad guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// A buffer is too short, or what the device needs of its host is gone.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The driver sent what the standard forbids.
    #[error("driver error: {0}")]
    Driver(&'static str),
}

/// A virtio device. It is called with its slot locked, by one thread at a time.
pub trait VirtioDevice: Send {
    /// Its type, section 5 of the standard.
    fn device_type(&self) -> u32;

    /// The features it offers besides those of the transport.
    fn features(&self) -> u64;

    /// The largest size of each of its queues, powers of two.
    fn queue_sizes(&self) -> &'static [u16];

    /// Its configuration space.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// The driver wrote to the configuration space. The bytes are the driver's choice; so is the offset.
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    /// The driver is ready, with these features.
    fn activate(&mut self, _features: u64) {}

    /// The driver has put buffers into a queue. At most [`DeviceIo::take_turn`] chains are worth one call: the rest waits for the next, so
    /// that one queue cannot keep the thread.
    ///
    /// # Errors
    /// [`DeviceError`] when the device cannot go on.
    fn process_queue(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError>;

    /// True when a vCPU that notifies a queue does the work itself, as far as it needs no waiting: [`notified`](Self::notified).
    fn works_on_vcpus(&self) -> bool {
        false
    }

    /// As [`process_queue`](Self::process_queue), on the thread of the vCPU that notifies the queue. What would have to wait is
    /// [handed over](DeviceIo::hand_over).
    ///
    /// # Errors
    /// As [`process_queue`](Self::process_queue).
    fn notified(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        io.hand_over(queue)
    }

    /// A descriptor that is ready when the device's host side has something to do. It stays the same for as long as the device is
    /// plugged, unless the device closes it, which ends the watch over it: from then on there is none.
    fn host_fd(&self) -> Option<RawFd> {
        None
    }

    /// What makes that descriptor ready. Asked again whenever the device has done something.
    fn host_events(&self) -> EventSet {
        EventSet::IN
    }

    /// That descriptor is ready. Also called when the driver is not ready yet, with no queue ready.
    ///
    /// # Errors
    /// As [`process_queue`](Self::process_queue).
    fn process_host(&mut self, _io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The driver has reset the device.
    fn reset(&mut self) {}

    /// What a restored device needs beyond its queues and features. Called with all vCPUs paused.
    fn save(&self) -> DeviceState;

    /// Takes over saved state. The device has just been made, with host sides of its own.
    ///
    /// # Errors
    /// When the state is another device's or holds impossible values: it is as untrusted as any input.
    fn restore(&mut self, state: &DeviceState) -> Result<(), &'static str>;

    /// The machine has been restored and is about to run: tell the guest what it must know.
    ///
    /// # Errors
    /// As [`process_queue`](Self::process_queue).
    fn resumed(&mut self, _io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        Ok(())
    }
}
