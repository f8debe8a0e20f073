//! Console device, section 5.3, output only: what the guest prints goes to the console ring.

use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::DeviceState;
use crate::console_ring::ConsoleRing;
use crate::virtio::device::{DeviceError, VirtioDevice};
use crate::virtio::io::DeviceIo;

const QUEUE_SIZES: [u16; 2] = [16, 64];
const TRANSMIT: usize = 1;

/// Bytes taken from one buffer. Linux prints at most a page at a time; what a hostile driver sends beyond is dropped.
const LINE_MAX: usize = 4096;

/// The console ring, shared by the virtio console and the serial port.
pub type SharedRing = Arc<Mutex<ConsoleRing>>;

/// The device.
#[derive(Debug)]
pub struct Console {
    ring: SharedRing,
}

impl Console {
    /// A console that prints to `ring`.
    pub fn new(ring: SharedRing) -> Self {
        Self { ring }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn process_queue(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        // Nothing is ever typed, so the buffers of the receive queue stay where they are.
        if queue != TRANSMIT {
            return Ok(());
        }
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        io.take_turn(queue, |memory, chain| {
            let mut bytes = [0; LINE_MAX];
            let read = chain.reader(memory)?.read(&mut bytes)?;
            ring.write(&bytes[..read]);
            Ok(0)
        })
    }

    fn save(&self) -> DeviceState {
        DeviceState::Console
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), &'static str> {
        if *state == DeviceState::Console { Ok(()) } else { Err("not the state of a console") }
    }
}
