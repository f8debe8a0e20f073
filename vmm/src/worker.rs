//! The thread that does the devices' work: it waits for the queues' notifications and the devices' host sides.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::board::Board;
use crate::seccomp::{self, Thread};
use crate::virtio::slot::Plugged;

/// Stands for the device's host side where a queue's number would be.
const HOST: u32 = u32::MAX;
const EVENTS: usize = 32;

/// The handle of the thread, through which devices are put under its care.
#[derive(Debug)]
pub struct Worker {
    epoll: Arc<Epoll>,
}

impl Worker {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the host is out of descriptors or threads.
    pub fn start(board: Arc<Board>) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new()?);
        let theirs = Arc::clone(&epoll);
        std::thread::Builder::new().name("devices".to_owned()).spawn(move || {
            seccomp::confine(Thread::Devices);
            work(&theirs, &board);
        })?;
        Ok(Self { epoll })
    }

    /// Watches a device from now on.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn add(&self, slot: u8, device: &Plugged) -> io::Result<()> {
        watched(device).try_for_each(|(fd, number)| {
            let event = EpollEvent::new(EventSet::IN, u64::from(slot) << 32 | u64::from(number));
            self.epoll.ctl(ControlOperation::Add, fd, event)
        })
    }

    /// Watches a device no longer.
    ///
    /// # Errors
    /// When it was not watched.
    pub fn remove(&self, device: &Plugged) -> io::Result<()> {
        watched(device)
            .try_for_each(|(fd, _)| self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()))
    }
}

/// The descriptors of a device, each with the number of its queue or [`HOST`].
fn watched(device: &Plugged) -> impl Iterator<Item = (RawFd, u32)> + '_ {
    let queues = device.kicks().iter().map(AsRawFd::as_raw_fd).zip(0..);
    queues.chain(device.host_fd().map(|fd| (fd, HOST)))
}

#[allow(clippy::cast_possible_truncation)] // the two halves of an event's 64 bits
fn work(epoll: &Epoll, board: &Board) {
    let mut events = [EpollEvent::default(); EVENTS];
    loop {
        let ready = match epoll.wait(-1, &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => panic!("epoll_wait on a descriptor of our own: {error}"),
        };
        for event in &events[..ready] {
            let (slot, number) = ((event.data() >> 32) as usize, event.data() as u32);
            let slot = &board.slots()[slot];
            match number {
                HOST => slot.process_host(),
                queue => slot.process_queue(queue as usize),
            }
        }
    }
}
