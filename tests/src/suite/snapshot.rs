//! A whole machine is saved, and restored as often as wanted.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use bulkhead_sandbox::agent::Agent;
use bulkhead_sandbox::size::Size;
use bulkhead_sandbox::slots::Slots;
use bulkhead_sandbox::storage::{self, Upper};
use bulkhead_tests::bulkhead::layers;
use bulkhead_tests::container::Container;
use bulkhead_tests::vm::{Plan, Result, Vm, block_on, ensure};
use bulkhead_vmm::control::message::{Fd, Request};
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("snapshot: the saved machine goes on, and so do two that are restored from it", restored_twice),
        trial(
            "snapshot: a container runs in each of two restored machines, with random numbers of its own",
            containers,
        ),
        trial("snapshot: what is cut, damaged or of another version is refused before it runs", refused),
        trial("snapshot: a running machine is not saved", running),
    ]
}

/// A machine saved right after its agent was ready.
fn saved(plan: &Plan) -> Result<(Vm, File)> {
    let mut vm = Vm::ready(plan)?;
    let file = tempfile::tempfile()?;
    vm.request(Request::Pause, &[])?;
    vm.request(Request::Save { file: Fd(0) }, &[file.as_fd()])?;
    Ok((vm, file))
}

fn restored_twice() -> Result {
    let plan = Plan { vcpus_max: 2, ..Plan::default() };
    let (mut original, file) = saved(&plan)?;
    original.request(Request::Resume, &[])?;
    let clones = [Vm::restore(&plan, &file)?, Vm::restore(&plan, &file)?];
    for (name, mut vm) in ["the original", "the first clone", "the second clone"]
        .into_iter()
        .zip([original].into_iter().chain(clones))
    {
        vm.agent(async |agent| Ok(agent.details().clone())).map_err(|error| format!("{name}: {error}"))?;
        vm.request(Request::AddVcpus { count: 2 }, &[])?;
        vm.agent(async |agent| Ok(agent.online_cpus(2).await?))
            .map_err(|error| format!("{name}: {error}"))?;
    }
    Ok(())
}

fn containers() -> Result {
    let plan = Plan::default();
    let (original, file) = saved(&plan)?;
    drop(original);
    let storage = storage::plan(&mut Slots::default(), &layers("busybox")?, Upper::Tmpfs(Size(32 << 20)))?;
    let mut clones = [Vm::restore(&plan, &file)?, Vm::restore(&plan, &file)?];
    for vm in &mut clones {
        for (slot, disk) in &storage.disks {
            vm.plug(*slot, disk)?;
        }
    }
    let sockets = clones.each_ref().map(Vm::vsock_path);
    block_on(async {
        let agents = [Agent::connect(&sockets[0]).await?, Agent::connect(&sockets[1]).await?];
        let script = "echo here; read line; cat /proc/sys/kernel/random/uuid; echo $line; exit 3";
        let mut containers = Vec::new();
        for (agent, socket) in agents.iter().zip(&sockets) {
            agent.introduce().await?;
            for (slot, _) in &storage.disks {
                agent.bind_slot(*slot).await?;
            }
            containers.push(Container::start(agent, socket, &storage.rootfs, script).await?);
        }
        for container in &mut containers {
            container.says("here\n").await?;
        }
        let mut random = Vec::new();
        for (container, line) in containers.into_iter().zip(["first\n", "second\n"]) {
            let (code, said) = container.finish(line).await?;
            let (uuid, echoed) = said.split_once('\n').unwrap_or_default();
            ensure((code, uuid.len(), echoed) == (3, 36, line), || format!("{code}: {said:?}"))?;
            random.push(uuid.to_owned());
        }
        ensure(random[0] != random[1], || format!("both clones made the same random number: {random:?}"))
    })
}

fn refused() -> Result {
    let plan = Plan { memory_mib: 64, ..Plan::default() };
    let (original, file) = saved(&plan)?;
    drop(original);
    let length = file.metadata()?.len();
    let refusal =
        |file: &File| Vm::restore(&plan, file).err().map(|error| error.to_string()).unwrap_or_default();
    ensure(refusal(&file).is_empty(), || format!("the untouched file: {}", refusal(&file)))?;

    let flip = |at: u64| -> Result<String> {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        file.write_all_at(&[byte[0] ^ 0x10], at)?;
        let said = refusal(&file);
        file.write_all_at(&byte, at)?;
        Ok(said)
    };
    for (at, expected) in [
        (0, "not a saved machine"),
        (8, "version"),
        (13, "damaged (header)"),
        (100, "damaged (state)"),
        (length - (32 << 20), "damaged (memory)"),
    ] {
        let said = flip(at)?;
        ensure(said.contains(expected), || format!("bit at {at}: expected {expected:?}, got {said:?}"))?;
    }
    for (cut, expected) in
        [(length - 4096, "cut short"), (60, "cut short"), (10, "cut short"), (0, "cut short")]
    {
        file.set_len(cut)?;
        let said = refusal(&file);
        ensure(said.contains(expected), || format!("cut to {cut}: expected {expected:?}, got {said:?}"))?;
    }
    Ok(())
}

fn running() -> Result {
    let mut vm = Vm::ready(&Plan::default())?;
    let file = tempfile::tempfile()?;
    let said =
        vm.request(Request::Save { file: Fd(0) }, &[file.as_fd()]).err().map(|error| error.to_string());
    ensure(said.as_deref().is_some_and(|said| said.contains("must be paused")), || format!("{said:?}"))
}
