//! Bytes in both directions, and flow control.

use super::super::credit::BUF_ALLOC;
use super::*;

#[test]
fn a_long_input_arrives_byte_for_byte() {
    for buf_alloc in [1, 7, 4052, 10_000, 262_144] {
        for rx_size in [45, 1000, 4096, 16_000] {
            let mut guest = Guest::empty();
            guest.rx_size = rx_size;
            guest.give_all();
            let (mut host, mut socket) = guest.connect(buf_alloc);
            host.set_nonblocking(true).unwrap();
            let length = (buf_alloc as usize * 50).min(rx_size as usize * 500).min(1_000_000);
            let data = pattern(length);
            let (mut written, mut received) = (0, Vec::<u8>::new());
            while received.len() < length {
                written += host.write(&data[written..]).unwrap_or(0);
                let packets = guest.packets();
                assert!(!packets.is_empty(), "stuck at {} of {written}", received.len());
                for packet in packets.iter().filter(|packet| packet.header.op == op::RW) {
                    received.extend(&packet.data);
                    socket.consumed = socket.consumed.wrapping_add(packet.header.len);
                    guest.send(socket.header(op::CREDIT_UPDATE), &[]);
                }
            }
            assert!(received == data, "buf_alloc {buf_alloc}, rx_size {rx_size}");
        }
    }
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let mut guest = Guest::new();
    let (mut host, mut socket) = guest.connect(10_000);
    let data = pattern(25_000);
    host.write_all(&data).unwrap();
    let packets = guest.packets();
    let ops: Vec<u16> = packets.iter().map(|packet| packet.header.op).collect();
    assert_eq!(ops, [op::RW, op::RW, op::RW, op::CREDIT_REQUEST]);
    let mut received: Vec<u8> = packets.into_iter().flat_map(|packet| packet.data).collect();
    assert_eq!(received.len(), 10_000);

    guest.send(socket.header(op::CREDIT_UPDATE), &[]);
    assert_eq!(guest.packets(), [], "there is still no room, and it has been asked");
    socket.consumed = 10_000;
    guest.send(socket.header(op::CREDIT_UPDATE), &[]);
    let packets = guest.packets();
    assert_eq!(packets.last().unwrap().header.op, op::CREDIT_REQUEST, "once each time");
    received.extend(packets.into_iter().flat_map(|packet| packet.data));
    assert_eq!(received.len(), 20_000);
    socket.consumed = 20_000;
    guest.send(socket.header(op::CREDIT_UPDATE), &[]);
    received.extend(guest.packets().into_iter().flat_map(|packet| packet.data));
    assert_eq!(received, data);
}

#[test]
fn a_socket_with_data_but_no_room_in_the_guest_does_not_wake_the_device() {
    let mut guest = Guest::new();
    let (mut host, _socket) = guest.connect(0);
    host.write_all(b"data").unwrap();
    assert_eq!(guest.packet().header.op, op::CREDIT_REQUEST);
    assert!(!guest.host_ready());

    let mut guest = Guest::empty();
    guest.give(0);
    guest.refill = false;
    let mut host = guest.dial();
    writeln!(host, "CONNECT {PORT}").unwrap();
    let request = guest.packet().header;
    let socket = Socket { local_port: request.src_port, buf_alloc: 100, ..Socket::default() };
    guest.send(socket.header(op::RESPONSE), &[]);
    host.write_all(b"data").unwrap();
    assert_eq!(guest.packets(), []);
    assert!(!guest.host_ready());
    guest.give(0);
    assert_eq!(guest.packet().data, b"data");
}

