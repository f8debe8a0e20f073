//! A machine: KVM's part of it, guest memory, vCPUs, and the board with its slots.
//!
//! The order of set-up is that of the kernel's costs: every memory slot first, then the interrupt controllers, vCPUs, irqfds and
//! ioeventfds. On Linux 6.18 a memory slot that comes after any of those waits 7 to 10 ms for a grace period.

use std::fs::File;
use std::sync::{Arc, Mutex};

use kvm_bindings::{CpuId, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::arch::boot::{self, BootError};
use crate::arch::layout::{
    CMDLINE_MAX, KVM_IDENTITY_MAP_START, KVM_TSS_START, SLOT_SIZE, SLOTS, SLOTS_START, VCPUS_MAX,
    slot_address, slot_gsi,
};
use crate::arch::state::{self, StateError, VcpuState, VmState};
use crate::arch::{cpuid, mptable};
use crate::board::Board;
use crate::console_ring::ConsoleRing;
use crate::control::message::{Boot, Device, Host};
use crate::control::socket::ControlSocket;
use crate::devices::console::SharedRing;
use crate::devices::factory::{self, FactoryError, Fds};
use crate::devices::ports::Ports;
use crate::memory::{self, Memory, MemoryError};
use crate::seccomp;
use crate::vcpu::{self, SaveContext, ThreadError, Vcpu};
use crate::virtio::registers::{RegisterPages, SlotRegisters};
use crate::virtio::slot::{Plugged, Slot, SlotError, SlotState, regs};
use crate::worker::Worker;

/// Why a machine could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A call to KVM failed.
    #[error("{0}")]
    Kvm(&'static str, #[source] kvm_ioctls::Error),
    /// A number of CPUs out of bounds.
    #[error("{0} CPUs of at most {1}: give 1 to {max}, and no more to start with than the most", max = VCPUS_MAX)]
    Vcpus(u8, u8),
    /// A slot that does not exist.
    #[error("there is no slot {0}: the slots are 0 to {last}", last = SLOTS - 1)]
    NoSlot(u8),
    /// The console's memfd is not usable.
    #[error("cannot use the console file")]
    Console(#[source] std::io::Error),
    /// The host is out of something.
    #[error("cannot set up the machine's descriptors and threads")]
    Host(#[from] std::io::Error),
    /// The host refuses memory for the slots' registers.
    #[error("cannot map the slots' registers")]
    Registers(#[source] nix::Error),
    /// The host refuses the signal handler.
    #[error("cannot install the handler that interrupts vCPUs")]
    Signal(#[source] vmm_sys_util::errno::Error),
    /// The CPUID leaves do not fit.
    #[error("cannot make up the guest's CPUID")]
    Cpuid(#[source] vmm_sys_util::fam::Error),
    /// See [`MemoryError`].
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The MP table does not fit.
    #[error("cannot write the MP table to guest memory")]
    MpTable(#[source] vm_memory::GuestMemoryError),
    /// See [`BootError`].
    #[error(transparent)]
    Boot(#[from] BootError),
    /// See [`FactoryError`].
    #[error(transparent)]
    Device(#[from] FactoryError),
    /// See [`SlotError`].
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// See [`StateError`].
    #[error(transparent)]
    State(#[from] StateError),
    /// See [`ThreadError`].
    #[error(transparent)]
    Thread(#[from] ThreadError),
    /// A vCPU's thread has ended: so has the guest, and the process is about to.
    #[error("the guest has ended")]
    Ended,
}

fn kvm<T>(what: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, MachineError> {
    result.map_err(|source| MachineError::Kvm(what, source))
}

/// A machine whose vCPUs have threads.
#[derive(Debug)]
pub struct Machine {
    kvm: Kvm,
    vm: VmFd,
    memory: Arc<Memory>,
    memory_mib: u32,
    board: Arc<Board>,
    worker: Worker,
    /// Serves the file system devices: moving files' data must hold up neither streams nor disks. Most machines have none of them, so
    /// the thread is made for the first.
    files: Option<Worker>,
    console: SharedRing,
    serial: bool,
    supported: CpuId,
    tsc_khz: u32,
    vcpus: Vec<Vcpu>,
    vcpus_max: u8,
}

/// What makes a saved machine whole again, memory apart.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct MachineState {
    /// Guest memory in MiB.
    pub memory_mib: u32,
    vcpus_max: u8,
    serial: bool,
    /// What KVM supported where the machine was saved.
    supported: Vec<kvm_bindings::kvm_cpuid_entry2>,
    vm: VmState,
    vcpus: Vec<VcpuState>,
    slots: Vec<(u8, SlotState)>,
}

/// The parts of a machine before its vCPUs have threads.
struct Parts {
    machine: Machine,
    vcpu_fds: Vec<VcpuFd>,
}

impl Machine {
    /// Makes a machine and loads its kernel. Its vCPUs wait for [`run`](Self::run).
    ///
    /// # Errors
    /// [`MachineError`]; nothing is left behind but descriptors that close with it.
    pub fn boot(boot: &Boot, fds: &mut Fds, owner: Arc<ControlSocket>) -> Result<Self, MachineError> {
        if boot.vcpus == 0 || boot.vcpus > boot.vcpus_max || boot.vcpus_max > VCPUS_MAX {
            return Err(MachineError::Vcpus(boot.vcpus, boot.vcpus_max));
        }
        let memory = memory::anonymous(boot.memory_mib)?;
        let size = (boot.memory_mib, boot.vcpus_max);
        let Parts { mut machine, vcpu_fds } =
            Self::assemble(&boot.host, memory, size, boot.serial, boot.vcpus, fds, owner)?;
        for (slot, device) in &boot.devices {
            machine.plug(*slot, device, fds)?;
        }

        let mut kernel = File::from(fds.take(boot.kernel)?);
        let cmdline = command_line(boot);
        let entry = boot::load(&machine.memory, &mut kernel, &cmdline)?;
        mptable::write(&machine.memory, boot.vcpus_max).map_err(MachineError::MpTable)?;
        for (id, fd) in (0..).zip(&vcpu_fds) {
            machine.introduce(id, fd)?;
        }
        let first = vcpu_fds.first().expect("at least one vCPU");
        let mut sregs = kvm("KVM_GET_SREGS", first.get_sregs())?;
        boot::set_segments(&machine.memory, &mut sregs)?;
        kvm("KVM_SET_SREGS", first.set_sregs(&sregs))?;
        kvm("KVM_SET_REGS", first.set_regs(&boot::entry_registers(entry)))?;
        machine.start_threads(vcpu_fds)?;
        Ok(machine)
    }

    /// Makes a machine out of saved state and a private view of its memory. Its vCPUs wait for [`run`](Self::run).
    ///
    /// # Errors
    /// [`MachineError`] when the state is not one that this build on this host can have saved.
    pub fn restore(
        saved: &MachineState,
        memory: Memory,
        (host, devices): (&Host, &[(u8, Device)]),
        fds: &mut Fds,
        owner: Arc<ControlSocket>,
    ) -> Result<Self, MachineError> {
        let vcpus = u8::try_from(saved.vcpus.len()).unwrap_or(u8::MAX);
        if vcpus == 0 || vcpus > saved.vcpus_max || saved.vcpus_max > VCPUS_MAX {
            return Err(MachineError::Vcpus(vcpus, saved.vcpus_max));
        }
        let size = (saved.memory_mib, saved.vcpus_max);
        let Parts { mut machine, vcpu_fds } =
            Self::assemble(host, memory, size, saved.serial, vcpus, fds, owner)?;
        if !same_processor(machine.supported.as_slice(), &saved.supported) {
            return Err(StateError::Invalid("it was saved on another processor or kernel").into());
        }
        let slots: Vec<u8> = saved.slots.iter().map(|(slot, _)| *slot).collect();
        if !devices.iter().map(|(slot, _)| slot).eq(&slots) {
            return Err(StateError::Invalid("it had devices in other slots").into());
        }
        let xsave_len = state::xsave_len(&machine.vm);
        for (vcpu, fd) in saved.vcpus.iter().zip(&vcpu_fds) {
            vcpu.restore(fd, xsave_len)?;
        }
        saved.vm.restore(&machine.vm)?;
        for ((slot, device), (_, state)) in devices.iter().zip(&saved.slots) {
            machine.plug(*slot, device, fds)?;
            machine.board.slots()[usize::from(*slot)].restore(state)?;
        }
        for slot in slots {
            machine.board.slots()[usize::from(slot)].resumed();
        }
        machine.start_threads(vcpu_fds)?;
        Ok(machine)
    }

    fn assemble(
        host: &Host,
        memory: Memory,
        (memory_mib, vcpus_max): (u32, u8),
        serial: bool,
        vcpus: u8,
        fds: &mut Fds,
        owner: Arc<ControlSocket>,
    ) -> Result<Parts, MachineError> {
        let kvm_fd = fds.take_kvm(host.kvm)?;
        let vm = kvm("KVM_CREATE_VM", kvm_fd.create_vm())?;
        let memory = Arc::new(memory);
        let registers = Arc::new(RegisterPages::new().map_err(MachineError::Registers)?);
        set_memory_slots(&vm, &memory, &registers)?;
        kvm("KVM_SET_IDENTITY_MAP_ADDR", vm.set_identity_map_address(KVM_IDENTITY_MAP_START))?;
        kvm("KVM_SET_TSS_ADDR", vm.set_tss_address(KVM_TSS_START))?;
        kvm("KVM_CREATE_IRQCHIP", vm.create_irq_chip())?;
        let supported = kvm("KVM_GET_SUPPORTED_CPUID", cpuid::supported(&kvm_fd))?;
        let create = |id: u8| kvm("KVM_CREATE_VCPU", vm.create_vcpu(u64::from(id)));
        let vcpu_fds = (0..vcpus).map(create).collect::<Result<Vec<_>, _>>()?;
        let tsc_khz = kvm("KVM_GET_TSC_KHZ", vcpu_fds.first().expect("at least one vCPU").get_tsc_khz())?;

        let console = File::from(fds.take(host.console)?);
        let console = Arc::new(Mutex::new(ConsoleRing::new(&console).map_err(MachineError::Console)?));
        let ports = Ports::new(host.status_port, serial.then(|| Arc::clone(&console)));
        let slot = |number| {
            Slot::new(number, SlotRegisters::new(Arc::clone(&registers), number), Arc::clone(&memory))
        };
        let slots = (0..SLOTS).map(slot).collect::<Result<Box<[_]>, _>>()?;
        let board = Arc::new(Board::new(slots, ports, owner));
        let worker = Worker::start(Arc::clone(&board), seccomp::Thread::Devices)?;
        let machine = Self {
            kvm: kvm_fd,
            vm,
            memory,
            memory_mib,
            board,
            worker,
            files: None,
            console,
            serial,
            supported,
            tsc_khz,
            vcpus: Vec::new(),
            vcpus_max,
        };
        Ok(Parts { machine, vcpu_fds })
    }

    /// Gives a new vCPU its CPUID and what firmware would have set.
    fn introduce(&self, id: u8, fd: &VcpuFd) -> Result<(), MachineError> {
        let cpuid = cpuid::for_vcpu(&self.supported, id, self.tsc_khz).map_err(MachineError::Cpuid)?;
        kvm("KVM_SET_CPUID2", fd.set_cpuid2(&cpuid))?;
        Ok(state::set_msrs(fd, &boot::msrs())?)
    }

    fn start_threads(&mut self, fds: Vec<VcpuFd>) -> Result<(), MachineError> {
        vcpu::prepare_kick().map_err(MachineError::Signal)?;
        for (id, fd) in (0..).zip(fds) {
            self.vcpus.push(Vcpu::start(id, fd, Arc::clone(&self.board))?);
        }
        Ok(())
    }

    /// Lets all vCPUs run.
    pub fn run(&self) {
        self.vcpus.iter().for_each(Vcpu::run);
    }

    /// Stops all vCPUs; they stand still when this returns.
    ///
    /// # Errors
    /// [`MachineError::Ended`].
    pub fn pause(&self) -> Result<(), MachineError> {
        let pauses: Vec<_> = self.vcpus.iter().map(Vcpu::pause).collect();
        pauses.into_iter().try_for_each(|pause| pause.recv().map_err(|_| MachineError::Ended))
    }

    /// Makes vCPUs until there are `count`; the new ones wait for the guest to start them, and run.
    ///
    /// # Errors
    /// [`MachineError::Vcpus`] when the machine may not have so many.
    pub fn add_vcpus(&mut self, count: u8) -> Result<(), MachineError> {
        if count > self.vcpus_max {
            return Err(MachineError::Vcpus(count, self.vcpus_max));
        }
        let present = u8::try_from(self.vcpus.len()).expect("at most VCPUS_MAX");
        for id in present..count {
            let fd = kvm("KVM_CREATE_VCPU", self.vm.create_vcpu(u64::from(id)))?;
            self.introduce(id, &fd)?;
            // KVM looks for the receivers of an interrupt in a table that it makes before a new vCPU is listed, and makes again when a
            // local APIC's state is set. Without that the guest's INIT and SIPI reach nobody.
            let lapic = kvm("KVM_GET_LAPIC", fd.get_lapic())?;
            kvm("KVM_SET_LAPIC", fd.set_lapic(&lapic))?;
            let vcpu = Vcpu::start(id, fd, Arc::clone(&self.board))?;
            vcpu.run();
            self.vcpus.push(vcpu);
        }
        Ok(())
    }

    /// Makes a device and puts it into a slot.
    ///
    /// # Errors
    /// [`MachineError`] when the slot is taken or the device's host side is not usable.
    pub fn plug(&mut self, number: u8, device: &Device, fds: &mut Fds) -> Result<(), MachineError> {
        if matches!(device, Device::Fs { .. }) && self.files.is_none() {
            self.files = Some(Worker::start(Arc::clone(&self.board), seccomp::Thread::Files)?);
        }
        let slot = self.slot(number)?;
        slot.plug(factory::make(device, fds, &self.console)?)?;
        let wired = self.wire(number, slot);
        if wired.is_err() {
            let _ = slot.unplug();
        }
        wired
    }

    /// Connects a slot's interrupt and its queues' notifications.
    fn wire(&self, number: u8, slot: &Slot) -> Result<(), MachineError> {
        kvm("KVM_IRQFD", self.vm.register_irqfd(slot.line(), slot_gsi(number)))?;
        let mut guard = slot.lock();
        let plugged = guard.as_mut().ok_or(SlotError::Empty(number))?;
        let notify = IoEventAddress::Mmio(slot_address(number) + regs::QUEUE_NOTIFY as u64);
        for (queue, kick) in (0u32..).zip(plugged.ioeventfds()) {
            kvm("KVM_IOEVENTFD", self.vm.register_ioevent(kick, &notify, queue))?;
        }
        Ok(self.worker_of(plugged).add(number, plugged)?)
    }

    /// The thread that serves a device.
    fn worker_of(&self, device: &Plugged) -> &Worker {
        match &self.files {
            Some(files) if device.device_type() == VIRTIO_ID_FS => files,
            _ => &self.worker,
        }
    }

    /// Takes the device out of a slot. Its driver must have let go of it.
    ///
    /// # Errors
    /// [`MachineError::Slot`] when the slot is empty or its device in use.
    pub fn unplug(&mut self, number: u8) -> Result<(), MachineError> {
        let slot = self.slot(number)?;
        let plugged = slot.unplug()?;
        self.worker_of(&plugged).remove(&plugged)?;
        let notify = IoEventAddress::Mmio(slot_address(number) + regs::QUEUE_NOTIFY as u64);
        for (queue, kick) in (0u32..).zip(plugged.ioeventfds()) {
            kvm("KVM_IOEVENTFD", self.vm.unregister_ioevent(kick, &notify, queue))?;
        }
        kvm("KVM_IRQFD", self.vm.unregister_irqfd(slot.line(), slot_gsi(number)))
    }

    fn slot(&self, number: u8) -> Result<&Slot, MachineError> {
        self.board.slots().get(usize::from(number)).ok_or(MachineError::NoSlot(number))
    }

    /// Reads the state of a paused machine and hands it, with guest memory, to `write`. No device works meanwhile.
    ///
    /// # Errors
    /// When KVM cannot give the state.
    pub fn save<T>(&self, write: impl FnOnce(&MachineState, &Memory) -> T) -> Result<T, MachineError> {
        let context = Arc::new(SaveContext {
            msr_list: state::msr_list(&self.kvm)?,
            xsave_len: state::xsave_len(&self.vm),
        });
        let saves: Vec<_> = self.vcpus.iter().map(|vcpu| vcpu.save(Arc::clone(&context))).collect();
        let vcpus = saves
            .into_iter()
            .map(|save| Ok(save.recv().map_err(|_| MachineError::Ended)??))
            .collect::<Result<Vec<_>, MachineError>>()?;
        // All slots stay locked while memory is written: what their devices would change belongs to one moment.
        let held: Vec<_> = self.board.slots().iter().map(Slot::hold).collect();
        let slots = (0..).zip(&held).filter_map(|(number, held)| Some((number, held.save()?))).collect();
        let state = MachineState {
            memory_mib: self.memory_mib,
            vcpus_max: self.vcpus_max,
            serial: self.serial,
            supported: self.supported.as_slice().to_vec(),
            vm: VmState::save(&self.vm)?,
            vcpus,
            slots,
        };
        Ok(write(&state, &self.memory))
    }
}

/// Guest memory, then the slots' registers, which the guest only reads: its writes exit.
fn set_memory_slots(vm: &VmFd, memory: &Memory, registers: &RegisterPages) -> Result<(), MachineError> {
    let (registers_host, registers_len) = registers.host_range();
    debug_assert_eq!(registers_len, u64::from(SLOTS) * SLOT_SIZE);
    let ram = GuestMemoryBackend::iter(memory)
        .map(|region| (0, region.start_addr().0, region.len(), region.as_ptr() as u64));
    let all = ram.chain([(KVM_MEM_READONLY, SLOTS_START, registers_len, registers_host)]);
    for (slot, (flags, guest_phys_addr, memory_size, userspace_addr)) in (0..).zip(all) {
        let region =
            kvm_userspace_memory_region { slot, flags, guest_phys_addr, memory_size, userspace_addr };
        // SAFETY: both mappings live until the process ends, since the vCPU threads keep the board, and the board memory and registers.
        kvm("KVM_SET_USER_MEMORY_REGION", unsafe { vm.set_user_memory_region(region) })?;
    }
    Ok(())
}

/// The owner's command line, the slots, and how many CPUs start.
fn command_line(boot: &Boot) -> String {
    use std::fmt::Write;

    let mut line = String::with_capacity(CMDLINE_MAX);
    line.push_str(&boot.cmdline);
    let _ = write!(line, " maxcpus={}", boot.vcpus);
    for slot in 0..SLOTS {
        let _ = write!(line, " virtio_mmio.device=4K@{:#x}:{}", slot_address(slot), slot_gsi(slot));
    }
    line
}

/// True when two hosts give their guests the same processor. The state of the host CPU that happened to be asked does not count:
/// its APIC id (leaves 1, 0xb, 0x1f, 0x8000001e), and whether the OS uses XSAVE (leaf 1).
fn same_processor(a: &[kvm_bindings::kvm_cpuid_entry2], b: &[kvm_bindings::kvm_cpuid_entry2]) -> bool {
    let relevant = |entries: &[kvm_bindings::kvm_cpuid_entry2]| -> Vec<_> {
        entries
            .iter()
            .filter(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_001e))
            .map(|entry| {
                if entry.function == 1 { kvm_bindings::kvm_cpuid_entry2 { ebx: 0, ..*entry } } else { *entry }
            })
            .collect()
    };
    relevant(a) == relevant(b)
}
