//! The system calls of each kind of thread. What is not here ends the process.

use libc::{
    SIGABRT, SIGBUS, SIGSEGV, SYS_accept4, SYS_brk, SYS_clock_gettime, SYS_clone, SYS_clone3, SYS_close,
    SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_wait, SYS_eventfd2, SYS_exit, SYS_exit_group, SYS_fcntl,
    SYS_fdatasync, SYS_fstatfs, SYS_ftruncate, SYS_futex, SYS_getpid, SYS_getrandom, SYS_gettid, SYS_ioctl,
    SYS_lseek, SYS_madvise, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap, SYS_prctl, SYS_pread64,
    SYS_preadv, SYS_preadv2, SYS_pwrite64, SYS_pwritev, SYS_read, SYS_recvfrom, SYS_recvmsg,
    SYS_restart_syscall, SYS_rseq, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn,
    SYS_sched_getaffinity, SYS_sched_yield, SYS_seccomp, SYS_sendmsg, SYS_sendto, SYS_set_robust_list,
    SYS_shutdown, SYS_sigaltstack, SYS_statx, SYS_tgkill, SYS_write, c_int, c_long,
};

use super::kvm;

/// A system call, and which uses of it are allowed.
#[derive(Debug)]
pub struct Call {
    /// Its number.
    pub number: c_long,
    /// Which uses.
    pub uses: Uses,
}

/// The allowed uses of a system call.
#[derive(Debug)]
pub enum Uses {
    /// All of them.
    Any,
    /// Those in which the bits of `mask` in this argument, of which the kernel reads 32 bits, have one of these values.
    Where {
        /// Which, counted from 0.
        argument: u8,
        /// The bits that are looked at.
        mask: u32,
        /// What they may be.
        values: &'static [u32],
    },
    /// None, but the kernel is to be taken for one that has no such call.
    Missing,
}

/// All uses of a call.
pub const fn any(number: c_long) -> Call {
    Call { number, uses: Uses::Any }
}

/// The uses of a call whose argument, counted from 0, has one of these values.
pub const fn only(number: c_long, argument: u8, values: &'static [u32]) -> Call {
    masked(number, argument, u32::MAX, values)
}

/// The uses of a call whose argument, counted from 0, has one of these values in the bits of a mask.
pub const fn masked(number: c_long, argument: u8, mask: u32, values: &'static [u32]) -> Call {
    Call { number, uses: Uses::Where { argument, mask, values } }
}

/// A constant of the kernel's interface, as a filter compares it.
#[allow(clippy::cast_sign_loss)] // none of them is negative
pub const fn bits(value: c_int) -> u32 {
    value as u32
}

/// The operation in a futex's second argument, without the flags for private futexes and for the clock.
const FUTEX_CMD_MASK: u32 = !bits(libc::FUTEX_PRIVATE_FLAG | libc::FUTEX_CLOCK_REALTIME);

/// How glibc makes a thread.
const THREAD: u32 = bits(
    libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SYSVSEM
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SETTLS
        | libc::CLONE_PARENT_SETTID
        | libc::CLONE_CHILD_CLEARTID,
);

/// The signal by which glibc has all threads change their uid. It takes hold of it before it makes the first thread.
const SETXID: u32 = 33;
/// `SIGRTMIN` of glibc, which keeps the two below it to itself. It interrupts `KVM_RUN`.
pub(super) const KICK: u32 = 34;

