//! How connections end: each end is passed on as what it is, behind all data.

use std::net::Shutdown;

use super::super::packet::shutdown::{BOTH, RECEIVE, SEND};
use super::*;

impl Guest {
    /// The flags of the SHUTDOWN that the guest has got by now, and nothing else.
    fn told_shutdown(&mut self) -> u32 {
        let header = self.packet().header;
        assert_eq!(header.op, op::SHUTDOWN);
        header.flags
    }

    fn told_reset(&mut self) -> bool {
        self.packet().header.op == op::RST
    }
}

#[test]
fn the_end_of_input_leaves_the_output_open() {
    let mut guest = Guest::new();
    let (mut host, mut socket) = guest.connect(1000);
    host.write_all(b"last").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let packets = guest.packets();
    assert_eq!(packets[0].data, b"last");
    assert_eq!((packets[1].header.op, packets[1].header.flags), (op::SHUTDOWN, SEND));
    assert_eq!(packets.len(), 2);

    socket.send(&mut guest, b"answer");
    host.read_exact(&mut [0; 6]).unwrap();
    guest.send(socket.shutdown(BOTH), &[]);
    assert!(at_end(&host));
    assert!(guest.told_reset());
}

#[test]
fn the_end_of_input_waits_for_the_data_before_it() {
    let mut guest = Guest::new();
    let (mut host, mut socket) = guest.connect(3);
    host.write_all(b"abcdef").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let ops: Vec<u16> = guest.packets().iter().map(|packet| packet.header.op).collect();
    assert_eq!(ops, [op::RW, op::CREDIT_REQUEST]);
    socket.consumed = 3;
    guest.send(socket.header(op::CREDIT_UPDATE), &[]);
    let packets = guest.packets();
    assert_eq!(packets[0].data, b"def");
    // The device cannot know that this was all until it may read on.
    socket.consumed = 6;
    guest.send(socket.header(op::CREDIT_UPDATE), &[]);
    let last = guest.packets().pop().unwrap().header;
    assert_eq!((last.op, last.flags), (op::SHUTDOWN, SEND));
}

#[test]
fn the_end_of_output_leaves_the_input_open() {
    let mut guest = Guest::new();
    let (mut host, mut socket) = guest.connect(1000);
    socket.send(&mut guest, b"last");
    guest.send(socket.shutdown(SEND), &[]);
    let mut received = Vec::new();
    host.read_to_end(&mut received).unwrap();
    assert_eq!(received, b"last");
    host.write_all(b"more").unwrap();
    assert_eq!(guest.packet().data, b"more");

    drop(host);
    assert_eq!(guest.told_shutdown(), BOTH);
}

#[test]
fn the_end_of_output_waits_for_a_slow_reader() {
    let mut guest = Guest::new();
    let (mut host, mut socket) = guest.connect(1000);
    let sent = guest.stuff(&mut socket);
    guest.send(socket.shutdown(SEND), &[]);
    host.write_all(b"still open").unwrap();
    assert_eq!(guest.packet().data, b"still open");
    assert!(guest.drain(&host) == sent);
}

#[test]
fn both_ends_in_either_order_end_the_connection() {
    for host_first in [true, false] {
        let mut guest = Guest::new();
        let (host, socket) = guest.connect(1000);
        if host_first {
            host.shutdown(Shutdown::Write).unwrap();
            assert_eq!(guest.told_shutdown(), SEND);
            guest.send(socket.shutdown(SEND), &[]);
        } else {
            guest.send(socket.shutdown(SEND), &[]);
            assert!(at_end(&host));
            host.shutdown(Shutdown::Write).unwrap();
        }
        assert_eq!(guest.told_shutdown(), BOTH);
        assert!(at_end(&host) && is_broken(&host));
        guest.send(socket.header(op::RST), &[]);
        assert_eq!(guest.packets(), []);
    }
}

#[test]
fn a_guest_that_reads_no_more_breaks_the_pipe_of_the_host_program() {
    let mut guest = Guest::new();
    let (mut host, mut socket) = guest.connect(1000);
    guest.send(socket.shutdown(RECEIVE), &[]);
    assert!(is_broken(&host));
    assert_eq!(guest.told_shutdown(), SEND, "nobody can send any more");
    socket.send(&mut guest, b"output");
    host.read_exact(&mut [0; 6]).unwrap();
    assert_eq!(guest.packets(), []);
    guest.send(socket.shutdown(SEND), &[]);
    assert!(at_end(&host));
    assert!(guest.told_reset());
}

#[test]
fn a_host_program_that_reads_no_more_stops_the_guest_but_not_the_input() {
    let mut guest = Guest::new();
    let (mut host, mut socket) = guest.connect(1000);
    host.shutdown(Shutdown::Read).unwrap();
    assert_eq!(guest.packets(), [], "a socket shows that only when it is written to");
    socket.send(&mut guest, b"output");
    assert_eq!(guest.told_shutdown(), RECEIVE);
    socket.send(&mut guest, b"more output");
    host.write_all(b"input").unwrap();
    assert_eq!(guest.packet().data, b"input");
    drop(host);
    assert_eq!(guest.told_shutdown(), BOTH);
}

