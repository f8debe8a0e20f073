//! How the host's files are opened: by one name in a directory, or again by a descriptor.

use std::ffi::CStr;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, chmodat, fstatfs, openat2};
use rustix::io::Errno;

use crate::attributes::Attributes;

/// What statfs(2) says of file systems through which a kernel is looked at and steered (linux/magic.h), and their names.
const KERNEL_MAGIC: [(i64, &str); 20] = [
    (0x9fa0, "proc"),
    (0x6265_6572, "sysfs"),
    (0x0027_e0eb, "cgroup"),
    (0x6367_7270, "cgroup2"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0x7363_6673, "securityfs"),
    (0xf97c_ff8c, "selinuxfs"),
    (0x6265_6570, "configfs"),
    (0xcafe_4a11, "bpf"),
    (0x6165_676c, "pstore"),
    (0xde5e_81e4, "efivarfs"),
    (0x1cd1, "devpts"),
    (0x1980_0202, "mqueue"),
    (0x6573_5543, "fusectl"),
    (0x6759_6969, "rpc_pipefs"),
    (0x6e73_6673, "nsfs"),
    (0x4249_4e4d, "binfmt_misc"),
    (0x0765_5821, "resctrl"),
    (0x6e66_7364, "nfsd"),
];

/// The name of a file system through which the host's kernel is looked at and steered, by the number that statfs(2) gives for it. None
/// for those that keep files.
pub fn kernel_file_system(magic: i64) -> Option<&'static str> {
    KERNEL_MAGIC.iter().find(|(known, _)| *known == magic).map(|(_, name)| *name)
}

/// What statfs(2) says of file systems whose files are kept elsewhere.
const REMOTE_MAGIC: [i64; 13] = [
    0x6969,      // NFS_SUPER_MAGIC, linux/magic.h
    0x517b,      // SMB_SUPER_MAGIC, linux/magic.h
    0xff53_4d42, // CIFS_SUPER_MAGIC, linux/magic.h
    0xfe53_4d42, // SMB2_SUPER_MAGIC, linux/magic.h
    0x6573_5546, // FUSE_SUPER_MAGIC, linux/magic.h
    0x00c3_6400, // CEPH_SUPER_MAGIC, linux/magic.h
    0x0102_1997, // V9FS_MAGIC, linux/magic.h
    0x5346_414f, // AFS_SUPER_MAGIC, linux/magic.h
    0x6b41_4653, // AFS_FS_MAGIC, linux/magic.h
    0x7375_7245, // CODA_SUPER_MAGIC, linux/magic.h
    0x2003_0528, // ORANGEFS_SUPER_MAGIC, fs/orangefs/protocol.h of Linux
    0x0bd0_0bd0, // LL_SUPER_MAGIC, lustre_user.h of Lustre
    0x1983_0326, // BEEGFS_MAGIC, FhgfsOpsSuper.h of BeeGFS
];

/// What kind of file system a file is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileSystem {
    /// One of the host's own: what was written without an error can be lost by a disk only, and root may do what it likes.
    Local,
    /// One that is kept elsewhere: that there is no room may come out at close(2) only, and root may be taken for nobody there.
    Remote,
    /// One through which the host's kernel is looked at and steered.
    Kernel,
}

impl FileSystem {
    /// That of a file.
    ///
    /// # Errors
    /// The kernel's.
    pub fn of(file: impl AsFd) -> Result<Self, Errno> {
        fstatfs(file).map(|stat| Self::from_magic(stat.f_type))
    }

    fn from_magic(magic: i64) -> Self {
        if kernel_file_system(magic).is_some() {
            Self::Kernel
        } else if REMOTE_MAGIC.contains(&magic) {
            Self::Remote
        } else {
            Self::Local
        }
    }
}

/// Opens a name in a directory, and nothing else: no link of any kind is followed.
///
/// # Errors
/// The kernel's.
pub fn open_in(directory: impl AsFd, name: &CStr, flags: OFlags, mode: u32) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
    openat2(directory, name, flags, Mode::from_raw_mode(mode & 0o7777), resolve)
}

/// Where the process finds its own descriptors as files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnDescriptors {
    /// The working directory, in the jail.
    WorkingDirectory,
    /// `/proc/self/fd`
    Proc,
}

/// The name of a descriptor as a file. What it leads to is what the descriptor is of, whatever has become of its name; a symbolic
/// link is not followed further.
pub struct DescriptorPath {
    bytes: [u8; 32],
}

