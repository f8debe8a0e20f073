//! A machine boots in every size, and ends in ways that are told apart.

use std::fs::File;
use std::io::Write;

use bulkhead_protocol::status;
use bulkhead_sandbox::agent::AgentError;
use bulkhead_tests::elf;
use bulkhead_tests::vm::{Plan, Result, Vm, ensure};
use bulkhead_vmm::control::message::{Event, Exit, Request};
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("boot: the agent says ready", || boots(&Plan::default()).map(drop)),
        trial("boot: 64 MiB are enough", || boots(&Plan { memory_mib: 64, ..Plan::default() }).map(drop)),
        trial("boot: memory beyond the device registers is used", high_memory),
        trial("boot: CPUs of the start and CPUs brought online later", cpus),
        trial("boot: a second CPU is brought online", second_cpu),
        trial("boot: an unprivileged owner's VMM boots without a jail", || {
            boots(&Plan { jailed: false, ..Plan::default() }).map(drop)
        }),
        trial("end: a kernel panic is a reset, with its reason on the console", panic),
        trial("end: a guest that is asked to shut down says so and resets", shutdown),
        trial("end: a triple fault is told from a panic", triple_fault),
        trial("end: a kernel that fails early is heard through the serial port", early),
        trial("end: the VMM ends with its owner", owner_gone),
        trial("input: sizes and files that cannot be are refused by name", refused),
    ]
}

fn boots(plan: &Plan) -> Result<Vm> {
    Vm::ready(plan)
}

fn high_memory() -> Result {
    let vm = boots(&Plan { memory_mib: 4096, ..Plan::default() })?;
    let total = vm.agent(async |agent| Ok(agent.details().memory_total_bytes))?;
    ensure(total > 3800 << 20, || format!("the guest sees {} MiB of 4096", total >> 20))
}

fn cpus() -> Result {
    let mut vm = boots(&Plan { vcpus: 2, vcpus_max: 4, ..Plan::default() })?;
    let at_start = vm.agent(async |agent| Ok(agent.details().cpus_online))?;
    ensure(at_start == 2, || format!("{at_start} CPUs online at the start"))?;
    vm.request(Request::AddVcpus { count: 4 }, &[])?;
    vm.agent(async |agent| Ok(agent.online_cpus(4).await?))?;
    let later = vm.agent(async |agent| Ok(agent.details().cpus_online))?;
    ensure(later == 4, || format!("{later} CPUs online later"))?;
    ensure(vm.request(Request::AddVcpus { count: 5 }, &[]).is_err(), || "a fifth CPU of four".to_owned())
}

fn second_cpu() -> Result {
    let mut vm = boots(&Plan { vcpus_max: 2, ..Plan::default() })?;
    vm.request(Request::AddVcpus { count: 2 }, &[])?;
    let online = vm.agent(async |agent| Ok(agent.online_cpus(2).await?));
    ensure(online.is_ok(), || format!("{online:?}; console:\n{}", vm.console().unwrap_or_default()))
}

fn panic() -> Result {
    let cmdline = Plan::default().cmdline.replace("init=/agent", "init=/nothing");
    let mut vm = Vm::boot(&Plan { cmdline, ..Plan::default() })?;
    let exit = vm.wait_exit()?;
    ensure(exit == Exit::Reset, || format!("{exit:?}"))?;
    let console = vm.console()?;
    ensure(console.contains("Kernel panic - not syncing"), || console)
}

fn shutdown() -> Result {
    let mut vm = boots(&Plan::default())?;
    let answer = vm.agent(async |agent| Ok(agent.shutdown().await));
    let lost = matches!(answer, Ok(Err(AgentError::Lost(_))));
    ensure(lost, || format!("the answer is {answer:?}"))?;
    let said = vm.event()?;
    ensure(said == Event::Status(status::STOPPED), || format!("it said {said:?}"))?;
    let exit = vm.wait_exit()?;
    ensure(exit == Exit::Reset, || format!("{exit:?}"))
}

/// Boots code that was made up instead of a kernel.
fn boot_code(code: &[u8], serial: bool) -> Result<(Vm, Exit)> {
    let directory = tempfile::tempdir()?;
    let kernel = directory.path().join("kernel");
    File::create(&kernel)?.write_all(&elf::pvh_kernel(code))?;
    let mut vm = Vm::boot(&Plan { kernel, serial, ..Plan::default() })?;
    let exit = vm.wait_exit()?;
    Ok((vm, exit))
}

fn triple_fault() -> Result {
    // ud2, with no interrupt table to handle it
    let (_, exit) = boot_code(&[0x0f, 0x0b], false)?;
    ensure(exit == Exit::TripleFault, || format!("{exit:?}"))
}

fn early() -> Result {
    // mov dx, 0x3f8; mov al, 'E'; out dx, al; ud2
    let (vm, _) = boot_code(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'E', 0xee, 0x0f, 0x0b], true)?;
    ensure(vm.console()? == "E", || format!("console: {:?}", vm.console()))
}

fn owner_gone() -> Result {
    let vm = boots(&Plan::default())?;
    let mut child = vm.abandon();
    // Waits: a VMM that stays is a test that hangs, which the runner ends.
    let status = child.wait()?;
    ensure(status.success(), || format!("{status}"))
}

fn refused() -> Result {
    let refusal = |plan: &Plan| Vm::boot(plan).err().map(|error| error.to_string()).unwrap_or_default();
    let empty = tempfile::NamedTempFile::new()?;
    let cut = tempfile::NamedTempFile::new()?;
    let kernel = std::fs::read(Plan::default().kernel)?;
    cut.as_file().write_all(&kernel[..kernel.len() / 2])?;
    let cases = [
        (Plan { memory_mib: 63, ..Plan::default() }, "guest memory of 63 MiB"),
        (Plan { vcpus: 0, ..Plan::default() }, "0 CPUs"),
        (Plan { vcpus_max: 33, ..Plan::default() }, "1 CPUs of at most 33"),
        (Plan { kernel: empty.path().to_owned(), ..Plan::default() }, "not a usable ELF vmlinux"),
        (Plan { kernel: cut.path().to_owned(), ..Plan::default() }, "not a usable ELF vmlinux"),
        (Plan { root: empty.path().to_owned(), ..Plan::default() }, "a disk's file is empty"),
        (Plan { cmdline: "x".repeat(2048), ..Plan::default() }, "command line"),
    ];
    for (plan, expected) in cases {
        let said = refusal(&plan);
        ensure(said.contains(expected), || format!("expected {expected:?}, got {said:?}"))?;
    }
    Ok(())
}