#[test]
fn a_connection_that_nobody_reads_is_over() {
    for host_first in [true, false] {
        let mut guest = Guest::new();
        let (host, mut socket) = guest.connect(1000);
        if host_first {
            host.shutdown(Shutdown::Read).unwrap();
            socket.send(&mut guest, b"output");
            assert_eq!(guest.told_shutdown(), RECEIVE);
            guest.send(socket.shutdown(RECEIVE), &[]);
        } else {
            guest.send(socket.shutdown(RECEIVE), &[]);
            assert_eq!(guest.told_shutdown(), SEND);
            host.shutdown(Shutdown::Read).unwrap();
        }
        assert_eq!(guest.packets().last().unwrap().header.flags, BOTH);
        guest.send(socket.header(op::CREDIT_UPDATE), &[]);
        assert!(guest.told_reset(), "it is forgotten");
    }
}

#[test]
fn a_host_program_that_hangs_up_ends_both_behind_its_data() {
    let mut guest = Guest::new();
    let (mut host, mut socket) = guest.connect(4);
    host.write_all(b"last words").unwrap();
    drop(host);
    let mut received = Vec::new();
    loop {
        for packet in guest.packets() {
            socket.hear(&packet.header);
            received.extend(packet.data);
            if packet.header.op == op::SHUTDOWN {
                assert_eq!(packet.header.flags, BOTH);
                assert_eq!(received, b"last words");
                assert!(!guest.host_ready());
                guest.send(socket.header(op::CREDIT_UPDATE), &[]);
                assert!(guest.told_reset(), "the connection is forgotten");
                return;
            }
        }
        socket.consumed = u32::try_from(received.len()).unwrap();
        guest.send(socket.header(op::CREDIT_UPDATE), &[]);
    }
}

#[test]
fn a_host_program_that_hangs_up_with_output_unread_ends_both() {
    let mut guest = Guest::new();
    let (host, mut socket) = guest.connect(1000);
    guest.stuff(&mut socket);
    drop(host);
    let last = guest.packets().pop().unwrap().header;
    assert_eq!((last.op, last.flags), (op::SHUTDOWN, BOTH));
    assert!(!guest.host_ready());
}

#[test]
fn a_guest_that_closes_loses_nothing() {
    let mut guest = Guest::new();
    let (host, mut socket) = guest.connect(1000);
    let sent = guest.stuff(&mut socket);
    guest.send(socket.shutdown(BOTH), &[]);
    assert_eq!(guest.packets(), [], "not all has been passed on");
    assert!(is_broken(&host));
    assert!(guest.drain(&host) == sent);
    assert!(guest.told_reset());
}

#[test]
fn the_end_of_output_is_no_error_though_input_was_left_over() {
    for end in [op::SHUTDOWN, op::RST] {
        let mut guest = Guest::new();
        let (mut host, mut socket) = guest.connect(0);
        host.write_all(&pattern(150_000)).unwrap();
        guest.packets();
        socket.send(&mut guest, b"output");
        guest.send(Header { flags: BOTH, ..socket.header(end) }, &[]);
        assert_eq!(guest.drain(&host), b"output");
        assert!(is_broken(&host));
    }
}

#[test]
fn a_guest_that_tires_of_waiting_for_the_reader_loses_nothing() {
    let mut guest = Guest::new();
    let (host, mut socket) = guest.connect(1000);
    let sent = guest.stuff(&mut socket);
    guest.send(socket.shutdown(BOTH), &[]);
    guest.send(socket.header(op::RST), &[]);
    guest.send(socket.header(op::CREDIT_UPDATE), &[]);
    assert!(guest.told_reset(), "the guest side is gone");
    assert!(guest.drain(&host) == sent);
    assert_eq!(guest.packets(), []);
}

#[test]
fn a_reader_that_leaves_ends_a_guest_that_has_closed() {
    for reset in [false, true] {
        let mut guest = Guest::new();
        let (host, mut socket) = guest.connect(1000);
        guest.stuff(&mut socket);
        guest.send(socket.shutdown(BOTH), &[]);
        if reset {
            guest.send(socket.header(op::RST), &[]);
        }
        drop(host);
        let ops: Vec<u16> = guest.packets().iter().map(|packet| packet.header.op).collect();
        assert_eq!(ops, if reset { vec![] } else { vec![op::RST] });
    }
}

#[test]
fn an_rst_ends_the_connection() {
    let mut guest = Guest::new();
    let (host, mut socket) = guest.connect(1000);
    socket.send(&mut guest, b"x");
    guest.send(socket.header(op::RST), &[]);
    assert!(is_broken(&host));
    (&host).read_exact(&mut [0]).unwrap();
    assert!(at_end(&host));
    assert_eq!(guest.packets(), []);
}
