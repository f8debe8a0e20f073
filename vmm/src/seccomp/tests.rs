//! Filters at work, each in a process of its own: a forked child that ends with what it has done.

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use super::calls::{self, Call, Uses};
use super::*;

/// System calls with which a taken-over VMM would begin. A filter that allows any of them is no jail.
const FORBIDDEN: [(&str, i64); 22] = [
    ("open", libc::SYS_open),
    ("openat", libc::SYS_openat),
    ("openat2", libc::SYS_openat2),
    ("creat", libc::SYS_creat),
    ("open_by_handle_at", libc::SYS_open_by_handle_at),
    ("open_tree", libc::SYS_open_tree),
    ("memfd_create", libc::SYS_memfd_create),
    ("socket", libc::SYS_socket),
    ("socketpair", libc::SYS_socketpair),
    ("connect", libc::SYS_connect),
    ("bind", libc::SYS_bind),
    ("execve", libc::SYS_execve),
    ("execveat", libc::SYS_execveat),
    ("fork", libc::SYS_fork),
    ("vfork", libc::SYS_vfork),
    ("unshare", libc::SYS_unshare),
    ("setns", libc::SYS_setns),
    ("ptrace", libc::SYS_ptrace),
    ("process_vm_writev", libc::SYS_process_vm_writev),
    ("bpf", libc::SYS_bpf),
    ("io_uring_setup", libc::SYS_io_uring_setup),
    ("userfaultfd", libc::SYS_userfaultfd),
];

fn filters() -> [(&'static str, Vec<sock_filter>); 4] {
    [
        ("control", compile(&[EVERY, DEVICES, FILES, VCPU, CONTROL]).unwrap()),
        ("devices", compile(&[EVERY, DEVICES]).unwrap()),
        ("files", compile(&[EVERY, FILES]).unwrap()),
        ("vcpu", compile(&[EVERY, VCPU]).unwrap()),
    ]
}

fn confined(filter: &[sock_filter]) -> bool {
    nix::sys::prctl::set_no_new_privs().is_ok() && install(filter).is_ok()
}

/// How a child ends that installs a filter and does something. `act` gives its exit code, and must do nothing but system calls.
fn ends(filter: &[sock_filter], act: impl FnOnce() -> i32) -> WaitStatus {
    // SAFETY: the child makes system calls and ends without running anything of the test's.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let code = if confined(filter) { act() } else { 99 };
            // SAFETY: ends the process, no memory is touched.
            unsafe { libc::_exit(code) }
        }
        ForkResult::Parent { child } => waitpid(child, None).unwrap(),
    }
}

fn violates(status: WaitStatus) -> bool {
    matches!(status, WaitStatus::Signaled(_, Signal::SIGSYS, _))
}

fn exits(status: WaitStatus, code: i32) -> bool {
    matches!(status, WaitStatus::Exited(_, got) if got == code)
}

/// With debug assertions the standard library asks whether a descriptor that it is about to close is open.
const CHECKS: &[Call] = &[Call {
    number: libc::SYS_fcntl,
    uses: Uses::Where { argument: 1, mask: u32::MAX, values: &[libc::F_GETFD.cast_unsigned()] },
}];

/// True when a kind of thread may do something. It does it in a child, of which nothing comes back, and must not panic.
pub(crate) fn allows(thread: Thread, act: impl FnOnce()) -> bool {
    let filter = match thread {
        Thread::Devices => compile(&[EVERY, DEVICES, CHECKS]),
        Thread::Files => compile(&[EVERY, FILES, CHECKS]),
        Thread::Vcpu => compile(&[EVERY, VCPU, CHECKS]),
    };
    let act = || {
        // A test's thread has a heap of its own, which a VMM's has not: here it must neither grow nor shrink.
        // SAFETY: sets numbers in the allocator.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, 0);
            libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        }
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(act)) {
            Ok(()) => 7,
            Err(_) => 8,
        }
    };
    exits(ends(&filter.unwrap(), act), 7)
}

/// Makes a system call whose arguments beyond these are zero.
fn call(number: i64, arguments: [u64; 4]) -> i64 {
    let [a, b, c, d] = arguments;
    // SAFETY: no test passes an address that the kernel would write to.
    unsafe { libc::syscall(number, a, b, c, d, 0, 0) }
}

#[test]
fn calls_that_open_connect_or_run_something_kill_under_every_filter() {
    for (name, filter) in filters() {
        for (what, number) in FORBIDDEN {
            let status = ends(&filter, || {
                call(number, [0; 4]);
                0
            });
            assert!(violates(status), "{what} under the filter of {name}: {status:?}");
        }
    }
}

