//! Random operations of guest and host programs, checked against what must come out.

use std::net::Shutdown;

use proptest::prelude::*;

use super::super::credit::BUF_ALLOC;
use super::super::packet::shutdown::{BOTH, SEND};
use super::*;

#[derive(Clone, Debug)]
enum Op {
    HostWrites(usize),
    HostReads(usize),
    HostEndsInput,
    GuestSends(usize),
    GuestConsumes(u32),
    GuestEndsOutput,
    GuestAsks,
    GuestGivesBuffers(u16),
    DeviceWorks,
}

fn op() -> impl Strategy<Value = Op> {
    let size = prop_oneof![1..100usize, 100..150_000usize];
    prop_oneof![
        4 => size.clone().prop_map(Op::HostWrites),
        4 => size.clone().prop_map(Op::HostReads),
        4 => size.prop_map(Op::GuestSends),
        4 => (1..200_000u32).prop_map(Op::GuestConsumes),
        1 => Just(Op::HostEndsInput),
        1 => Just(Op::GuestEndsOutput),
        1 => Just(Op::GuestAsks),
        4 => (1..64u16).prop_map(Op::GuestGivesBuffers),
        4 => Just(Op::DeviceWorks),
    ]
}

/// One connection from both ends, with what each has sent and got.
#[allow(clippy::struct_excessive_bools)] // what each end has done and seen, independent of each other
struct Model {
    guest: Guest,
    host: UnixStream,
    socket: Socket,
    /// Receive buffers that the device does not have.
    spare: Vec<u16>,
    host_wrote: usize,
    host_got: usize,
    host_ended: bool,
    host_sees_end: bool,
    guest_got: u32,
    guest_ended: bool,
    guest_sees_end: bool,
    /// Both directions are over, and the guest knows: the device has nothing to remember.
    forgotten: bool,
}

/// The byte at each place of a stream.
fn byte(at: usize) -> u8 {
    u8::try_from(at % 251).unwrap()
}

fn bytes(at: usize, length: usize) -> Vec<u8> {
    (at..at + length).map(byte).collect()
}

fn continues(at: usize, data: &[u8]) -> bool {
    data.iter().zip(at..).all(|(got, at)| *got == byte(at))
}

impl Model {
    fn new(buf_alloc: u32) -> Self {
        let mut guest = Guest::new();
        let (host, socket) = guest.connect(buf_alloc);
        host.set_nonblocking(true).unwrap();
        guest.refill = false;
        Self {
            guest,
            host,
            socket,
            spare: Vec::new(),
            host_wrote: 0,
            host_got: 0,
            host_ended: false,
            host_sees_end: false,
            guest_got: 0,
            guest_ended: false,
            guest_sees_end: false,
            forgotten: false,
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::HostWrites(length) if !self.host_ended => {
                if let Ok(count) = self.host.write(&bytes(self.host_wrote, length)) {
                    self.host_wrote += count;
                }
            }
            Op::HostReads(length) => {
                let mut part = vec![0; length];
                match self.host.read(&mut part) {
                    Ok(0) => self.host_sees_end = true,
                    Ok(count) => {
                        assert!(continues(self.host_got, &part[..count]));
                        self.host_got += count;
                    }
                    Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
                }
                assert!(
                    !self.host_sees_end || self.host_got == self.socket.sent as usize && self.guest_ended
                );
            }
            Op::HostEndsInput if !self.host_ended => {
                self.host.shutdown(Shutdown::Write).unwrap();
                self.host_ended = true;
            }
            Op::GuestSends(length) if !self.guest_ended && !self.forgotten => {
                let length = length.min(self.socket.room()).min(65_536);
                let data = bytes(self.socket.sent as usize, length);
                self.socket.send(&mut self.guest, &data);
            }
            Op::GuestConsumes(length) if !self.forgotten => {
                self.socket.consumed += length.min(self.guest_got - self.socket.consumed);
                self.guest.send(self.socket.header(op::CREDIT_UPDATE), &[]);
            }
            Op::GuestEndsOutput if !self.guest_ended && !self.forgotten => {
                self.guest_ended = true;
                self.guest.send(self.socket.shutdown(SEND), &[]);
            }
            Op::GuestAsks if !self.forgotten => self.guest.send(self.socket.header(op::CREDIT_REQUEST), &[]),
            Op::GuestGivesBuffers(count) => {
                for _ in 0..count {
                    let Some(number) = self.spare.pop() else { break };
                    self.guest.give(number);
                }
            }
            Op::DeviceWorks => self.guest.settle().unwrap(),
            _ => {}
        }
        self.hear();
    }

