//! All connections of a device, and what the host's side does to them.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::VsockError;
use super::buffer::Buffer;
use super::connection::{Connection, Next, Verdict};
use super::packet::{CID_HOST, Header, TYPE_STREAM, op};
use crate::virtio::device::DeviceError;

/// Most connections at a time, those included that have not said where to. Together they keep at most 64 MiB, when no host program reads.
pub(super) const CONNECTIONS_MAX: usize = 512;

/// Most RSTs that wait for the guest's buffers. Linux keeps 256 buffers ready; a guest that leaves so many unread has lost the rest,
/// and its programs see a timeout instead.
pub(super) const RESETS_MAX: usize = 1024;

/// Most events, and most new connections, that are handled before others get their turn.
const TURN: usize = 64;

/// Local ports start somewhere in the upper half of the numbers: a guest that was restored may still have closed sockets whose peers had
/// the ports of another VMM, and would refuse the same pair of ports.
const FIRST_PORT: u32 = 1 << 31;

/// What an event is about: these, or else the connection with that local port.
const LISTENER: u64 = 1 << 32;
const AGAIN: u64 = 2 << 32;

/// Something for the guest.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    /// An RST for a connection that no longer is, or never was.
    Reset(Header),
    /// What the connection with this local port has.
    Connection(u32, Next),
}

/// The connections by their local ports.
pub(super) struct Table {
    pub(super) cid: u64,
    listener: UnixListener,
    /// Host programs may be waiting to be accepted.
    waiting: bool,
    epoll: Epoll,
    again: EventFd,
    connections: BTreeMap<u32, Connection>,
    /// Those that have something for the guest, each once, the one whose turn it is first.
    ready: VecDeque<u32>,
    resets: VecDeque<Header>,
    next_port: u32,
}

