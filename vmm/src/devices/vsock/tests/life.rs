//! From the host program's first word to the guest's answer; limits; reset, save and restore.

use super::super::VsockError;
use super::super::table::CONNECTIONS_MAX;
use super::*;
use crate::devices::DeviceState;

#[test]
fn a_host_program_is_connected_when_the_guest_accepts() {
    let mut guest = Guest::new();
    let (_host, socket) = guest.connect(1000);
    let (_other, second) = guest.connect(1000);
    assert_ne!(socket.local_port, second.local_port);
    assert!(guest.interrupted());
}

#[test]
fn the_first_line_may_come_byte_by_byte() {
    let mut guest = Guest::new();
    let mut host = guest.dial();
    for byte in b"CONNECT 77" {
        host.write_all(&[*byte]).unwrap();
        assert_eq!(guest.packets(), []);
    }
    host.write_all(b"\n").unwrap();
    assert_eq!(guest.packet().header.dst_port, 77);
}

/// True when the other end is gone. A socket that closes with something unread reports that as a reset.
fn is_closed(mut host: &UnixStream) -> bool {
    match host.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn a_host_program_that_says_something_else_is_turned_away() {
    let mut guest = Guest::new();
    for line in ["HELLO\n", "CONNECT 1 2\n", "CONNECT 00000000000000000000000000000001\n"] {
        let mut host = guest.dial();
        host.write_all(line.as_bytes()).unwrap();
        assert_eq!(guest.packets(), []);
        assert!(is_closed(&host), "{line}");
    }
    let mut host = guest.dial();
    host.write_all(b"CONNECT 1").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.packets(), []);
    assert!(is_closed(&host));
}

#[test]
fn a_host_program_gets_the_end_when_the_guest_refuses() {
    let mut guest = Guest::new();
    let mut host = guest.dial();
    writeln!(host, "CONNECT {PORT}").unwrap();
    let request = guest.packet().header;
    let socket = Socket { local_port: request.src_port, ..Socket::default() };
    guest.send(socket.header(op::RST), &[]);
    assert!(at_end(&host));
    assert_eq!(guest.packets(), [], "an RST is not answered");
}

#[test]
fn a_host_program_that_gives_up_early_is_forgotten() {
    let mut guest = Guest::new();
    let mut host = guest.dial();
    writeln!(host, "CONNECT {PORT}").unwrap();
    let request = guest.packet().header;
    drop(host);
    assert_eq!(guest.packets(), []);
    let socket = Socket { local_port: request.src_port, ..Socket::default() };
    guest.send(socket.header(op::RESPONSE), &[]);
    assert_eq!(guest.packet().header.op, op::RST);
}

#[test]
fn a_host_program_that_sends_before_it_is_connected_loses_nothing() {
    let mut guest = Guest::new();
    let mut host = guest.dial();
    write!(host, "CONNECT {PORT}\nearly").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    let request = guest.packet().header;
    let socket = Socket { local_port: request.src_port, buf_alloc: 100, ..Socket::default() };
    guest.send(socket.header(op::RESPONSE), &[]);
    let ops: Vec<u16> = guest.packets().iter().map(|packet| packet.header.op).collect();
    assert_eq!(ops, [op::RW, op::SHUTDOWN]);
}

#[test]
fn host_programs_that_come_before_the_driver_are_turned_away() {
    let mut guest = Guest::empty();
    let host = guest.dial();
    assert!(guest.host_ready());
    let queues = std::mem::take(&mut guest.queues);
    guest.settle().unwrap();
    assert!(at_end(&host));
    guest.queues = queues;
    guest.give_all();
    guest.connect(1000);
}

#[test]
fn connections_beyond_the_limit_wait_until_one_ends() {
    let mut guest = Guest::new();
    let mut hosts = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        hosts.push(guest.dial());
        guest.settle().unwrap();
    }
    let mut late = guest.dial();
    writeln!(late, "CONNECT {PORT}").unwrap();
    assert_eq!(guest.packets(), []);
    drop(hosts.pop());
    assert_eq!(guest.packet().header.op, op::REQUEST);
}

#[test]
fn a_crowd_of_silent_host_programs_keeps_nobody_out() {
    let mut guest = Guest::new();
    // More than one turn lets in.
    let _silent: Vec<UnixStream> = (0..100).map(|_| guest.dial()).collect();
    let mut host = guest.dial();
    writeln!(host, "CONNECT {PORT}").unwrap();
    assert_eq!(guest.packet().header.op, op::REQUEST);
}

#[test]
fn the_driver_reads_the_context_id() {
    let guest = Guest::empty();
    assert_eq!(guest.device.config(), CID.to_le_bytes());
    for cid in [0, 1, 2, u64::from(u32::MAX), u64::MAX] {
        let listener = UnixListener::bind(guest.directory.path().join(cid.to_string())).unwrap();
        assert!(matches!(Vsock::new(listener.into(), cid), Err(VsockError::Cid(_))));
    }
}

#[test]
fn a_reset_ends_all_connections_but_loses_nothing_that_was_sent() {
    let mut guest = Guest::new();
    let (reader, mut socket) = guest.connect(1000);
    let sent = guest.stuff(&mut socket);
    let (idle, _) = guest.connect(1000);
    let mut asking = guest.dial();
    writeln!(asking, "CONNECT {PORT}").unwrap();
    guest.packet();

    guest.device.reset();
    assert!(at_end(&idle) && at_end(&asking));
    assert!(is_broken(&reader));
    assert!(guest.drain(&reader) == sent);
    assert_eq!(guest.packets(), []);
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let mut guest = Guest::new();
    guest.connect(1000);
    let state = guest.device.save();
    assert_eq!(state, DeviceState::Vsock { cid: CID });

    let mut restored = Guest::new();
    restored.device.restore(&DeviceState::Vsock { cid: 77 }).unwrap();
    assert_eq!(restored.device.config(), 77u64.to_le_bytes());
    restored.device.restore(&state).unwrap();
    let part = (TX_BUFFERS - 16, 4);
    restored.memory.write_obj(0xffff_ffff_u32, GuestAddress(part.0)).unwrap();
    restored.rings[EVENT].add(&restored.memory, 0, &[part], VRING_DESC_F_WRITE);
    restored.work(VirtioDevice::resumed).unwrap();
    assert_eq!(restored.rings[EVENT].take(&restored.memory), Some((0, 4)));
    assert_eq!(restored.memory.read_obj::<u32>(GuestAddress(part.0)).unwrap(), 0);
    assert!(restored.interrupted());
    restored.connect(1000);
}

#[test]
fn the_event_waits_for_a_buffer_and_is_sent_once() {
    let mut guest = Guest::new();
    guest.work(VirtioDevice::resumed).unwrap();
    for number in 0..2 {
        if guest.rings[EVENT].add(&guest.memory, number, &[(TX_BUFFERS, 4)], VRING_DESC_F_WRITE) {
            guest.process(EVENT).unwrap();
        }
    }
    assert_eq!(guest.rings[EVENT].take(&guest.memory), Some((0, 4)));
    assert_eq!(guest.rings[EVENT].take(&guest.memory), None);
}

#[test]
fn state_of_another_device_or_with_a_reserved_context_id_is_refused() {
    let mut guest = Guest::empty();
    assert!(guest.device.restore(&DeviceState::Rng).is_err());
    for cid in [0, 2, u64::from(u32::MAX), u64::MAX] {
        assert!(guest.device.restore(&DeviceState::Vsock { cid }).is_err());
    }
    assert_eq!(guest.device.save(), DeviceState::Vsock { cid: CID });
}