impl DescriptorPath {
    /// The name for the kernel.
    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).unwrap_or_default()
    }
}

impl OwnDescriptors {
    /// The name of one. The descriptor must stay open as long as it is used.
    pub fn path(self, descriptor: impl AsFd) -> DescriptorPath {
        let mut bytes = [0; 32];
        let prefix = match self {
            Self::WorkingDirectory => "",
            Self::Proc => "/proc/self/fd/",
        };
        // It fits: 14 bytes and at most 10 digits.
        let _ = write!(&mut bytes[..31], "{prefix}{}", descriptor.as_fd().as_raw_fd());
        DescriptorPath { bytes }
    }

    /// Opens what a descriptor is of again.
    ///
    /// # Errors
    /// The kernel's.
    pub fn reopen(self, descriptor: impl AsFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let path = self.path(descriptor);
        // A lease of somebody's is an error rather than a wait. With O_PATH, openat2 takes no such flag.
        let patience = if flags.contains(OFlags::PATH) { OFlags::empty() } else { OFlags::NONBLOCK };
        let flags = flags | OFlags::CLOEXEC | patience;
        openat2(CWD, path.as_c_str(), flags, Mode::empty(), ResolveFlags::empty())
    }

    /// Changes permissions.
    ///
    /// # Errors
    /// The kernel's.
    pub fn chmod(self, descriptor: impl AsFd, mode: u32) -> Result<(), Errno> {
        let path = self.path(descriptor);
        chmodat(CWD, path.as_c_str(), Mode::from_raw_mode(mode & 0o7777), rustix::fs::AtFlags::empty())
    }

    /// Clears the set-id bits that a change of content clears. The kernel does it only for those without `CAP_FSETID`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn clear_set_id(self, descriptor: impl AsFd) -> Result<(), Errno> {
        let mode = Attributes::of(&descriptor)?.mode();
        let mut cleared = mode & !libc::S_ISUID;
        // Without permission to execute for the group, the bit means something else.
        if mode & libc::S_IXGRP != 0 {
            cleared &= !libc::S_ISGID;
        }
        if cleared == mode { Ok(()) } else { self.chmod(descriptor, cleared) }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn file_systems_are_told_apart() {
        let temporary = std::fs::File::open(std::env::temp_dir()).unwrap();
        assert_eq!(FileSystem::of(&temporary), Ok(FileSystem::Local));
        assert_eq!(FileSystem::of(std::fs::File::open("/proc").unwrap()), Ok(FileSystem::Kernel));
        for magic in [libc::NFS_SUPER_MAGIC, libc::FUSE_SUPER_MAGIC, libc::CODA_SUPER_MAGIC] {
            assert_eq!(FileSystem::from_magic(magic), FileSystem::Remote, "{magic:x}");
        }
    }

    #[test]
    fn links_are_opened_but_never_followed() {
        let directory = tempfile::tempdir().unwrap();
        symlink("/etc/passwd", directory.path().join("link")).unwrap();
        let parent = std::fs::File::open(directory.path()).unwrap();
        assert_eq!(open_in(&parent, c"link", OFlags::RDONLY, 0).err(), Some(Errno::LOOP));
        assert_eq!(open_in(&parent, c"link/x", OFlags::PATH, 0).err(), Some(Errno::LOOP));
        assert_eq!(open_in(&parent, c"..", OFlags::PATH, 0).err(), Some(Errno::XDEV));
        let link = open_in(&parent, c"link", OFlags::PATH, 0).unwrap();
        assert_eq!(Attributes::of(&link).unwrap().kind(), rustix::fs::FileType::Symlink);
        assert_eq!(OwnDescriptors::Proc.reopen(&link, OFlags::RDONLY).err(), Some(Errno::LOOP));
    }

    #[test]
    fn set_id_bits_are_cleared_as_by_a_write() {
        let file = tempfile::tempfile().unwrap();
        for (before, after) in [(0o6755, 0o755), (0o4644, 0o644), (0o2644, 0o2644), (0o1777, 0o1777)] {
            OwnDescriptors::Proc.chmod(&file, before).unwrap();
            OwnDescriptors::Proc.clear_set_id(&file).unwrap();
            assert_eq!(Attributes::of(&file).unwrap().mode() & 0o7777, after, "{before:o}");
        }
    }
}