#[test]
fn a_long_output_through_a_slow_reader_arrives_byte_for_byte() {
    let mut guest = Guest::new();
    let (mut host, mut socket) = guest.connect(1000);
    let total = 8 << 20;
    let data = pattern(total);
    let (mut sent, mut received) = (0, Vec::new());
    let mut part = vec![0; 100_000];
    while received.len() < total {
        guest.packets().iter().for_each(|packet| socket.hear(&packet.header));
        let length = socket.room().min(65_536).min(total - sent);
        if length > 0 {
            socket.send(&mut guest, &data[sent..sent + length]);
            sent += length;
        } else {
            let waiting = sent - received.len();
            assert!(sent == total || waiting >= BUF_ALLOC as usize, "the reader is slow, not the device");
            let count = host.read(&mut part).unwrap();
            received.extend_from_slice(&part[..count]);
        }
    }
    assert!(received == data);
}

#[test]
fn a_guest_whose_reader_is_stuck_gets_no_new_room() {
    let mut guest = Guest::new();
    let (_host, mut socket) = guest.connect(1000);
    let mut total = 0;
    while socket.room() > 0 {
        let data = pattern(socket.room());
        total += data.len();
        socket.send(&mut guest, &data);
        guest.packets().iter().for_each(|packet| socket.hear(&packet.header));
    }
    assert!(total < 1 << 20, "{total} bytes were taken");
    guest.send(socket.header(op::CREDIT_REQUEST), &[]);
    let answer = guest.packet().header;
    assert_eq!(answer.op, op::CREDIT_UPDATE);
    assert_eq!(answer.buf_alloc, BUF_ALLOC);
    socket.hear(&answer);
    let kept = socket.sent - socket.peer_forwarded;
    assert!(kept > 0 && kept <= BUF_ALLOC, "{kept}");
}

#[test]
fn output_flows_without_credit_updates_for_every_packet() {
    let mut guest = Guest::new();
    let (mut host, mut socket) = guest.connect(1000);
    let mut updates = 0;
    for _ in 0..1000 {
        socket.send(&mut guest, &pattern(1000));
        for packet in guest.packets() {
            assert_eq!(packet.header.op, op::CREDIT_UPDATE);
            socket.hear(&packet.header);
            updates += 1;
        }
        host.read_exact(&mut [0; 1000]).unwrap();
    }
    assert_eq!(updates, 1_000_000 / (BUF_ALLOC / 2));
}

#[test]
fn packets_may_be_cut_into_descriptors_anywhere() {
    let mut guest = Guest::new();
    let (mut host, socket) = guest.connect(1000);
    let data = pattern(200);
    let bytes = [&Header { len: 200, ..socket.header(op::RW) }.to_bytes()[..], &data].concat();
    for cuts in
        [&[244][..], &[44, 200], &[1, 43, 100, 100], &[20, 20, 20, 184], &[0, 44, 0, 200, 0], &[243, 1]]
    {
        guest.send_cut(&bytes, cuts).unwrap();
        let mut received = [0; 200];
        host.read_exact(&mut received).unwrap();
        assert_eq!(&received[..], data, "{cuts:?}");
    }
}

#[test]
fn more_data_than_one_turn_holds_flows_on_by_itself() {
    let mut guest = Guest::empty();
    guest.rx_size = 100;
    guest.give_all();
    let (mut host, _) = guest.connect(u32::MAX);
    let data = pattern(60_000);
    host.write_all(&data).unwrap();
    let mut received = Vec::new();
    while received.len() < data.len() {
        let packets = guest.packets();
        assert!(!packets.is_empty(), "stuck at {}", received.len());
        for packet in packets {
            received.extend(packet.data);
        }
    }
    assert!(received == data);
}

#[test]
fn connections_take_turns() {
    let mut guest = Guest::empty();
    guest.refill = false;
    guest.give(0);
    let mut connect = || {
        let host = guest.connect(1 << 20);
        guest.give(0);
        host
    };
    let (mut first, one) = connect();
    let (mut second, two) = connect();
    first.write_all(&pattern(100_000)).unwrap();
    second.write_all(&pattern(100_000)).unwrap();
    let mut counts = [0; 2];
    for _ in 0..10 {
        for packet in guest.packets() {
            counts[usize::from(packet.header.src_port == two.local_port)] += 1;
        }
        guest.give(0);
    }
    assert_ne!(one.local_port, two.local_port);
    assert_eq!(counts, [5, 5]);
}