#[test]
fn allowed_calls_kill_when_their_arguments_are_not() {
    let flags = u64::from((libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).cast_unsigned());
    let executable = u64::from((libc::PROT_READ | libc::PROT_EXEC).cast_unsigned());
    for (name, filter) in filters() {
        for (what, number, arguments) in [
            ("mmap of code", libc::SYS_mmap, [0, 4096, executable, flags]),
            ("mprotect to code", libc::SYS_mprotect, [0, 0, executable, 0]),
            ("TIOCSTI", libc::SYS_ioctl, [0, libc::TIOCSTI, 0, 0]),
            ("KVM_CREATE_DEVICE", libc::SYS_ioctl, [0, 0xc00c_aee0, 0, 0]),
            ("FUTEX_CMP_REQUEUE_PI", libc::SYS_futex, [0, 12, 0, 0]),
            ("SIGKILL", libc::SYS_tgkill, [1, 1, 9, 0]),
            ("a new process", libc::SYS_clone, [17, 0, 0, 0]),
            ("MADV_HWPOISON", libc::SYS_madvise, [0, 0, 100, 0]),
        ] {
            let status = ends(&filter, || {
                call(number, arguments);
                0
            });
            assert!(violates(status), "{what} under the filter of {name}: {status:?}");
        }
    }
}

#[test]
fn each_kind_of_thread_has_only_its_own_calls() {
    let [control, devices, files, vcpu] = filters().map(|(_, filter)| filter);
    // Descriptor -1: whatever is allowed fails and does nothing.
    let (run, none) = ([u64::MAX, 0xae80, 0, 0], [u64::MAX, 0, 0, 0]);
    let try_all = |filter: &[sock_filter]| {
        [(libc::SYS_ioctl, run), (libc::SYS_accept4, none), (libc::SYS_preadv, none)].map(
            |(number, arguments)| {
                let status = ends(filter, || i32::from(call(number, arguments) != -1));
                assert!(exits(status, 0) || violates(status), "{status:?}");
                exits(status, 0)
            },
        )
    };
    assert_eq!(try_all(&vcpu), [true, false, false]);
    assert_eq!(try_all(&devices), [false, true, true]);
    assert_eq!(try_all(&files), [false, false, true]);
    assert_eq!(try_all(&control), [true, true, true], "a thread inherits the control thread's filter");
}

#[test]
fn a_thread_is_made_and_narrows_its_own_filter() {
    let [control, devices, _, _] = filters().map(|(_, filter)| filter);
    let (mut narrowed, mut wide) = (None, None);
    for (result, number) in [(&mut narrowed, libc::SYS_lseek), (&mut wide, libc::SYS_getpid)] {
        *result = Some(ends(&control, || {
            let thread = std::thread::Builder::new().name("devices".to_owned()).spawn({
                let devices = devices.clone();
                move || {
                    assert!(install(&devices).is_ok());
                    call(number, [u64::MAX, 0, 0, 0]);
                    // SAFETY: ends the process, no memory is touched.
                    unsafe { libc::_exit(7) }
                }
            });
            // The C library has been told that there is no clone3, and has made the thread all the same.
            i32::from(thread.is_ok_and(|thread| thread.join().is_err()))
        }));
    }
    assert!(violates(narrowed.unwrap()), "lseek is the control thread's: {narrowed:?}");
    assert!(exits(wide.unwrap(), 7), "{wide:?}");
}

#[test]
fn a_panic_is_told_before_it_ends_the_process() {
    for (_, filter) in filters() {
        let (reader, writer) = nix::unistd::pipe().unwrap();
        let status = ends(&filter, || {
            let _ = nix::unistd::write(&writer, b"why");
            std::process::abort()
        });
        drop(writer);
        assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGABRT, _)), "{status:?}");
        let mut said = [0; 3];
        assert_eq!((nix::unistd::read(&reader, &mut said), &said), (Ok(3), b"why"));
    }
}

#[test]
fn an_argument_that_one_table_restricts_is_open_in_no_other() {
    let all = || [EVERY, DEVICES, FILES, VCPU, CONTROL].into_iter().flatten();
    for call in all().filter(|call| matches!(call.uses, Uses::Any)) {
        let uses = all().filter(|other| other.number == call.number);
        assert!(uses.into_iter().all(|call| matches!(call.uses, Uses::Any)), "{call:?}");
    }
    assert_eq!(vmm_sys_util::signal::SIGRTMIN().cast_unsigned(), calls::KICK);
}
