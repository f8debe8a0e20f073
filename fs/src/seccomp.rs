//! What the server may ask of the kernel. Anything else ends the process with `SIGSYS`.
//!
//! `openat2` is the only way to open something, and nothing it could open by a path of its own is in the jail. There is no `socket`,
//! `mount`, `execve`, `clone`, `ioctl` or `open_by_handle_at` in any form.

use bulkhead_vmm::seccomp::{Call, SeccompError, any, bits, lock_down_to, masked, only};
use libc::{
    SYS_brk, SYS_clock_gettime, SYS_close, SYS_copy_file_range, SYS_exit_group, SYS_fallocate, SYS_fchmodat,
    SYS_fchownat, SYS_fcntl, SYS_fdatasync, SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_futex, SYS_getdents64,
    SYS_getpid, SYS_getrandom, SYS_gettid, SYS_getxattr, SYS_linkat, SYS_listxattr, SYS_lseek, SYS_madvise,
    SYS_mkdirat, SYS_mknodat, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap, SYS_openat2, SYS_poll,
    SYS_ppoll, SYS_readlinkat, SYS_recvfrom, SYS_recvmsg, SYS_removexattr, SYS_renameat2,
    SYS_restart_syscall, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sendmsg, SYS_setfsgid,
    SYS_setfsuid, SYS_setxattr, SYS_sigaltstack, SYS_statx, SYS_symlinkat, SYS_syncfs, SYS_tgkill, SYS_umask,
    SYS_unlinkat, SYS_utimensat, SYS_write,
};

const CALLS: &[Call] = &[
    // The two sockets.
    any(SYS_poll),
    any(SYS_ppoll),
    any(SYS_recvfrom),
    any(SYS_recvmsg),
    any(SYS_sendmsg),
    any(SYS_close),
    // Files by name.
    any(SYS_openat2),
    any(SYS_statx),
    any(SYS_readlinkat),
    any(SYS_mkdirat),
    any(SYS_mknodat),
    any(SYS_symlinkat),
    any(SYS_linkat),
    any(SYS_unlinkat),
    any(SYS_renameat2),
    any(SYS_fchmodat),
    any(SYS_fchownat),
    any(SYS_utimensat),
    any(SYS_getxattr),
    any(SYS_setxattr),
    any(SYS_listxattr),
    any(SYS_removexattr),
    // Files by descriptor. Their content is the VMM's to read and write.
    any(SYS_getdents64),
    any(SYS_lseek),
    any(SYS_ftruncate),
    any(SYS_fallocate),
    any(SYS_copy_file_range),
    any(SYS_fsync),
    any(SYS_fdatasync),
    any(SYS_syncfs),
    any(SYS_fstatfs),
    // As somebody.
    any(SYS_setfsuid),
    any(SYS_setfsgid),
    any(SYS_umask),
    // Memory, without anything new to run.
    any(SYS_brk),
    masked(SYS_mmap, 2, bits(libc::PROT_EXEC), &[0]),
    masked(SYS_mprotect, 2, bits(libc::PROT_EXEC), &[0]),
    any(SYS_mremap),
    any(SYS_munmap),
    only(SYS_madvise, 2, &[bits(libc::MADV_DONTNEED)]),
    // Hash tables that nobody can make slow.
    any(SYS_getrandom),
    any(SYS_clock_gettime),
    any(SYS_restart_syscall),
    // What the standard library asserts of descriptors in a debug build.
    only(SYS_fcntl, 1, &[bits(libc::F_GETFD)]),
    // Words to the owner, a panic, the end.
    any(SYS_write),
    any(SYS_futex),
    any(SYS_getpid),
    any(SYS_gettid),
    only(SYS_tgkill, 2, &[bits(libc::SIGABRT)]),
    only(SYS_rt_sigaction, 0, &[bits(libc::SIGABRT), bits(libc::SIGBUS), bits(libc::SIGSEGV)]),
    any(SYS_rt_sigprocmask),
    any(SYS_rt_sigreturn),
    any(SYS_sigaltstack),
    any(SYS_exit_group),
];

/// Confines the calling thread. The process must have no_new_privs.
///
/// # Errors
/// [`SeccompError`]; nothing of the guest may be read then.
pub fn lock_down() -> Result<(), SeccompError> {
    lock_down_to(&[CALLS])
}
