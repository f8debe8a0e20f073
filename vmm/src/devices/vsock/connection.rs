//! One connection: a host program's socket, and its counterpart in the guest.
//!
//! Nothing here waits or is timed. What the guest must be told is not queued but follows from the state ([`Connection::next`]), so a
//! guest that takes no packets costs nothing.
//!
//! An end is passed on as what it is:
//!
//! | who | does | the other side gets |
//! |---|---|---|
//! | host program | `shutdown(SHUT_WR)` | SHUTDOWN(SEND), behind all data |
//! | host program | `shutdown(SHUT_RD)` | SHUTDOWN(RECEIVE), with the next data that it would have read |
//! | host program | `close` | SHUTDOWN(both), behind all data |
//! | guest | SHUTDOWN(SEND) | end of file, behind all data |
//! | guest | SHUTDOWN(RECEIVE) | a broken pipe, which is why the guest gets SHUTDOWN(SEND) |
//! | guest | SHUTDOWN(both) | both; and the guest an RST once all data has been passed on |
//! | guest | RST | end of file, behind all data, and a broken pipe |

use std::io::ErrorKind;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{MsgFlags, recv, send};
use vm_memory::VolatileSlice;
use vmm_sys_util::epoll::EventSet;

use super::backlog::Backlog;
use super::buffer::{self, Buffer};
use super::credit::Credit;
use super::handshake::{self, Handshake};
use super::packet::{CID_HOST, Header, TYPE_STREAM, op, shutdown};

/// Most buffers that one system call fills.
const BATCH_MAX: usize = 16;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The host program has not said all of its `CONNECT`.
    Handshake,
    /// The guest has still to be asked.
    Asking,
    /// The guest has been asked.
    Asked,
    /// The guest has accepted.
    Open,
    /// The guest knows it no longer; the host program has still to take what the guest sent.
    Draining,
}

/// What becomes of a connection after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It goes on.
    Keep,
    /// It is over, and the guest knows or never knew it.
    Remove,
    /// It is over, and the guest must get an RST.
    Reset,
}

/// What a connection has for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A packet without data.
    Control {
        /// Which one.
        op: u16,
        /// Its flags.
        flags: u32,
    },
    /// Data, if the socket really has some.
    Data {
        /// Buffers to offer.
        buffers: usize,
        /// Bytes that the guest has room for.
        credit: u32,
    },
}

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    socket: UnixStream,
    local_port: u32,
    guest_port: u32,
    state: State,
    credit: Credit,
    backlog: Backlog,
    /// The events that the device waits for.
    pub(super) watched: EventSet,
    /// The socket may have data. Events come only when data arrives, so this stays until the socket has said that it has none.
    readable: bool,
    /// Both directions of the socket have ended; only what it holds can still be read.
    hung_up: bool,
    /// It is in the list of those that have something for the guest.
    pub(super) listed: bool,
    /// Buffers to offer to the next read: more as long as they are all filled, so that a short message costs little and a long one few
    /// system calls.
    batch: usize,
    /// What the host program has ended, as [`shutdown`] flags.
    host_ended: u32,
    /// What of that the guest has been told.
    host_told: u32,
    /// What the guest has ended.
    guest_ended: u32,
    /// What of that has been passed on to the socket.
    guest_told: u32,
}

impl Connection {
    /// A connection that a host program has just opened.
    pub(super) fn new(socket: UnixStream, local_port: u32) -> Self {
        Self {
            socket,
            local_port,
            guest_port: 0,
            state: State::Handshake,
            credit: Credit::default(),
            backlog: Backlog::default(),
            watched: EventSet::empty(),
            readable: false,
            hung_up: false,
            listed: false,
            batch: 1,
            host_ended: 0,
            host_told: 0,
            guest_ended: 0,
            guest_told: 0,
        }
    }

    /// The host program's socket.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// The events to wait for. Edges, so that a socket whose data the guest has no room for does not wake the device all the time.
    pub(super) fn interest(&self) -> EventSet {
        let interest = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if self.backlog.is_empty() { interest } else { interest | EventSet::OUT }
    }

    /// True when a packet of the guest from this port belongs to this connection.
    pub(super) fn is_known_to_guest(&self, guest_port: u32) -> bool {
        self.guest_knows() && self.guest_port == guest_port
    }

