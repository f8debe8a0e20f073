//! What each kind of thread may ask of the kernel, as seccomp filters. Anything else ends the process with `SIGSYS`.
//!
//! No filter allows `open` or `socket` in any form: every file, socket and device arrives as a descriptor. A thread inherits the
//! filter of the one that made it, so the control thread's allows what any thread does, and the threads that serve the guest
//! narrow it down for themselves.
//!
//! - [`calls`]: the system calls of each kind of thread
//! - [`kvm`]: the ioctls among them
//! - [`program`]: a table as a BPF program

mod calls;
mod kvm;
mod program;
#[cfg(test)]
pub(crate) mod tests;

use std::io;
use std::sync::OnceLock;

use libc::{sock_filter, sock_fprog};

use self::calls::{CONTROL, DEVICES, EVERY, FILES, VCPU};
pub use self::calls::{Call, Uses, any, bits, masked, only};
use self::program::{TooLong, compile};

/// Why a filter is not in force.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// See [`TooLong`].
    #[error(transparent)]
    Compile(#[from] TooLong),
    /// The kernel does not take it.
    #[error(
        "cannot install a seccomp filter: the kernel needs CONFIG_SECCOMP_FILTER, the process no_new_privs"
    )]
    Install(#[source] io::Error),
    /// There are filters already.
    #[error("the process is locked down already")]
    Twice,
}

/// The filters of the threads that serve the guest.
#[derive(Debug)]
struct Programs {
    devices: Vec<sock_filter>,
    vcpu: Vec<sock_filter>,
}

/// Filters belong to the process, as its uid does, so they are kept beside no machine.
static PROGRAMS: OnceLock<Programs> = OnceLock::new();

/// A kind of thread that serves the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// The devices' work.
    Devices,
    /// The work of file system devices.
    Files,
    /// A vCPU.
    Vcpu,
}

impl Thread {
    /// The name that the host shows of it; a vCPU's number comes behind it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Devices => "devices",
            Self::Files => "files",
            Self::Vcpu => "vcpu",
        }
    }
}

/// Confines the calling thread, which must be the only one, and all that it makes. The process must have no_new_privs.
///
/// # Errors
/// [`SeccompError`]; nothing of the owner or the guest may be read then.
pub fn lock_down() -> Result<(), SeccompError> {
    keep_malloc_from_files();
    let programs = Programs { devices: compile(&[EVERY, DEVICES])?, vcpu: compile(&[EVERY, VCPU])? };
    let control = compile(&[EVERY, DEVICES, FILES, VCPU, CONTROL])?;
    PROGRAMS.set(programs).map_err(|_| SeccompError::Twice)?;
    install(&control)
}

/// Confines the calling thread of another program than the VMM, and all that it makes, to the calls in `tables`. The process must have
/// no_new_privs.
///
/// # Errors
/// [`SeccompError`]; nothing of anybody's may be read then.
pub fn lock_down_to(tables: &[&[Call]]) -> Result<(), SeccompError> {
    install(&compile(tables)?)
}

/// Confines the calling thread to what its kind needs. It must be the first thing that the thread does.
///
/// # Panics
/// When the process is not locked down, or the kernel refuses: a thread that is not confined must not serve a guest.
pub fn confine(thread: Thread) {
    let programs = PROGRAMS.get().expect("the process is locked down before a machine is made");
    let program = match thread {
        Thread::Devices => &programs.devices,
        // Made when it is needed: most machines have no such thread.
        Thread::Files => {
            &compile(&[EVERY, FILES]).expect("the filter of all threads, which is longer, has been made")
        }
        Thread::Vcpu => &programs.vcpu,
    };
    install(program).expect("the kernel has taken the filter of another thread");
}

/// glibc's heaps of threads other than the first one are trimmed only after a look at `/proc/sys/vm/overcommit_memory`. With one
/// heap for all threads it never looks. Called before there is a second thread.
pub fn keep_malloc_from_files() {
    // SAFETY: sets a number in the allocator. It cannot fail for a number above zero.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Adds a filter to the calling thread, for good.
fn install(program: &[sock_filter]) -> Result<(), SeccompError> {
    let len = u16::try_from(program.len()).map_err(|_| TooLong)?;
    let program = sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads `len` instructions, which live until it returns, and writes none.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if result == 0 { Ok(()) } else { Err(SeccompError::Install(io::Error::last_os_error())) }
}