    /// Takes what the device has put into the guest's buffers, without letting it work.
    fn hear(&mut self) {
        while let Some((head, packet)) = self.guest.take() {
            self.spare.push(head);
            assert!(!self.guest_sees_end || packet.data.is_empty(), "data behind the end");
            self.socket.hear(&packet.header);
            assert_eq!(packet.header.buf_alloc, BUF_ALLOC);
            assert!(self.socket.sent.wrapping_sub(packet.header.fwd_cnt) <= BUF_ALLOC);
            match packet.header.op {
                op::RW => {
                    assert!(continues(self.guest_got as usize, &packet.data));
                    self.guest_got += packet.header.len;
                    assert!(
                        self.guest_got - self.socket.consumed <= self.socket.buf_alloc,
                        "more than there is room for"
                    );
                }
                op::SHUTDOWN => {
                    assert!(self.host_ended && self.guest_got as usize == self.host_wrote);
                    assert!(self.guest_ended || packet.header.flags == SEND, "the host program still reads");
                    self.guest_sees_end = true;
                    self.forgotten = packet.header.flags == BOTH;
                }
                op::CREDIT_UPDATE | op::CREDIT_REQUEST => {}
                other => panic!("op {other}"),
            }
        }
    }

    /// Whatever happened before: when everybody takes what there is, all of it arrives, and so do the ends.
    fn finish(mut self) {
        loop {
            let before = (self.guest_got, self.host_got, self.guest_sees_end, self.host_sees_end);
            for op in [
                Op::GuestGivesBuffers(256),
                Op::DeviceWorks,
                Op::GuestConsumes(u32::MAX),
                Op::HostReads(1 << 20),
                Op::DeviceWorks,
            ] {
                self.apply(&op);
            }
            if before == (self.guest_got, self.host_got, self.guest_sees_end, self.host_sees_end) {
                break;
            }
        }
        assert_eq!(self.guest_got as usize, self.host_wrote);
        assert_eq!(self.host_got, self.socket.sent as usize);
        assert_eq!((self.guest_sees_end, self.host_sees_end), (self.host_ended, self.guest_ended));
    }
}

/// Values that a hostile guest would try.
fn number() -> impl Strategy<Value = u32> {
    prop_oneof![0..70u32, Just(BUF_ALLOC), Just(u32::MAX), any::<u32>()]
}

#[derive(Clone, Debug)]
enum Attack {
    Packet {
        op: u16,
        flags: u32,
        data: usize,
        claimed: Option<u32>,
        buf_alloc: u32,
        fwd_cnt: u32,
        which: usize,
    },
    Descriptors {
        queue: usize,
        parts: Vec<(u64, u32)>,
        flags: u32,
    },
    Dial(bool),
    HangUp(usize),
    Talk(usize),
    Reset,
    Resumed,
}

fn attack() -> impl Strategy<Value = Attack> {
    let address = prop_oneof![
        TX_BUFFERS..TX_BUFFERS + 100,
        MEMORY_END - 100..MEMORY_END + 100,
        any::<u64>(),
        0..0x8_0000u64
    ];
    let length = prop_oneof![0..100u32, 0..200_000u32, any::<u32>()];
    prop_oneof![
        20 => (0..9u16, number(), 0..200usize, prop::option::weighted(0.02, number()), number(), number(), 0..5usize)
            .prop_map(|(op, flags, data, claimed, buf_alloc, fwd_cnt, which)| {
                Attack::Packet { op, flags, data, claimed, buf_alloc, fwd_cnt, which }
            }),
        1 => (0..3usize, prop::collection::vec((address, length), 1..8), 0..8u32)
            .prop_map(|(queue, parts, flags)| Attack::Descriptors { queue, parts, flags }),
        6 => any::<bool>().prop_map(Attack::Dial),
        2 => (0..5usize).prop_map(Attack::HangUp),
        4 => (0..5usize).prop_map(Attack::Talk),
        1 => Just(Attack::Reset),
        1 => Just(Attack::Resumed),
    ]
}