    /// True when the guest may have a socket for this connection.
    pub(super) fn guest_knows(&self) -> bool {
        matches!(self.state, State::Asked | State::Open)
    }

    /// The header of a packet to the guest with this context id, with the account of flow control.
    pub(super) fn header(&mut self, cid: u64, op: u16, flags: u32, len: u32) -> Header {
        let mut header = Header { op, flags, len, kind: TYPE_STREAM, ..Header::default() };
        (header.src_cid, header.src_port) = (CID_HOST, self.local_port);
        (header.dst_cid, header.dst_port) = (cid, self.guest_port);
        self.credit.stamp(&mut header);
        header
    }

    /// What there is to tell the guest next.
    pub(super) fn next(&self) -> Option<Next> {
        let control = |op, flags| Some(Next::Control { op, flags });
        match self.state {
            State::Asking => control(op::REQUEST, 0),
            State::Open if self.guest_ended != shutdown::BOTH => {
                let readable = self.readable && self.host_ended & shutdown::SEND == 0;
                let credit = self.credit.available();
                if self.host_ended & !self.host_told != 0 {
                    control(op::SHUTDOWN, self.host_ended)
                } else if self.credit.update_due() {
                    control(op::CREDIT_UPDATE, 0)
                } else if readable && credit > 0 {
                    Some(Next::Data { buffers: self.batch, credit })
                } else if readable && self.credit.request_due() {
                    control(op::CREDIT_REQUEST, 0)
                } else {
                    None
                }
            }
            State::Handshake | State::Asked | State::Open | State::Draining => None,
        }
    }

    /// The packet that [`next`](Self::next) asked for is in the guest's hands.
    pub(super) fn told(&mut self, op: u16, flags: u32) -> Verdict {
        match op {
            op::REQUEST => self.state = State::Asked,
            op::CREDIT_REQUEST => self.credit.requested(),
            op::SHUTDOWN => self.host_told |= flags,
            _ => {}
        }
        // The guest answers with an RST when its program is done, maybe much later. Local ports do not come back soon, so nothing is
        // gained by remembering the connection until then.
        if self.host_told == shutdown::BOTH { Verdict::Remove } else { Verdict::Keep }
    }

