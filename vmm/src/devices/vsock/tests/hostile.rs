//! A guest that breaks the rules.

use super::super::credit::BUF_ALLOC;
use super::super::packet::shutdown::SEND;
use super::super::table::RESETS_MAX;
use super::*;

/// The only packet is an RST, and the host program reads the end.
fn assert_reset(guest: &mut Guest, host: &UnixStream, what: &str) {
    assert_eq!(guest.packet().header.op, op::RST, "{what}");
    assert!(at_end(host), "{what}");
}

#[test]
fn a_guest_that_exceeds_its_credit_is_reset() {
    let mut guest = Guest::new();
    let (host, mut socket) = guest.connect(1000);
    while socket.room() > 0 {
        let data = pattern(socket.room());
        socket.send(&mut guest, &data);
        guest.packets().iter().for_each(|packet| socket.hear(&packet.header));
    }
    guest.send(Header { len: 1, ..socket.header(op::RW) }, b"x");
    assert_eq!(guest.packet().header.op, op::RST);
    drop(host);

    let (host, socket) = guest.connect(1000);
    let len = BUF_ALLOC + 1;
    let data = vec![0; len as usize];
    guest.memory.write_slice(&data, GuestAddress(TX_BUFFERS + TX_STRIDE)).unwrap();
    let bytes = Header { len, ..socket.header(op::RW) }.to_bytes();
    guest.memory.write_slice(&bytes, GuestAddress(TX_BUFFERS)).unwrap();
    let parts = [(TX_BUFFERS, 44), (TX_BUFFERS + TX_STRIDE, len)];
    assert!(guest.rings[TX].add(&guest.memory, 0, &parts, 0));
    guest.process(TX).unwrap();
    assert_reset(&mut guest, &host, "one packet above the whole credit");
}

#[test]
fn what_makes_no_sense_on_an_open_connection_is_reset() {
    for what in [op::REQUEST, op::RESPONSE, 0, 8, 0xffff] {
        let mut guest = Guest::new();
        let (host, socket) = guest.connect(1000);
        guest.send(socket.header(what), &[]);
        assert_reset(&mut guest, &host, &format!("op {what}"));
        guest.send(socket.header(op::CREDIT_UPDATE), &[]);
        assert_eq!(guest.packet().header.op, op::RST, "it is unknown now");
    }
    let mut guest = Guest::new();
    let (host, mut socket) = guest.connect(1000);
    guest.send(socket.shutdown(SEND), &[]);
    socket.send(&mut guest, b"data after the end");
    assert_reset(&mut guest, &host, "data after the end");
}

#[test]
fn data_before_the_connection_is_open_is_reset() {
    let mut guest = Guest::new();
    let mut host = guest.dial();
    writeln!(host, "CONNECT {PORT}").unwrap();
    let mut socket =
        Socket { local_port: guest.packet().header.src_port, peer_alloc: 1, ..Socket::default() };
    socket.send(&mut guest, b"x");
    assert_reset(&mut guest, &host, "data before RESPONSE");
}

#[test]
fn packets_of_no_connection_are_reset_and_resets_are_not() {
    let mut guest = Guest::new();
    let (host, socket) = guest.connect(1000);
    let good = socket.header(op::CREDIT_REQUEST);
    for strange in [
        Header { src_port: PORT + 1, ..good },
        Header { dst_port: good.dst_port ^ 1, ..good },
        Header { dst_port: 0, ..good },
        Header { dst_cid: 0, ..good },
        Header { dst_cid: 1, ..good },
        Header { dst_cid: CID, ..good },
        Header { dst_cid: u64::MAX, ..good },
        Header { kind: 0, ..good },
        Header { kind: 2, ..good },
        Header { op: op::REQUEST, dst_port: 5, ..good },
        Header { op: 99, dst_port: 5, ..good },
    ] {
        guest.send(strange, &[]);
        assert_eq!(guest.packet().header, strange.reset());
        guest.send(Header { op: op::RST, ..strange }, &[]);
        assert_eq!(guest.packets(), []);
    }
    guest.send(Header { src_cid: 4, ..good }, &[]);
    assert_eq!(guest.packets(), [], "there is no such guest");

    guest.send(good, &[]);
    assert_eq!(guest.packet().header.op, op::CREDIT_UPDATE, "the connection has not suffered");
    drop(host);
}

#[test]
fn counters_with_any_values_do_no_harm() {
    for (buf_alloc, fwd_cnt) in [(0, 0), (u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX), (1, 1 << 31)] {
        let mut guest = Guest::new();
        let (mut host, socket) = guest.connect(1000);
        host.write_all(&pattern(5000)).unwrap();
        guest.settle().unwrap();
        guest.send(Header { buf_alloc, fwd_cnt, ..socket.header(op::CREDIT_UPDATE) }, &[]);
        let received: usize = guest.packets().iter().map(|packet| packet.data.len()).sum();
        assert!(received == 1000 || received == 5000, "{received}");
    }
}

