//! Devices come and go while the guest runs.

use std::os::fd::AsFd;

use bulkhead_tests::vm::{Plan, Result, SLOT_RNG, Vm, ensure};
use bulkhead_vmm::control::message::{Block, BlockLayout, Device, Fd, Request};
use libtest_mimic::Trial;

use crate::trial;

const SLOT: u8 = 7;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("plug: a disk is plugged, used, unplugged, and another takes its slot", disk),
        trial("plug: a slot that is taken, empty, in use or not there is refused", refused),
    ]
}

fn plug(vm: &mut Vm) -> Result {
    let file = tempfile::tempfile()?;
    file.set_len(1 << 20)?;
    let block = Block {
        files: vec![Fd(0)],
        layout: BlockLayout::Whole,
        read_only: false,
        serial: "scratch".to_owned(),
    };
    vm.request(Request::Plug { slot: SLOT, device: Device::Block(block) }, &[file.as_fd()])?;
    Ok(())
}

fn disk() -> Result {
    let mut vm = Vm::ready(&Plan::default())?;
    for _ in 0..3 {
        plug(&mut vm)?;
        vm.agent(async |agent| Ok(agent.bind_slot(SLOT).await?))?;
        vm.agent(async |agent| Ok(agent.unbind_slot(SLOT).await?))?;
        vm.request(Request::Unplug { slot: SLOT }, &[])?;
    }
    Ok(())
}

fn refused() -> Result {
    let mut vm = Vm::ready(&Plan::default())?;
    let mut refusal =
        |request| vm.request(request, &[]).err().map(|error| error.to_string()).unwrap_or_default();
    let cases = [
        (Request::Plug { slot: SLOT_RNG, device: Device::Rng }, "slot 2 is taken"),
        (Request::Plug { slot: 22, device: Device::Rng }, "there is no slot 22"),
        (Request::Unplug { slot: SLOT }, "slot 7 is empty"),
        (Request::Unplug { slot: SLOT_RNG }, "slot 2 is in use by the guest"),
    ];
    for (request, expected) in cases {
        let said = refusal(request);
        ensure(said.contains(expected), || format!("expected {expected:?}, got {said:?}"))?;
    }
    let bind = vm.agent(async |agent| Ok(agent.bind_slot(SLOT).await?));
    ensure(bind.is_err(), || "the agent bound an empty slot".to_owned())
}