impl Table {
    pub(super) fn new(listener: OwnedFd, cid: u64) -> Result<Self, VsockError> {
        let nonblocking = fcntl(&listener, FcntlArg::F_GETFL)
            .map(|flags| OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK)
            .and_then(|flags| fcntl(&listener, FcntlArg::F_SETFL(flags)));
        nonblocking.map_err(|error| VsockError::Listener(error.into()))?;
        let epoll = Epoll::new().map_err(VsockError::Epoll)?;
        let again = EventFd::new(EFD_NONBLOCK).map_err(VsockError::Epoll)?;
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (fd, token) in [(listener.as_raw_fd(), LISTENER), (again.as_raw_fd(), AGAIN)] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(edges, token)).map_err(VsockError::Epoll)?;
        }
        Ok(Self {
            cid,
            listener: UnixListener::from(listener),
            waiting: false,
            epoll,
            again,
            connections: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: random_port(),
        })
    }

    /// Readable when [`poll`](Self::poll) has something to do.
    pub(super) fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Makes [`fd`](Self::fd) readable: there is more to do than one turn allows.
    pub(super) fn come_again(&self) {
        // It fails only when it has been written 2^64 times. Nobody reads it: each write is an edge.
        let _ = self.again.write(1);
    }

    /// Handles what host programs have done. [`accept`](Self::accept) does the rest.
    pub(super) fn poll(&mut self) {
        let mut events = [EpollEvent::default(); TURN];
        // A failure can only be an interruption by a signal; the descriptor stays readable then.
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in &events[..count] {
            match u32::try_from(event.data()) {
                Ok(port) => {
                    if let Some(connection) = self.connections.get_mut(&port) {
                        let verdict = connection.on_host(event.event_set());
                        self.settle(port, verdict);
                    }
                }
                Err(_) => self.waiting |= event.data() == LISTENER,
            }
        }
    }

    /// Lets in host programs that wait, as far as there is room. Without a driver they are turned away: nobody would answer.
    pub(super) fn accept(&mut self, driver: Driver) {
        for _ in 0..TURN {
            if !self.waiting || self.connections.len() == CONNECTIONS_MAX {
                return;
            }
            match self.listener.accept() {
                Ok((socket, _)) if driver == Driver::Ready => {
                    let port = self.free_port();
                    self.connections.insert(port, Connection::new(socket, port));
                    self.settle(port, Verdict::Keep);
                }
                Ok(_) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => {
                    // Whatever else the host lacks, such as descriptors, may come back with the end of a connection.
                    self.waiting = error.kind() != ErrorKind::WouldBlock;
                    return;
                }
            }
        }
        self.come_again();
    }

    fn free_port(&mut self) -> u32 {
        // Ends soon: there are fewer connections than ports.
        loop {
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
            // VMADDR_PORT_ANY
            if self.next_port != u32::MAX && !self.connections.contains_key(&self.next_port) {
                return self.next_port;
            }
        }
    }

    /// Handles one packet of the guest.
    pub(super) fn on_guest(&mut self, packet: &Buffer<'_>) -> Result<(), DeviceError> {
        let header = packet.header();
        if header.len as usize > packet.room() {
            return Err(DeviceError::Driver("a vsock packet without the data that it announces"));
        }
        // Nobody is there to answer for another context.
        if header.src_cid != self.cid {
            return Ok(());
        }
        let port = header.dst_port;
        let connection = if (header.dst_cid, header.kind) == (CID_HOST, TYPE_STREAM) {
            self.connections.get_mut(&port).filter(|connection| connection.is_known_to_guest(header.src_port))
        } else {
            None
        };
        match connection {
            Some(connection) => {
                let verdict = connection.on_guest(&header, packet);
                self.settle(port, verdict);
            }
            None if header.op == op::RST => {}
            None => self.reset(header.reset()),
        }
        Ok(())
    }

    /// What the guest should be told next, if anything.
    pub(super) fn first(&mut self) -> Option<Work> {
        if let Some(reset) = self.resets.front() {
            return Some(Work::Reset(*reset));
        }
        while let Some(&port) = self.ready.front() {
            if let Some(next) = self.connections.get(&port).and_then(Connection::next) {
                return Some(Work::Connection(port, next));
            }
            self.unlist_first();
        }
        None
    }

    /// How many connections have something for the guest.
    #[cfg(test)]
    pub(super) fn listed(&self) -> usize {
        self.ready.len()
    }

    /// The RST that was [`first`](Self::first) is in the guest's hands.
    pub(super) fn reset_sent(&mut self) {
        self.resets.pop_front();
    }

    /// The connection that was [`first`](Self::first). It must be [settled](Self::turn_over) afterwards.
    pub(super) fn connection(&mut self, port: u32) -> Option<&mut Connection> {
        self.connections.get_mut(&port)
    }

    /// The turn of the connection that was [`first`](Self::first) is over.
    pub(super) fn turn_over(&mut self, port: u32, verdict: Verdict) {
        self.unlist_first();
        self.settle(port, verdict);
    }

    fn unlist_first(&mut self) {
        let port = self.ready.pop_front();
        if let Some(connection) = port.and_then(|port| self.connections.get_mut(&port)) {
            connection.listed = false;
        }
    }

    /// The guest has forgotten all connections.
    pub(super) fn abandon(&mut self) {
        self.resets.clear();
        let ports: Vec<u32> = self.connections.keys().copied().collect();
        for port in ports {
            if let Some(connection) = self.connections.get_mut(&port) {
                let verdict = connection.abandon();
                self.settle(port, verdict);
            }
        }
    }

    /// Does what follows from an event of a connection.
    fn settle(&mut self, port: u32, verdict: Verdict) {
        let Some(connection) = self.connections.get_mut(&port) else { return };
        let mut verdict = verdict;
        if verdict == Verdict::Keep && connection.watched != connection.interest() {
            let operation =
                if connection.watched.is_empty() { ControlOperation::Add } else { ControlOperation::Modify };
            connection.watched = connection.interest();
            let event = EpollEvent::new(connection.watched, port.into());
            if self.epoll.ctl(operation, connection.socket().as_raw_fd(), event).is_err() {
                // The host is out of memory, or the user out of watches: without events the connection would hang.
                verdict = Verdict::Reset;
            }
        }
        match verdict {
            Verdict::Keep => {
                if !connection.listed && connection.next().is_some() {
                    connection.listed = true;
                    self.ready.push_back(port);
                }
            }
            Verdict::Remove => self.remove(port),
            Verdict::Reset => {
                let reset = connection.header(self.cid, op::RST, 0, 0);
                let known = connection.guest_knows();
                self.remove(port);
                if known {
                    self.reset(reset);
                }
            }
        }
    }

    fn remove(&mut self, port: u32) {
        if self.connections.remove(&port).is_some_and(|connection| connection.listed) {
            self.ready.retain(|&listed| listed != port);
        }
    }

    fn reset(&mut self, reset: Header) {
        // A guest that has sent many packets to a connection that is gone needs one answer.
        if self.resets.len() < RESETS_MAX && self.resets.back() != Some(&reset) {
            self.resets.push_back(reset);
        }
    }
}

#[allow(clippy::cast_possible_truncation)] // any 31 bits will do
fn random_port() -> u32 {
    FIRST_PORT | RandomState::new().hash_one(()) as u32
}

/// Whether the guest can be told anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Driver {
    /// Its driver has set up the queues.
    Ready,
    /// There is none, or it has failed.
    Absent,
}