/// Every thread: memory, locks, events, words to the owner, and the end of the process.
pub(super) const EVERY: &[Call] = &[
    any(SYS_read),
    any(SYS_write),
    any(SYS_close),
    any(SYS_brk),
    // Nothing new to run.
    masked(SYS_mmap, 2, bits(libc::PROT_EXEC), &[0]),
    any(SYS_mremap),
    any(SYS_munmap),
    masked(
        SYS_futex,
        1,
        FUTEX_CMD_MASK,
        &[bits(libc::FUTEX_WAIT), bits(libc::FUTEX_WAKE), bits(libc::FUTEX_WAIT_BITSET)],
    ),
    any(SYS_sched_yield),
    // Where the host's clock cannot be read without a call.
    any(SYS_clock_gettime),
    any(SYS_restart_syscall),
    any(SYS_sendmsg),
    // A driver's reset, which is a vCPU's doing, ends the vsock device's connections.
    any(SYS_recvfrom),
    any(SYS_shutdown),
    any(SYS_epoll_ctl),
    // A panic, a stack overflow, a fault in a file that has been cut: `abort`, or the same again with the default action.
    any(SYS_getpid),
    any(SYS_gettid),
    only(SYS_tgkill, 2, &[bits(SIGABRT)]),
    only(SYS_rt_sigaction, 0, &[bits(SIGABRT), bits(SIGBUS), bits(SIGSEGV)]),
    any(SYS_rt_sigprocmask),
    any(SYS_rt_sigreturn),
    any(SYS_exit_group),
];

/// The thread that does the devices' work.
pub(super) const DEVICES: &[Call] = &[
    any(SYS_epoll_wait),
    // vsock
    any(SYS_accept4),
    any(SYS_recvmsg),
    any(SYS_sendto),
    // block
    any(SYS_preadv),
    any(SYS_pwritev),
    any(SYS_fdatasync),
    // rng
    any(SYS_getrandom),
    // balloon
    only(SYS_madvise, 2, &[bits(libc::MADV_DONTNEED)]),
];

/// The thread that does the work of file system devices. What it sends, a vCPU sends too, when the driver resets such a device.
pub(super) const FILES: &[Call] = &[
    any(SYS_epoll_wait),
    // The server's replies, and the files among them.
    any(SYS_recvmsg),
    // Between those files and guest memory.
    any(SYS_preadv),
    any(SYS_pwritev),
    // Whether they append. A second descriptor, to learn what close says of it.
    only(SYS_fcntl, 1, &[bits(libc::F_GETFL), bits(libc::F_SETFL), bits(libc::F_DUPFD_CLOEXEC)]),
];

/// A vCPU's thread.
pub(super) const VCPU: &[Call] = &[
    only(SYS_ioctl, 1, kvm::VCPU),
    // Files' data that the host has in memory.
    only(SYS_preadv2, 5, &[0, bits(libc::RWF_NOWAIT)]),
    any(SYS_fstatfs),
];

/// The thread that obeys the owner, and the first steps of those that it makes.
pub(super) const CONTROL: &[Call] = &[
    any(SYS_recvmsg),
    only(SYS_ioctl, 1, kvm::CONTROL),
    any(SYS_eventfd2),
    any(SYS_epoll_create1),
    only(SYS_fcntl, 1, &[bits(libc::F_GETFL), bits(libc::F_SETFL)]),
    any(SYS_getrandom),
    // Kernels, disks and saved machines. A name would lead nowhere: the root is empty.
    any(SYS_statx),
    any(SYS_lseek),
    any(SYS_pread64),
    any(SYS_pwrite64),
    any(SYS_ftruncate),
    // Threads: their stacks, their birth, what C library and standard library do first and last, and their own filters.
    masked(SYS_mprotect, 2, bits(libc::PROT_EXEC), &[0]),
    only(SYS_clone, 0, &[THREAD]),
    any(SYS_rseq),
    any(SYS_set_robust_list),
    any(SYS_sigaltstack),
    any(SYS_sched_getaffinity),
    only(SYS_prctl, 0, &[bits(libc::PR_SET_NAME)]),
    only(SYS_seccomp, 0, &[libc::SECCOMP_SET_MODE_FILTER]),
    only(SYS_madvise, 2, &[bits(libc::MADV_DONTNEED)]),
    any(SYS_exit),
    // Its flags are in memory, where no filter sees them; the C library falls back to clone.
    Call { number: SYS_clone3, uses: Uses::Missing },
    // The signal that interrupts a vCPU, and the C library's own.
    only(SYS_rt_sigaction, 0, &[KICK, SETXID]),
    only(SYS_tgkill, 2, &[KICK]),
];
