//! The peer of the VMM: QEMU's `microvm` machine with the same kernel, guest image and devices.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bulkhead_protocol::status;
use bulkhead_tests::vm::{Plan, Result, ensure};

use crate::memory::beyond_guest;

/// Debian's build of QEMU for this machine alone: it starts in two thirds of the time of the full one.
pub(crate) const QEMU: &str = "qemu-system-x86_64-microvm";

/// The machine without what our kernel has no use for.
const MACHINE: &str = "microvm,accel=kvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off,x-option-roms=off";
/// Our devices but for vsock, which this build does not have.
const DEVICES: [&str; 5] = [
    "virtio-blk-device,drive=root",
    "virtio-rng-device",
    "virtio-balloon-device",
    "virtio-serial-device",
    "virtconsole,chardev=console",
];

/// What a boot took.
pub(crate) struct Microvm {
    /// From the spawn of QEMU to the agent's ready.
    pub(crate) ready: Duration,
    /// Resident memory of QEMU beyond the guest's, in bytes.
    pub(crate) memory: u64,
}

impl Microvm {
    /// Boots a machine until its agent is ready. The status port is the data register of a 16550 here: what the agent writes to
    /// it comes out of QEMU's standard output.
    pub(crate) fn boot(plan: &Plan) -> Result<Self> {
        let mut command = Command::new(QEMU);
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-cpu", "host"])
            .args(["-machine", MACHINE, "-smp", &plan.vcpus.to_string(), "-m", &plan.memory_mib.to_string()])
            .arg("-kernel")
            .arg(&plan.kernel)
            .args(["-append", &plan.cmdline])
            .args([
                "-drive",
                &format!("id=root,if=none,format=raw,readonly=on,file={}", plan.root.display()),
                "-chardev",
                "null,id=console",
                "-chardev",
                "stdio,id=status,signal=off",
                "-device",
                &format!("isa-serial,iobase={:#x},irq=9,chardev=status", status::PORT),
            ])
            .args(DEVICES.iter().flat_map(|device| ["-device", device]))
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let start = Instant::now();
        let mut qemu = Running(command.spawn().map_err(|error| format!("{QEMU}: {error}"))?);
        let mut byte = [0];
        let said = qemu.0.stdout.as_mut().ok_or("no standard output")?.read(&mut byte)?;
        let ready = start.elapsed();
        ensure((said, byte) == (1, [status::READY]), || {
            format!("{QEMU}: the guest said {:?} instead of ready", &byte[..said])
        })?;
        Ok(Self { ready, memory: beyond_guest(qemu.0.id(), plan.memory_mib)? })
    }
}

/// A QEMU that does not outlive its measurement.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
