//! Random writes to a slot's registers, and saved state that was tampered with.

use std::sync::Arc;

use proptest::prelude::*;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK,
};
use vm_memory::{Bytes, GuestAddress};

use super::allocations;
use super::driver::{Driver, KINDS, Kind, REGIONS};
use crate::virtio::registers::SlotRegisters;
use crate::virtio::slot::{Slot, SlotState, regs};

/// Far more than queues and connections take.
const ALLOCATION_MAX: usize = 4 << 20;

/// Every status bit that the standard knows.
const STATUS_BITS: u32 = 1 | 2 | 4 | 8 | 0x40 | 0x80;

#[derive(Clone, Debug)]
enum Op {
    /// The guest writes to the slot's page.
    Write(usize, Vec<u8>),
    /// The guest writes to its memory.
    Fill(u64, Vec<u8>),
    /// The devices' thread finds a queue notified, or the host's side ready.
    Queue(usize),
    Host,
    /// A driver that behaves takes over.
    SetUp,
}

fn op() -> impl Strategy<Value = Op> {
    let known = prop::sample::select(vec![
        regs::DEVICE_FEATURES_SEL,
        regs::DRIVER_FEATURES,
        regs::DRIVER_FEATURES_SEL,
        regs::QUEUE_SEL,
        regs::QUEUE_SIZE,
        regs::QUEUE_READY,
        regs::QUEUE_NOTIFY,
        regs::INTERRUPT_ACK,
        regs::QUEUE_DESC,
        regs::QUEUE_DESC + 4,
        regs::QUEUE_DRIVER,
        regs::QUEUE_DRIVER + 4,
        regs::QUEUE_DEVICE,
        regs::QUEUE_DEVICE + 4,
        regs::CONFIG,
    ]);
    let value = prop_oneof![
        4 => 0..6u32,
        2 => (0..10u32).prop_map(|n| 1 << n),
        2 => (0..0xb_0000u32).prop_map(|address| address & !0xf),
        1 => any::<u32>(),
    ];
    // Mostly the steps of section 3.1.1, or no queue would ever come to life.
    let status = prop_oneof![4 => prop::sample::select(vec![0u32, 1, 3, 11, 15, 15, 15]), 1 => 0..256u32, 1 => any::<u32>()];
    let register = |offset, word: u32| Op::Write(offset, word.to_le_bytes().to_vec());
    prop_oneof![
        12 => (known, value).prop_map(move |(offset, word)| register(offset, word)),
        6 => status.prop_map(move |word| register(regs::STATUS, word)),
        1 => Just(register(regs::DRIVER_FEATURES, 1)),
        3 => (0..0x1010usize, prop::collection::vec(any::<u8>(), 0..9)).prop_map(|(offset, data)| Op::Write(offset, data)),
        2 => (0..REGIONS[2].1, prop::collection::vec(0..4u8, 1..200)).prop_map(|(address, data)| Op::Fill(address, data)),
        5 => (0..5usize).prop_map(Op::Queue),
        2 => Just(Op::Host),
        1 => Just(Op::SetUp),
    ]
}

fn check_registers(driver: &Driver) {
    assert_eq!(driver.register(regs::MAGIC), 0x7472_6976);
    assert_eq!(driver.register(regs::VERSION), 2);
    assert_ne!(driver.register(regs::DEVICE_ID), 0);
    let status = driver.register(regs::STATUS);
    assert_eq!(status & !STATUS_BITS, 0, "{status:#x}");
    assert!(status & DRIVER_OK == 0 || status & FEATURES_OK != 0, "{status:#x}");
    assert!(driver.register(regs::QUEUE_READY) <= 1);
    assert!(driver.register(regs::INTERRUPT_STATUS) <= 3);
}

fn attack(kind: Kind, ops: &[Op]) {
    let mut driver = Driver::new(kind);
    let mut content = driver.content();
    for op in ops {
        let idle = driver.register(regs::STATUS) & DRIVER_OK == 0;
        let ((), allocated) = allocations::during(|| match op {
            Op::Write(offset, data) => driver.slot.write(*offset, data),
            Op::Queue(queue) => driver.slot.process_queue(*queue),
            Op::Host => driver.slot.process_host(),
            Op::Fill(address, data) => drop(driver.memory.write(data, GuestAddress(*address))),
            Op::SetUp => driver.set_up(),
        });
        assert!(allocated < ALLOCATION_MAX, "{allocated} bytes for {op:?}");
        check_registers(&driver);
        if matches!(op, Op::Fill(..) | Op::SetUp) || !idle {
            content = driver.content();
        } else {
            assert!(content == driver.content(), "memory was written before the driver was ready");
        }
    }
    let next = SlotRegisters::new(Arc::clone(&driver.pages), 1);
    assert!(
        (0..0x1000).step_by(4).all(|offset| next.word(offset).load(std::sync::atomic::Ordering::SeqCst) == 0)
    );
    driver.assert_works();
}

#[test]
fn a_vcpu_does_not_wait_for_a_device_that_is_at_work() {
    for kind in KINDS {
        let mut driver = Driver::new(kind);
        driver.set_up();
        let busy = driver.slot.lock();
        let kick = busy.as_ref().unwrap().kicks()[0].try_clone().unwrap();
        // This thread would wait for itself.
        driver.slot.write(regs::QUEUE_NOTIFY, &0u32.to_le_bytes());
        assert!(kick.read().is_ok(), "the device's own thread comes for the queue");
        driver.slot.write(regs::QUEUE_NOTIFY, &77u32.to_le_bytes());
        assert!(kick.read().is_err());
    }
}

/// A new slot with a device of the same kind, given what another machine is said to have had.
fn restore(driver: &Driver, saved: &[u8]) {
    let Ok(state) = postcard::from_bytes::<SlotState>(saved) else { return };
    let registers = SlotRegisters::new(Arc::clone(&driver.pages), 2);
    let slot = Slot::new(2, registers, Arc::clone(&driver.memory)).unwrap();
    slot.plug(driver.twin()).unwrap();
    if slot.restore(&state).is_err() {
        return;
    }
    slot.resumed();
    for queue in 0..4 {
        slot.process_queue(queue);
    }
    slot.process_host();
    slot.write(regs::STATUS, &[0; 4]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_register_write_does_harm(ops in prop::collection::vec(op(), 1..60)) {
        for kind in KINDS {
            attack(kind, &ops);
        }
    }

    #[test]
    fn tampered_state_is_refused_or_harmless(
        ops in prop::collection::vec(op(), 0..10),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        for kind in KINDS {
            let mut driver = Driver::new(kind);
            driver.set_up();
            for op in &ops {
                if let Op::Write(offset, data) = op {
                    driver.slot.write(*offset, data);
                }
            }
            let state = driver.slot.hold().save().unwrap();
            let mut saved = postcard::to_stdvec(&state).unwrap();
            for (index, byte) in &flips {
                let at = index.index(saved.len());
                saved[at] = *byte;
            }
            let ((), allocated) = allocations::during(|| restore(&driver, &saved));
            assert!(allocated < ALLOCATION_MAX, "{allocated} bytes");
        }
    }
}
