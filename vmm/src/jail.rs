//! Giving up every privilege, before a byte of the owner's or of the guest's is read.
//!
//! What is left: the descriptors that the owner sends, an empty read-only root, a uid that owns nothing, no capability, no
//! way to gain one; [`seccomp`](crate::seccomp) then takes most system calls away. The network namespace stays the caller's:
//! Docker looks for the task's pid there.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, chdir, pivot_root, setgroups, setresgid, setresuid};

use crate::devices::fs::HANDLES_MAX;

/// Open descriptors at most: those of slots, queues, vsock connections and disks, which 4096 have always been enough for, and the
/// files that the guest has open through file system devices. A guest may run several busy servers; what one does not use costs nothing.
const NOFILE: u64 = 4096 + HANDLES_MAX as u64;

/// Threads at most of all processes of its uid, which are its own: the main one, the devices' and the files', 32 vCPUs, KVM's, and as many to spare.
const NPROC: u64 = 64;

/// Who the VMM becomes and where it lives.
#[derive(Clone, Debug)]
pub struct Jail {
    /// Its uid, which nothing else on the host has.
    pub uid: u32,
    /// Its gid.
    pub gid: u32,
    /// A directory to mount its root on. Nothing is ever written there.
    pub root: PathBuf,
}

/// What could not be given up.
#[derive(Debug, thiserror::Error)]
#[error("cannot give up privileges: {0}")]
pub struct JailError(&'static str, #[source] Errno);

/// Names the step that failed.
///
/// # Errors
/// If it has.
pub fn step<T>(what: &'static str, result: Result<T, Errno>) -> Result<T, JailError> {
    result.map_err(|errno| JailError(what, errno))
}

impl Jail {
    /// Enters the jail for good. The process must be root and have one thread.
    ///
    /// # Errors
    /// [`JailError`] names the step that failed. The process must then end: part of its privileges is gone.
    pub fn enter(&self) -> Result<(), JailError> {
        new_namespaces()?;
        enter_empty_root(&self.root)?;
        step("limit descriptors", setrlimit(Resource::RLIMIT_NOFILE, NOFILE, NOFILE))?;
        step("limit threads", setrlimit(Resource::RLIMIT_NPROC, NPROC, NPROC))?;
        step("limit core dumps", setrlimit(Resource::RLIMIT_CORE, 0, 0))?;
        // What the guest writes may go to files that are larger than the owner's own may be.
        step(
            "lift the limit on file sizes",
            setrlimit(Resource::RLIMIT_FSIZE, RLIM_INFINITY, RLIM_INFINITY),
        )?;
        step("drop groups", setgroups(&[]))?;
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        step("change gid", setresgid(gid, gid, gid))?;
        // Leaving uid 0 also empties the permitted, effective and ambient capability sets.
        step("drop the bounding set", drop_bounding_set(0))?;
        step("change uid", setresuid(uid, uid, uid))?;
        // After the change of uid, which forgets it. An owner that has ended before this has closed the control socket, whose end
        // of file ends the VMM as well; this is for a VMM that does not look.
        step("end with the owner", set_pdeathsig(Signal::SIGKILL))?;
        no_new_privileges()
    }
}

/// New mount, IPC, UTS and cgroup namespaces, whose mounts nobody else sees. The pid namespace is the owner's to make: one can
/// only be born into it.
///
/// # Errors
/// [`JailError`] when the kernel refuses.
pub fn new_namespaces() -> Result<(), JailError> {
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    step("unshare namespaces", unshare(namespaces))?;
    let none = None::<&str>;
    step("make mounts private", mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))
}

/// Moves to an empty read-only tmpfs that is mounted on `directory`, and lets go of all other mounts. The mount namespace must be
/// the process's own.
///
/// # Errors
/// [`JailError`] when the kernel refuses.
pub fn enter_empty_root(directory: &Path) -> Result<(), JailError> {
    let root =
        step("name the root", CString::new(directory.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    step(
        "mount an empty root",
        mount(Some("none"), root.as_c_str(), Some("tmpfs"), flags, Some("size=4k,nr_inodes=1,mode=555")),
    )?;
    step("enter the root", chdir(root.as_c_str()))?;
    step("pivot to the root", pivot_root(".", "."))?;
    step("leave the old root", umount2(".", MntFlags::MNT_DETACH))?;
    step("enter the new root", chdir("/"))
}

/// Makes it impossible to gain privileges by running something. This much anyone may do.
///
/// # Errors
/// [`JailError`] when the kernel refuses.
pub fn no_new_privileges() -> Result<(), JailError> {
    step("set no_new_privs", nix::sys::prctl::set_no_new_privs())
}

/// Empties the bounding set but for the capabilities whose bits are in `keep`.
///
/// # Errors
/// When the process lacks `CAP_SETPCAP`.
pub fn drop_bounding_set(keep: u64) -> Result<(), Errno> {
    for capability in (0..64).filter(|capability| keep & 1 << capability == 0) {
        // SAFETY: takes integers, touches no memory.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        match Errno::result(result) {
            // Beyond the last capability that this kernel knows.
            Err(Errno::EINVAL) => return Ok(()),
            other => other.map(drop)?,
        }
    }
    Ok(())
}
