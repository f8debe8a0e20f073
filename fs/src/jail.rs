//! Giving up all privileges but those that serving files takes, before a byte of the guest's is read.
//!
//! What is left: the descriptors that the owner sends, an empty read-only root, the directory of the process's own descriptors, and
//! the capabilities to do with files as their owners may. No socket can be made and nothing be mounted or run: see
//! [`seccomp`](crate::seccomp). The network namespace stays the owner's, of which nothing can be made either.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use bulkhead_vmm::jail::{
    JailError, drop_bounding_set, enter_empty_root, new_namespaces, no_new_privileges, step,
};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{Gid, Uid, fchdir, setgroups, setresgid, setresuid};
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities,
    set_capabilities_secure_bits,
};

/// Where the server lives.
#[derive(Clone, Debug)]
pub struct Jail {
    /// A directory to mount its root on. Nothing is ever written there.
    pub root: PathBuf,
}

/// What it takes to serve files of all owners, and no more.
const CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Capabilities stay when the server acts as another user, and do not come back when it acts as root.
const SECURE_BITS: CapabilitiesSecureBits = CapabilitiesSecureBits::NO_SETUID_FIXUP
    .union(CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED)
    .union(CapabilitiesSecureBits::NO_ROOT)
    .union(CapabilitiesSecureBits::NO_ROOT_LOCKED)
    .union(CapabilitiesSecureBits::KEEP_CAPS_LOCKED)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE)
    .union(CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED);

impl Jail {
    /// Enters the jail for good. The process must be root and have one thread. Its working directory becomes that of its own
    /// descriptors.
    ///
    /// # Errors
    /// [`JailError`] names the step that failed. The process must then end: part of its privileges is gone.
    pub fn enter(&self) -> Result<(), JailError> {
        new_namespaces()?;
        let descriptors = self.own_descriptors()?;
        enter_empty_root(&self.root)?;
        step("enter the directory of descriptors", fchdir(&descriptors))?;
        drop(descriptors);
        limit("limit core dumps", Resource::Core, 0)?;
        step("drop groups", setgroups(&[]))?;
        let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
        step("set gids", setresgid(gid, gid, gid))?;
        step("set uids", setresuid(uid, uid, uid))?;
        step("set secure bits", set_capabilities_secure_bits(SECURE_BITS).map_err(errno))?;
        step("drop ambient capabilities", clear_ambient_capability_set().map_err(errno))?;
        step("drop the bounding set", drop_bounding_set(CAPABILITIES.bits()))?;
        let sets = CapabilitySets {
            effective: CAPABILITIES,
            permitted: CAPABILITIES,
            inheritable: CapabilitySet::empty(),
        };
        step("drop capabilities", set_capabilities(None, sets).map_err(errno))?;
        // Until it acts as somebody else, which the kernel takes for a reason to forget it. The end of the control socket remains.
        step("end with the owner", set_pdeathsig(Signal::SIGKILL))?;
        no_new_privileges()
    }

    /// A mount of nothing but `/proc/self/fd`. From its root there is no way up to the rest of `/proc`.
    fn own_descriptors(&self) -> Result<OwnedFd, JailError> {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        // One that shows the process's own pid namespace, whichever `/proc` there was.
        step(
            "mount proc",
            mount(Some("none"), &self.root, Some("proc"), flags, Some("subset=pid,hidepid=invisible")),
        )?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, self.root.join("self/fd"), flags).map_err(errno);
        let tree = step("take the directory of descriptors", tree)?;
        step("unmount proc", umount2(&self.root, MntFlags::MNT_DETACH))?;
        Ok(tree)
    }
}

/// Limits descriptors to as many as are wanted and allowed, lets files be of any size, and has too large ones be an error and
/// not the end. Gives the number of descriptors.
///
/// # Errors
/// [`JailError`] when the kernel refuses.
pub fn set_limits(descriptors: u64) -> Result<u64, JailError> {
    let allowed = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let descriptors = descriptors.min(allowed);
    limit("limit descriptors", Resource::Nofile, descriptors)?;
    let file_size = getrlimit(Resource::Fsize).maximum;
    let limit = Rlimit { current: file_size, maximum: file_size };
    step("lift the limit on file sizes", setrlimit(Resource::Fsize, limit).map_err(errno))?;
    // SAFETY: no handler is set.
    step("ignore SIGXFSZ", unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) })?;
    Ok(descriptors)
}

fn limit(what: &'static str, resource: Resource, to: u64) -> Result<(), JailError> {
    step(what, setrlimit(resource, Rlimit { current: Some(to), maximum: Some(to) }).map_err(errno))
}

fn errno(errno: rustix::io::Errno) -> Errno {
    Errno::from_raw(errno.raw_os_error())
}
