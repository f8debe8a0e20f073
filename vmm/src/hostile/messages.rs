//! Control messages that were tampered with: an owner that has been taken over must not take its VMM along by a panic.

use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, send};
use proptest::prelude::*;

use super::allocations;
use crate::control::message::{
    Block, BlockLayout, Boot, Device, Fd, FromOwner, Host, PACKET_MAX, Request, Restore, VERSION,
};
use crate::control::socket::ControlSocket;

/// The receive buffer, and what the longest packet can say.
const ALLOCATION_MAX: usize = 4 << 20;

fn requests() -> Vec<Request> {
    let host = Host { kvm: Fd(0), console: Fd(1), status_port: 0x600 };
    let block = Block {
        files: vec![Fd(3), Fd(4)],
        layout: BlockLayout::Partitions,
        read_only: true,
        serial: "layers".to_owned(),
    };
    let devices = vec![
        (0, Device::Block(block)),
        (1, Device::Vsock { listener: Fd(5), cid: 3 }),
        (2, Device::Rng),
        (3, Device::Console),
        (4, Device::Balloon),
        (5, Device::Fs { server: Fd(6), tag: "shares".to_owned() }),
    ];
    let boot = Boot {
        host: host.clone(),
        memory_mib: 256,
        vcpus: 1,
        vcpus_max: 2,
        kernel: Fd(2),
        cmdline: "console=hvc0".to_owned(),
        devices: devices.clone(),
        serial: false,
    };
    vec![
        Request::Boot(boot),
        Request::Restore(Restore { host, file: Fd(2), devices }),
        Request::Plug { slot: 7, device: Device::Rng },
        Request::AddVcpus { count: 2 },
        Request::Save { file: Fd(0) },
    ]
}

proptest! {
    #[test]
    fn tampered_requests_are_refused_or_understood(
        request in prop::sample::select(requests()),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
        tail in prop::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut packet = postcard::to_extend(&FromOwner { id: 1, request }, VERSION.to_le_bytes().to_vec()).unwrap();
        for (index, byte) in flips {
            let at = 2 + index.index(packet.len() - 2);
            packet[at] = byte;
        }
        packet.truncate(cut.map_or(packet.len(), |cut| 2 + cut.index(packet.len() - 2)));
        packet.extend(tail);
        prop_assert!(packet.len() < PACKET_MAX);
        let (owner, vmm) = ControlSocket::pair().unwrap();
        send(owner.as_raw_fd(), &packet, MsgFlags::empty()).unwrap();
        let (_, allocated) = allocations::during(|| vmm.receive::<FromOwner>().is_ok());
        prop_assert!(allocated < ALLOCATION_MAX, "{allocated} bytes");
    }
}
