//! The requests, replies and events of the control socket.
//!
//! A packet is a little-endian `u16` with [`VERSION`], then one [`FromOwner`] or [`FromVmm`] in postcard's encoding. Descriptors
//! travel beside it; a request names them by their place in that list ([`Fd`]).

use serde::{Deserialize, Serialize};

/// The version of every packet. The VMM and its owner come from one build, so any difference is refused.
pub const VERSION: u16 = 1;

/// Longest packet, in bytes.
pub const PACKET_MAX: usize = 64 << 10;

/// Most descriptors beside one packet: the kernel's `SCM_MAX_FD`.
pub const FDS_MAX: usize = 253;

/// A descriptor, by its place in the list that came with the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fd(pub u8);

/// What the owner sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FromOwner {
    /// Repeated in the reply.
    pub id: u32,
    /// What is asked.
    pub request: Request,
}

/// What the owner may ask. Every request is answered by one [`Reply`], in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Make the machine, load the kernel and run. Once, as the first request, or [`Restore`](Request::Restore) instead.
    Boot(Boot),
    /// Make the machine that a [`Save`](Request::Save) left, and run it.
    Restore(Restore),
    /// Fill an empty slot. The guest's driver has still to be bound to it.
    Plug {
        /// Which slot, below [`SLOTS`](crate::arch::layout::SLOTS).
        slot: u8,
        /// What to put there.
        device: Device,
    },
    /// Empty a slot. The guest's driver must have been unbound.
    Unplug {
        /// Which slot.
        slot: u8,
    },
    /// Make vCPUs and their threads until there are this many. The guest has still to bring them online.
    AddVcpus {
        /// Up to [`Boot::vcpus_max`].
        count: u8,
    },
    /// Stop all vCPUs. Answered when they stand still.
    Pause,
    /// Let all vCPUs run again.
    Resume,
    /// Write the paused machine to a file, memory included.
    Save {
        /// An empty regular file, open for reading and writing.
        file: Fd,
    },
    /// End at once. Not answered: the socket closes.
    Stop,
}

/// A machine to boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boot {
    /// What both ways to a running machine need.
    pub host: Host,
    /// Guest memory in MiB, from [`MEMORY_MIN_MIB`](crate::memory::MEMORY_MIN_MIB) to
    /// [`MEMORY_MAX_MIB`](crate::memory::MEMORY_MAX_MIB).
    pub memory_mib: u32,
    /// CPUs that start, 1 to `vcpus_max`.
    pub vcpus: u8,
    /// CPUs that the guest may ever get, up to [`VCPUS_MAX`](crate::arch::layout::VCPUS_MAX).
    pub vcpus_max: u8,
    /// The kernel, an uncompressed ELF `vmlinux` with a PVH entry, open for reading.
    pub kernel: Fd,
    /// The kernel's command line; the VMM adds the slots and the CPUs.
    pub cmdline: String,
    /// Devices that are there from the start, each with its slot.
    pub devices: Vec<(u8, Device)>,
    /// Give the guest a transmit-only 16550 at port 0x3f8, whose output joins that of the console.
    pub serial: bool,
}

/// A machine to restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restore {
    /// What both ways to a running machine need.
    pub host: Host,
    /// What [`Request::Save`] wrote. It is mapped privately and never written.
    pub file: Fd,
    /// The devices that the saved machine had, slot by slot, with host sides of their own.
    pub devices: Vec<(u8, Device)>,
}

/// What a machine gets from its host besides devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// `/dev/kvm`, open for reading and writing.
    pub kvm: Fd,
    /// A memfd of [`console::FILE_SIZE`](crate::console_ring::FILE_SIZE) bytes that takes the guest's console output.
    pub console: Fd,
    /// The I/O port whose bytes become [`Event::Status`].
    pub status_port: u16,
}

/// A virtio device and its host side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Device {
    /// A disk.
    Block(Block),
    /// Stream sockets between guest and host. Host programs connect to a listening Unix socket, send `CONNECT <port>\n` and
    /// read `OK <port>\n`; the guest cannot connect to the host.
    Vsock {
        /// A listening Unix stream socket.
        listener: Fd,
        /// The guest's context id, above 2.
        cid: u32,
    },
    /// Random bytes.
    Rng,
    /// The guest's console, written to [`Host::console`].
    Console,
    /// Gives memory that the guest has freed back to the host.
    Balloon,
    /// A file system that a file server keeps, outside of the VMM.
    Fs {
        /// A connected SEQPACKET socket to the server, which speaks what [`fs`](crate::devices::fs) says.
        server: Fd,
        /// What the guest mounts it by: 1 to [`TAG_LEN`](crate::devices::fs::TAG_LEN) bytes, none of them NUL.
        tag: String,
    },
}

/// A disk made of one file or of several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Open for reading, and for writing unless `read_only`. Only raw content: no format is ever guessed.
    pub files: Vec<Fd>,
    /// How the guest sees the files.
    pub layout: BlockLayout,
    /// Refuse writes.
    pub read_only: bool,
    /// At most 20 bytes of ASCII, which the guest reads back as the disk's serial number.
    pub serial: String,
}

/// How a disk presents its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BlockLayout {
    /// One file is the whole disk.
    Whole,
    /// Each file is a partition, in order, behind a GPT that the VMM makes up. Read-only.
    Partitions,
}

/// What the VMM sends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromVmm {
    /// The answer to a request.
    Reply {
        /// That of the request.
        id: u32,
        /// What came of it.
        reply: Result<Reply, String>,
    },
    /// Something happened.
    Event(Event),
}

/// What came of a request that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// Nothing to add.
    Done,
    /// The machine runs.
    Running {
        /// `CLOCK_MONOTONIC` in nanoseconds when the VMM's `main` began.
        started_ns: u64,
        /// The same when the request was read.
        configured_ns: u64,
        /// The same just before the first vCPU entered the guest.
        entered_ns: u64,
    },
}

/// Something that the guest did or that happened to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// The guest wrote this byte to the status port. Only the first [`STATUS_EVENTS_MAX`] are reported.
    Status(u8),
    /// The machine has ended, and the VMM with it.
    Exited(Exit),
}

/// Status bytes that a guest may send in its life: a guest that floods the port must not flood its owner.
pub const STATUS_EVENTS_MAX: u32 = 64;

/// Why a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// The guest's kernel asked for a reset, which is what it does after a panic and after an orderly reboot; the last status
    /// byte tells which.
    Reset,
    /// A vCPU met a triple fault: the guest's kernel has lost control.
    TripleFault,
    /// KVM cannot go on; the text names the exit and its details.
    Kvm(String),
}