    /// Reads from the socket into guest memory. Returns how many bytes; when there are none, [`next`](Self::next) knows what follows.
    pub(super) fn receive<'m>(
        &mut self,
        parts: impl Iterator<Item = VolatileSlice<'m>>,
        offered: usize,
    ) -> usize {
        match buffer::receive(&self.socket, parts) {
            Ok(0) => self.host_sends_no_more(),
            Ok(count) => {
                self.credit.sent(u32::try_from(count).expect("no more than the credit"));
                self.batch = if count == offered { (self.batch * 2).min(BATCH_MAX) } else { 1 };
                return count;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // The other end was closed with our data unread in it, and what it sent has been read.
            Err(_) => {
                self.hung_up = true;
                self.host_sends_no_more();
            }
        }
        0
    }

    fn host_sends_no_more(&mut self) {
        self.host_ended |= shutdown::SEND;
        if self.hung_up {
            self.host_reads_no_more();
        }
    }

    fn host_reads_no_more(&mut self) {
        self.host_ended |= shutdown::RECEIVE;
        self.credit.forwarded(self.backlog.clear());
    }

    /// Something happened to the socket.
    pub(super) fn on_host(&mut self, events: EventSet) -> Verdict {
        let hung_up = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        match self.state {
            State::Handshake => match handshake::read(&self.socket) {
                _ if hung_up => return Verdict::Remove,
                Handshake::Connect { port, more } => {
                    self.guest_port = port;
                    self.state = State::Asking;
                    // What came together with the line causes no event of its own.
                    self.readable = more || events.contains(EventSet::READ_HANG_UP);
                }
                Handshake::Incomplete if !events.contains(EventSet::READ_HANG_UP) => {}
                Handshake::Incomplete | Handshake::Failed => return Verdict::Remove,
            },
            // It gave up before it was connected. Should the guest accept, it is told that nobody is there.
            State::Asking | State::Asked if hung_up => return Verdict::Remove,
            State::Asking | State::Asked | State::Open | State::Draining => {
                // An end shows as something to read too.
                self.readable |= events.contains(EventSet::IN);
                self.hung_up |= hung_up;
                if self.hung_up && self.host_ended & shutdown::SEND != 0 {
                    self.host_reads_no_more();
                }
                if hung_up || events.contains(EventSet::OUT) {
                    self.flush();
                }
            }
        }
        self.pass_on_ends()
    }

    /// The guest sent a packet of this connection.
    pub(super) fn on_guest(&mut self, header: &Header, packet: &Buffer<'_>) -> Verdict {
        self.credit.peer(header);
        match (self.state, header.op) {
            // After an orderly end that took the guest too long to wait for, what it sent before still counts.
            (State::Asked | State::Open, op::RST) => return self.abandon(),
            (State::Asked, op::RESPONSE) => {
                self.state = State::Open;
                let line = format!("OK {}\n", self.local_port);
                // Nothing was written before, so the socket has room; if not, nobody is there.
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                if send(self.socket.as_raw_fd(), line.as_bytes(), flags) != Ok(line.len()) {
                    return Verdict::Reset;
                }
            }
            (State::Open, op::RW) => {
                if self.guest_ended & shutdown::SEND != 0 || !self.credit.received(header.len) {
                    return Verdict::Reset;
                }
                self.forward(packet, header.len as usize);
            }
            (State::Open, op::SHUTDOWN) => self.guest_ended |= header.flags & shutdown::BOTH,
            (State::Open, op::CREDIT_UPDATE) => {}
            (State::Open, op::CREDIT_REQUEST) => self.credit.asked(),
            _ => return Verdict::Reset,
        }
        self.pass_on_ends()
    }

    /// The guest knows nothing of this connection any more. What it sent before is still passed on.
    pub(super) fn abandon(&mut self) -> Verdict {
        match self.state {
            State::Handshake | State::Asking | State::Asked => Verdict::Remove,
            State::Open | State::Draining => {
                self.state = State::Draining;
                self.guest_ended = shutdown::BOTH;
                self.pass_on_ends()
            }
        }
    }

    fn forward(&mut self, packet: &Buffer<'_>, length: usize) {
        if self.host_ended & shutdown::RECEIVE != 0 {
            self.credit.forwarded(length);
            return;
        }
        let mut taken = 0;
        if self.backlog.is_empty() && length > 0 {
            match buffer::send(&self.socket, packet.data(0, length)) {
                Ok(count) => taken = count,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(_) => {
                    self.host_reads_no_more();
                    taken = length;
                }
            }
            self.credit.forwarded(taken);
        }
        self.backlog.push(packet.data(taken, length - taken));
    }

    /// Gives the socket what waits for it.
    fn flush(&mut self) {
        let waiting = self.backlog.len();
        let result = self.backlog.send(&self.socket);
        self.credit.forwarded(waiting - self.backlog.len());
        if result.is_err() {
            self.host_reads_no_more();
        }
    }

    /// Gives the socket what the guest has ended, as soon as all data before it is there.
    fn pass_on_ends(&mut self) -> Verdict {
        let ended = self.guest_ended & !self.guest_told;
        if ended & shutdown::RECEIVE != 0 {
            self.pass_on(shutdown::RECEIVE, Shutdown::Read);
            self.discard_input();
            self.host_ended |= shutdown::SEND;
        }
        if !self.backlog.is_empty() {
            return Verdict::Keep;
        }
        if ended & shutdown::SEND != 0 {
            self.pass_on(shutdown::SEND, Shutdown::Write);
        }
        match (self.state, self.guest_ended) {
            (State::Draining, _) => Verdict::Remove,
            (_, shutdown::BOTH) => Verdict::Reset,
            _ => Verdict::Keep,
        }
    }

    /// Takes out of the socket what the guest will not read. If it were left there, the host program would find an error instead of
    /// the end behind the guest's data.
    fn discard_input(&mut self) {
        let mut discarded = vec![0; 64 << 10];
        // Ends: nothing can be added any more, and the socket's own bound holds for what it has.
        while recv(self.socket.as_raw_fd(), &mut discarded, MsgFlags::MSG_DONTWAIT)
            .is_ok_and(|count| count > 0)
        {}
    }

    fn pass_on(&mut self, what: u32, how: Shutdown) {
        // It fails only when the other end has gone, which is an event of its own.
        let _ = self.socket.shutdown(how);
        self.guest_told |= what;
    }
}