/// Runs attacks until the device refuses to go on. Returns how many there were.
fn run(attacks: &[Attack]) -> usize {
    let mut guest = Guest::new();
    let mut hosts: Vec<(UnixStream, u32)> = Vec::new();
    let data = pattern(200);
    for (count, attack) in attacks.iter().enumerate() {
        let mut result = Ok(());
        match attack {
            Attack::Packet { op, flags, data: length, claimed, buf_alloc, fwd_cnt, which } => {
                let port = hosts.get(*which).map_or(0, |(_, port)| *port);
                let socket = Socket { local_port: port, ..Socket::default() };
                let (flags, buf_alloc, fwd_cnt) = (*flags, *buf_alloc, *fwd_cnt);
                let len = claimed.unwrap_or(u32::try_from(*length).unwrap());
                let header = Header { len, flags, buf_alloc, fwd_cnt, ..socket.header(*op) };
                result = guest.try_send(header, &data[..*length]);
            }
            Attack::Descriptors { queue, parts, flags } => {
                let mut ring = Ring { available: guest.rings[*queue].available, ..Ring::new(*queue) };
                ring.add(&guest.memory, 17, parts, *flags);
                guest.rings[*queue].available = ring.available;
                result = guest.process(*queue);
            }
            Attack::Dial(whole) => {
                let mut host = guest.dial();
                let _ = host.write_all(if *whole { b"CONNECT 1024\n" } else { b"CONNECT 10" });
                host.set_nonblocking(true).unwrap();
                hosts.push((host, 0));
            }
            Attack::HangUp(which) if *which < hosts.len() => drop(hosts.swap_remove(*which)),
            Attack::Talk(which) => {
                if let Some((host, _)) = hosts.get_mut(*which) {
                    let _ = host.write(&data);
                    let _ = host.read(&mut [0; 100]);
                }
            }
            Attack::Reset => guest.device.reset(),
            Attack::Resumed => result = guest.work(VirtioDevice::resumed),
            Attack::HangUp(_) => {}
        }
        if result.and_then(|()| guest.settle()).is_err() {
            return count;
        }
        while let Some((head, packet)) = guest.take() {
            if packet.header.op == op::REQUEST
                && let Some((_, port)) = hosts.iter_mut().find(|(_, port)| *port == 0)
            {
                *port = packet.header.src_port;
            }
            if head < QUEUE_SIZES[RX] {
                let part = (RX_BUFFERS + u64::from(head) * RX_STRIDE, guest.rx_size);
                guest.rings[RX].add(&guest.memory, head, &[part], VRING_DESC_F_WRITE);
            }
        }
        if guest.process(RX).is_err() {
            return count;
        }
    }
    attacks.len()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_byte_and_every_end_arrives(buf_alloc in prop_oneof![500..5000u32, 500..300_000u32], ops in prop::collection::vec(op(), 1..100)) {
        let mut model = Model::new(buf_alloc);
        for op in &ops {
            model.apply(op);
        }
        model.finish();
    }

    #[test]
    fn no_attack_makes_the_device_panic_or_spin(attacks in prop::collection::vec(attack(), 1..100)) {
        run(&attacks);
    }
}

#[test]
fn attacks_reach_beyond_the_first() {
    let accept =
        Attack::Packet { op: 2, flags: 0, data: 0, claimed: None, buf_alloc: 9, fwd_cnt: 0, which: 0 };
    let data =
        Attack::Packet { op: 5, flags: 0, data: 20, claimed: None, buf_alloc: 9, fwd_cnt: 0, which: 0 };
    let shutdown =
        Attack::Packet { op: 4, flags: BOTH, data: 0, claimed: None, buf_alloc: 9, fwd_cnt: 0, which: 0 };
    assert_eq!(run(&[Attack::Dial(true), accept, data, Attack::Talk(0), shutdown, Attack::HangUp(0)]), 6);
}
