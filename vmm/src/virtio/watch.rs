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

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, OwnedFd, RawFd};
    use std::os::unix::net::UnixStream;

    use super::super::device::DeviceError;
    use super::super::io::DeviceIo;
    use super::*;
    use crate::devices::DeviceState;

    struct Talker {
        socket: Option<OwnedFd>,
        events: EventSet,
    }

    impl VirtioDevice for Talker {
        fn device_type(&self) -> u32 {
            1
        }

        fn features(&self) -> u64 {
            0
        }

        fn queue_sizes(&self) -> &'static [u16] {
            &[]
        }

        fn process_queue(&mut self, _: usize, _: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
            Ok(())
        }

        fn host_fd(&self) -> Option<RawFd> {
            self.socket.as_ref().map(AsRawFd::as_raw_fd)
        }

        fn host_events(&self) -> EventSet {
            self.events
        }

        fn save(&self) -> DeviceState {
            DeviceState::Rng
        }

        fn restore(&mut self, _: &DeviceState) -> Result<(), &'static str> {
            Ok(())
        }
    }

    #[test]
    fn a_device_is_watched_for_what_it_waits_for_until_it_closes_its_host_side() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let epoll = Arc::new(Epoll::new().unwrap());
        let ready = || {
            let mut events = [EpollEvent::default()];
            (epoll.wait(0, &mut events).unwrap() > 0).then(|| (events[0].data(), events[0].event_set()))
        };
        let mut device = Talker { socket: Some(ours.into()), events: EventSet::IN };
        let mut watch = HostWatch::start(&epoll, 77, &device).unwrap().unwrap();
        assert_eq!(ready(), None);
        device.events = EventSet::IN | EventSet::OUT;
        watch.follow(&device);
        assert_eq!(ready(), Some((77, EventSet::OUT)));
        device.events = EventSet::IN;
        watch.follow(&device);
        assert_eq!(ready(), None);
        drop(theirs);
        assert!(ready().is_some(), "for as long as the end is not taken note of");
        device.socket = None;
        device.events = EventSet::OUT;
        watch.follow(&device);
        assert_eq!(ready(), None);
        assert!(HostWatch::start(&epoll, 77, &device).unwrap().is_none());
    }
}
