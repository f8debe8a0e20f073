//! How a process is born: into the namespaces and the cgroup that it shall be in, rather than moved there. Moving has the kernel wait
//! for a grace period of RCU (`docs/adr/0007-born-into-the-cgroup.md`).

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr;

use nix::errno::Errno;
use nix::libc::{self, c_char, c_int};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, waitpid};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// `CLONE_INTO_CGROUP` of linux/sched.h, since Linux 5.7.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// What is born.
pub(crate) struct Birth<'a> {
    /// What it executes, and its arguments with its own name before them.
    pub(crate) words: Vec<CString>,
    /// Its standard streams.
    pub(crate) streams: [BorrowedFd<'a>; 3],
    /// The descriptors that it gets under their numbers here.
    pub(crate) kept: &'a [BorrowedFd<'a>],
    /// The network namespace that it enters.
    pub(crate) network: Option<BorrowedFd<'a>>,
    /// New namespaces, as flags of clone(2).
    pub(crate) namespaces: c_int,
    /// The directory of its cgroup.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

impl Birth<'_> {
    /// Gives birth to it: a child of this thread, with no environment and in a process group of its own (a terminal's ^C is not for it).
    ///
    /// # Errors
    /// What the kernel says when it cannot be made or does not come to execute its program; there is no child then.
    pub(crate) fn give(&self) -> io::Result<Pid> {
        let mut words: Vec<*const c_char> = self.words.iter().map(|word| word.as_ptr()).collect();
        words.push(ptr::null());
        // Closed by the child's execution of its program.
        let (said, says) = pipe_with(PipeFlags::CLOEXEC)?;
        let Some(child) = self.fork()? else {
            let Err(error) = self.execute(&words);
            let _ = File::from(says).write_all(&(error as i32).to_ne_bytes());
            // SAFETY: ends the child.
            unsafe { libc::_exit(1) }
        };
        drop(says);
        let mut errno = [0; 4];
        match File::from(said).read_exact(&mut errno) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(child),
            failed => {
                let _ = waitpid(Some(child), WaitOptions::empty());
                failed.and(Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno))))
            }
        }
    }

    /// `None` in the child.
    fn fork(&self) -> io::Result<Option<Pid>> {
        let cgroup = self.cgroup.map(|cgroup| cgroup.as_raw_fd().unsigned_abs().into());
        let made = if self.namespaces == 0 && cgroup.is_none() {
            // Where nothing needs it, containers may have no clone3.
            // SAFETY: the child does what `execute` and its caller do.
            unsafe { libc::fork() }.into()
        } else {
            let arguments = libc::clone_args {
                flags: u64::from(self.namespaces.unsigned_abs()) | cgroup.map_or(0, |_| CLONE_INTO_CGROUP),
                exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
                cgroup: cgroup.unwrap_or(0),
                // SAFETY: numbers, for which zero says that there is nothing.
                ..unsafe { std::mem::zeroed() }
            };
            // SAFETY: the arguments are of the length that is given, and name no memory: the child goes on with a copy of this thread's
            // stack. It does what `execute` and its caller do.
            unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments)) }
        };
        let pid = Errno::result(made)?;
        Ok(i32::try_from(pid).ok().and_then(Pid::from_raw))
    }

    /// What the child does. It is a copy of one thread of a process that may have others, so it neither allocates nor takes a lock: system
    /// calls are all that it makes.
    fn execute(&self, words: &[*const c_char]) -> Result<Infallible, Errno> {
        // SAFETY: integers, a set of signals of its own, strings that end with a NUL in lists that end with a null; the descriptors are
        // copies of those that the caller holds.
        unsafe {
            Errno::result(libc::setpgid(0, 0))?;
            // What Rust's standard library ignores, programs do not expect to be ignored.
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            let mut signals = std::mem::zeroed();
            libc::sigemptyset(&raw mut signals);
            Errno::result(libc::sigprocmask(libc::SIG_SETMASK, &raw const signals, ptr::null_mut()))?;
            if let Some(network) = self.network {
                of_rustix(move_into_link_name_space(network, Some(LinkNameSpaceType::Network)))?;
            }
            for (number, stream) in (0..).zip(&self.streams) {
                Errno::result(libc::dup2(stream.as_raw_fd(), number))?;
            }
            // Those that whoever started this program forgot, too.
            Errno::result(libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC))?;
            for kept in self.kept {
                of_rustix(fcntl_setfd(kept.as_fd(), FdFlags::empty()))?;
            }
            let environment = [ptr::null()];
            Errno::result(libc::execve(words[0], words.as_ptr(), environment.as_ptr()))?;
        }
        Err(Errno::EINVAL)
    }
}

fn of_rustix(result: rustix::io::Result<()>) -> Result<(), Errno> {
    result.map_err(|errno| Errno::from_raw(errno.raw_os_error()))
}
