//! What the agent says on the VMM's status port, one byte a time. The port is the one thing that works before vsock does and
//! after everything else has failed; the VMM passes the bytes on without reading a meaning into them.

/// The x86 I/O port. Only the agent reaches it: containers get neither `/dev/port` nor the right to open it.
pub const PORT: u16 = 0x600;

/// The agent listens on its vsock ports.
pub const READY: u8 = 1;
/// The agent was asked to shut down, has written all disks, and is about to reset the machine.
pub const STOPPED: u8 = 2;
/// The agent has found that it cannot go on and is about to end, which makes the kernel panic.
pub const FAILED: u8 = 3;
