//! A thread that does devices' work: it waits for the queues' notifications and the devices' host sides.

use std::io;
use std::os::fd::AsRawFd;
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
    /// Starts the thread, which is of a kind that can serve the devices it will get.
    ///
    /// # Errors
    /// When the host is out of descriptors or threads.
    pub fn start(board: Arc<Board>, thread: Thread) -> io::Result<Self> {
        let epoll = Arc::new(Epoll::new()?);
        let theirs = Arc::clone(&epoll);
        std::thread::Builder::new().name(thread.name().to_owned()).spawn(move || {
            seccomp::confine(thread);
            work(&theirs, &board);
        })?;
        Ok(Self { epoll })
    }

    /// Watches a device from now on.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn add(&self, slot: u8, device: &mut Plugged) -> io::Result<()> {
        let data = |number: u32| u64::from(slot) << 32 | u64::from(number);
        for (kick, queue) in device.kicks().iter().zip(0..) {
            let event = EpollEvent::new(EventSet::IN, data(queue));
            self.epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), event)?;
        }
        device.watch_host(&self.epoll, data(HOST))
    }

    /// Watches a device no longer.
    ///
    /// # Errors
    /// When it was not watched.
    pub fn remove(&self, device: &Plugged) -> io::Result<()> {
        let kicks = device.kicks().iter().map(AsRawFd::as_raw_fd);
        kicks
            .chain(device.host_fd())
            .try_for_each(|fd| self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()))
    }
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
