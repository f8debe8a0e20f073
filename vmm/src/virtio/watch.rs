//! The watch over a device's host side, by the thread that does the device's work.

use std::io;
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::device::VirtioDevice;
use crate::complaint::complain;

/// One descriptor in the thread's epoll, and the events it is watched for.
pub struct HostWatch {
    epoll: Arc<Epoll>,
    /// What the epoll says when the descriptor is ready.
    data: u64,
    events: EventSet,
}

impl HostWatch {
    /// Watches a device from now on, if it has a host side.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn start(epoll: &Arc<Epoll>, data: u64, device: &dyn VirtioDevice) -> io::Result<Option<Self>> {
        let Some(fd) = device.host_fd() else { return Ok(None) };
        let events = device.host_events();
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, data))?;
        Ok(Some(Self { epoll: Arc::clone(epoll), data, events }))
    }

    /// Watches for what the device waits for now.
    pub fn follow(&mut self, device: &dyn VirtioDevice) {
        let wanted = device.host_events();
        if wanted == self.events {
            return;
        }
        // A descriptor that the device has closed has left the epoll by that.
        let Some(fd) = device.host_fd() else { return };
        match self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(wanted, self.data)) {
            Ok(()) => self.events = wanted,
            Err(error) => complain(format_args!("cannot watch a device's host side: {error}")),
        }
    }
}
