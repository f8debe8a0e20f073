//! Devices come and go while the guest runs.

use bulkhead_sandbox::artifacts::Artifacts;
use bulkhead_sandbox::config::Uids;
use bulkhead_sandbox::disk::Disk;
use bulkhead_sandbox::process::Place;
use bulkhead_sandbox::sandbox::{Sandbox, SandboxConfig};
use bulkhead_sandbox::size::Size;
use bulkhead_sandbox::slots::Slots;
use bulkhead_sandbox::storage::{self, Upper, make_scratch};
use bulkhead_sandbox::uid::UidLease;
use bulkhead_sandbox::vmm::Jail;
use bulkhead_tests::bulkhead::layers;
use bulkhead_tests::container::Container;
use bulkhead_tests::vm::{Plan, Result, SLOT_RNG, Vm, artifact, block_on, ensure};
use bulkhead_vmm::control::message::{BlockLayout, Device, Request};
use libtest_mimic::Trial;

use crate::trial;

const SLOT: u8 = 9;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("plug: a disk is plugged, used, unplugged, and another takes its slot", disk),
        trial("plug: a slot that is taken, empty, in use or not there is refused", refused),
        trial("plug: a sandbox gets a container's disks while it runs, and keeps those in use", sandbox),
    ]
}

fn scratch() -> Result<Disk> {
    let file = tempfile::tempfile()?;
    file.set_len(1 << 20)?;
    Ok(Disk { files: vec![file], layout: BlockLayout::Whole, read_only: false })
}

fn disk() -> Result {
    let mut vm = Vm::ready(&Plan::default())?;
    for _ in 0..3 {
        vm.plug(SLOT, &scratch()?)?;
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
        (Request::Unplug { slot: SLOT }, "slot 9 is empty"),
        (Request::Unplug { slot: SLOT_RNG }, "slot 2 is in use by the guest"),
    ];
    for (request, expected) in cases {
        let said = refusal(request);
        ensure(said.contains(expected), || format!("expected {expected:?}, got {said:?}"))?;
    }
    let bind = vm.agent(async |agent| Ok(agent.bind_slot(SLOT).await?));
    ensure(bind.is_err(), || "the agent bound an empty slot".to_owned())
}

fn sandbox() -> Result {
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    std::fs::create_dir(at("empty"))?;
    let lease = UidLease::take(Uids::default(), &at("uids"))?;
    let artifacts = Artifacts {
        vmm: artifact("libexec/bulkhead/bulkhead-vmm"),
        file_server: artifact("libexec/bulkhead/bulkhead-fs"),
        kernel: artifact("share/bulkhead/vmlinux"),
        guest_image: artifact("share/bulkhead/guest.erofs"),
    };
    let config = SandboxConfig {
        artifacts: &artifacts,
        kvm: "/dev/kvm".as_ref(),
        memory_mib: 256,
        cpus: 1,
        jail: Jail { uid: Some(&lease), root: &at("empty"), network: Place::Owners, cgroup: None },
        socket: &at("vsock"),
        disks: &[],
        shares: None,
    };
    let layers = layers("busybox")?;
    block_on(async {
        let sandbox = Sandbox::boot(&config).await?;
        let agent = sandbox.agent().await?;
        let upper = Upper::Scratch(make_scratch(&at("scratch"), Size(64 << 20)).await?);
        let storage = storage::plan(&mut Slots::default(), &layers, upper)?;
        for (slot, disk) in &storage.disks {
            sandbox.plug(&agent, *slot, disk).await?;
        }
        let script = "echo written >/file; cat /file; read line";
        let mut container = Container::start(&agent, sandbox.socket(), &storage.rootfs, script).await?;
        container.says("written\n").await?;
        let refusal = sandbox.unplug(&agent, storage.disks[1].0).await.err().map(|error| error.to_string());
        ensure(refusal.as_ref().is_some_and(|text| text.contains("in use")), || format!("{refusal:?}"))?;
        for _ in 0..2 {
            sandbox.plug(&agent, SLOT, &scratch()?).await?;
            sandbox.unplug(&agent, SLOT).await?;
        }
        let (code, rest) = container.finish("go\n").await?;
        ensure((code, rest.as_str()) == (0, ""), || format!("{code}: {rest:?}"))
    })
}
