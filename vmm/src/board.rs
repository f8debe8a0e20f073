//! The board: what vCPUs reach when they leave guest mode, and the way to the machine's owner.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::arch::layout::{SLOT_SIZE, SLOTS_START};
use crate::control::message::{Event, Exit, FromVmm, STATUS_EVENTS_MAX};
use crate::control::socket::ControlSocket;
use crate::devices::ports::{PortWrite, Ports};
use crate::virtio::slot::Slot;

/// Everything that vCPU threads share.
#[derive(Debug)]
pub struct Board {
    slots: Box<[Slot]>,
    ports: Mutex<Ports>,
    owner: Arc<ControlSocket>,
    statuses: AtomicU32,
}

impl Board {
    /// A board whose events go to `owner`.
    pub fn new(slots: Box<[Slot]>, ports: Ports, owner: Arc<ControlSocket>) -> Self {
        Self { slots, ports: Mutex::new(ports), owner, statuses: AtomicU32::new(0) }
    }

    /// The slots, by number.
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// A vCPU wrote where there is no memory, or where memory is read-only.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        let Some(distance) = address.checked_sub(SLOTS_START) else { return };
        let slot = usize::try_from(distance / SLOT_SIZE).ok().and_then(|number| self.slots.get(number));
        if let (Some(slot), Ok(offset)) = (slot, usize::try_from(distance % SLOT_SIZE)) {
            slot.write(offset, data);
        }
    }

    /// A vCPU read from an I/O port.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner).read(port, data);
    }

    /// A vCPU wrote to an I/O port; perhaps it was its last act.
    pub fn write_port(&self, port: u16, data: &[u8]) -> Option<Exit> {
        let write = self.ports.lock().unwrap_or_else(PoisonError::into_inner).write(port, data);
        match write {
            PortWrite::Done => None,
            PortWrite::Reset => Some(Exit::Reset),
            PortWrite::Status(byte) => {
                if self.statuses.fetch_add(1, Ordering::Relaxed) < STATUS_EVENTS_MAX {
                    // An owner that does not read loses events rather than stops the guest.
                    let _ = self.owner.try_send(&FromVmm::Event(Event::Status(byte)));
                }
                None
            }
        }
    }

    /// Tells the owner why the machine has ended, and ends the process.
    pub fn end(&self, reason: Exit) -> ! {
        let _ = self.owner.try_send(&FromVmm::Event(Event::Exited(reason)));
        // Without running destructors: other threads still use what they would destroy.
        // SAFETY: ends the process, no memory is touched.
        unsafe { libc::_exit(0) }
    }
}