#[test]
fn resets_that_the_guest_does_not_take_are_bounded() {
    let mut guest = Guest::empty();
    guest.refill = false;
    let socket = Socket::default();
    for src_port in 0..5000 {
        guest.send(Header { src_port, ..socket.header(op::CREDIT_UPDATE) }, &[]);
    }
    let mut resets = 0;
    guest.refill = true;
    guest.give_all();
    loop {
        match guest.packets().len() {
            0 => break,
            count => resets += count,
        }
    }
    assert_eq!(resets, RESETS_MAX);

    let mut guest = Guest::empty();
    for _ in 0..5000 {
        guest.send(socket.header(op::CREDIT_UPDATE), &[]);
    }
    guest.give_all();
    assert_eq!(guest.packets().len(), 1, "one answer is enough");
}

#[test]
fn host_programs_that_come_and_go_cost_nothing_while_the_guest_takes_no_packets() {
    let mut guest = Guest::empty();
    guest.settle().unwrap();
    let mut stays = guest.dial();
    writeln!(stays, "CONNECT {PORT}").unwrap();
    for _ in 0..2000 {
        let mut host = guest.dial();
        writeln!(host, "CONNECT {PORT}").unwrap();
        guest.settle().unwrap();
        drop(host);
        guest.settle().unwrap();
    }
    assert_eq!(guest.device.table.listed(), 1);
}

#[test]
fn chains_that_hold_no_packet_stop_the_device() {
    let whole = Header { len: 10, ..Socket::default().header(op::RW) }.to_bytes();
    let many = [(TX_BUFFERS, 0); 256];
    let chains: [(&str, &[Part], u32); 9] = [
        ("no header", &[(TX_BUFFERS, 43)], 0),
        ("no data", &[(TX_BUFFERS, 44)], 0),
        ("less data than announced", &[(TX_BUFFERS, 44), (TX_BUFFERS + 44, 9)], 0),
        ("writable", &[(TX_BUFFERS, 54)], VRING_DESC_F_WRITE),
        ("outside memory", &[(MEMORY_END, 54)], 0),
        ("across the end of memory", &[(MEMORY_END - 50, 54)], 0),
        ("at the end of all addresses", &[(u64::MAX - 10, 54)], 0),
        ("longer than an address can be", &[(TX_BUFFERS, 44), (TX_BUFFERS, u32::MAX)], 0),
        ("nothing, many times", &many, 0),
    ];
    for (what, parts, flags) in chains {
        let mut guest = Guest::new();
        let (host, _) = guest.connect(1000);
        guest.memory.write_slice(&whole, GuestAddress(TX_BUFFERS)).unwrap();
        guest.rings[TX].add(&guest.memory, 0, parts, flags);
        assert!(guest.process(TX).is_err(), "{what}");
        assert!(at_end(&host), "host programs must not wait for a device that has stopped: {what}");
    }
}

#[test]
fn buffers_that_hold_no_packet_stop_the_device() {
    for (what, part, flags) in [
        ("no room for data", (RX_BUFFERS, 44), VRING_DESC_F_WRITE),
        ("not writable", (RX_BUFFERS, 4096), 0),
        ("outside memory", (MEMORY_END, 4096), VRING_DESC_F_WRITE),
    ] {
        let mut guest = Guest::empty();
        guest.rings[RX].add(&guest.memory, 0, &[part], flags);
        let mut host = guest.dial();
        writeln!(host, "CONNECT {PORT}").unwrap();
        assert!(guest.settle().is_err(), "{what}");
        assert!(at_end(&host), "{what}");
    }
    for (what, part, flags) in [
        ("too short", (RX_BUFFERS, 3), VRING_DESC_F_WRITE),
        ("not writable", (RX_BUFFERS, 4), 0),
        ("outside memory", (MEMORY_END, 4), VRING_DESC_F_WRITE),
    ] {
        let mut guest = Guest::empty();
        guest.rings[EVENT].add(&guest.memory, 0, &[part], flags);
        assert!(guest.work(VirtioDevice::resumed).is_err(), "{what}");
    }
}

#[test]
fn an_indirect_table_of_65535_descriptors_is_refused() {
    let mut guest = Guest::new();
    let table = TX_BUFFERS + TX_STRIDE;
    for number in 0..65_535u64 {
        let at = GuestAddress(table + 16 * number);
        guest.memory.write_obj(TX_BUFFERS, at).unwrap();
        // One byte each, and always a next one.
        guest.memory.write_obj(1 | 1 << 32 | ((number + 1) & 0xffff) << 48, GuestAddress(at.0 + 8)).unwrap();
    }
    let indirect = virtio_bindings::virtio_ring::VRING_DESC_F_INDIRECT;
    guest.rings[TX].add(&guest.memory, 0, &[(table, 16 * 65_535)], indirect);
    assert!(guest.process(TX).is_err());
}

#[test]
fn rings_without_queues_are_left_alone() {
    let mut guest = Guest::new();
    guest.queues[RX].set_ready(false);
    guest.send(Socket::default().header(op::CREDIT_UPDATE), &[]);
    let host = guest.dial();
    guest.settle().unwrap();
    assert!(at_end(&host), "nobody would answer");
}
