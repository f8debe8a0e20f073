//! Who a container's process runs as: `user[:group]` looked up in the container's own `/etc/passwd` and `/etc/group`.
//!
//! The rules are Docker's. A number needs no entry. Without a group, the user's primary group and those that list the
//! user hold; with one, that group alone. The files are the image's, so nothing about them is believed: they are opened
//! within the root, must be regular, and are read up to a limit.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::BorrowedFd;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

/// Longest file that is read, in bytes.
const FILE_MAX: u64 = 4 << 20;
/// Most groups of a process (`NGROUPS_MAX`).
const GROUPS_MAX: usize = 65536;
/// Largest id: Docker's bound, and that of tools with signed ids.
const ID_MAX: u32 = i32::MAX.cast_unsigned();

/// Why a user could not be resolved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("unable to find user {0}: no matching entries in the container's passwd file")]
    NoUser(String),
    #[error("unable to find group {0}: no matching entries in the container's group file")]
    NoGroup(String),
    #[error("the id {0} is greater than {ID_MAX}")]
    Range(String),
    #[error("user {0:?} names neither a user nor a group")]
    Empty(String),
    #[error("read the container's {0}")]
    Read(&'static str, #[source] io::Error),
    #[error("the container's {0} is no regular file of at most {FILE_MAX} bytes")]
    File(&'static str),
}

/// A resolved user.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// All groups, `gid` among them: without it, a set-group-id program could shed a group that a file denies access to
    /// (CVE-2022-36109).
    pub(crate) additional_gids: Vec<u32>,
}

/// The image's account files, as far as they exist.
#[derive(Debug, Default)]
pub(crate) struct Accounts {
    passwd: String,
    group: String,
}

impl Accounts {
    /// Reads both below `root`, a directory that is treated as `/`.
    ///
    /// # Errors
    /// When one exists and cannot be read, or is nothing that should be.
    pub(crate) fn read(root: BorrowedFd<'_>) -> Result<Self, Error> {
        Ok(Self { passwd: read(root, "etc/passwd")?, group: read(root, "etc/group")? })
    }

    /// Resolves `user[:group]`.
    ///
    /// # Errors
    /// [`Error`] names what could not be found.
    pub(crate) fn resolve(&self, user: &str) -> Result<User, Error> {
        let (name, group) = user.split_once(':').unwrap_or((user, ""));
        if name.is_empty() && group.is_empty() {
            return Err(Error::Empty(user.to_owned()));
        }
        // `:group` is the group alone, for root.
        let name = if name.is_empty() { "0" } else { name };
        let number = id(name)?;
        let entry = self.users().find(|entry| match number {
            Some(uid) => entry.uid == uid,
            None => entry.name == name,
        });
        let (uid, gid) = match (&entry, number) {
            (Some(entry), _) => (entry.uid, entry.gid),
            (None, Some(uid)) => (uid, 0),
            (None, None) => return Err(Error::NoUser(name.to_owned())),
        };
        if group.is_empty() {
            let memberships = entry.map_or_else(Vec::new, |entry| self.memberships(entry.name));
            let others = memberships.into_iter().filter(|&other| other != gid);
            return Ok(User { uid, gid, additional_gids: std::iter::once(gid).chain(others).collect() });
        }
        let gid = self.gid(group)?;
        Ok(User { uid, gid, additional_gids: vec![gid] })
    }

    /// The home directory of a user id.
    pub(crate) fn home(&self, uid: u32) -> Option<&str> {
        self.users().find(|entry| entry.uid == uid).map(|entry| entry.home).filter(|home| !home.is_empty())
    }

    fn gid(&self, group: &str) -> Result<u32, Error> {
        if let Some(number) = id(group)? {
            return Ok(number);
        }
        let found = self.groups().find(|&(name, ..)| name == group);
        found.map(|(_, gid, _)| gid).ok_or_else(|| Error::NoGroup(group.to_owned()))
    }

    fn memberships(&self, user: &str) -> Vec<u32> {
        let lists = |members: &str| members.split(',').any(|member| member == user);
        self.groups()
            .filter(|&(.., members)| lists(members))
            .map(|(_, gid, _)| gid)
            .take(GROUPS_MAX)
            .collect()
    }

    fn users(&self) -> impl Iterator<Item = Entry<'_>> {
        self.passwd.lines().filter_map(|line| {
            let mut fields = line.trim().split(':');
            let name = fields.next().filter(|name| !name.is_empty())?;
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            Some(Entry { name, uid, gid, home: fields.nth(1).unwrap_or("") })
        })
    }

    fn groups(&self) -> impl Iterator<Item = (&str, u32, &str)> {
        self.group.lines().filter_map(|line| {
            let mut fields = line.trim().split(':');
            let name = fields.next().filter(|name| !name.is_empty())?;
            Some((name, fields.nth(1)?.parse().ok()?, fields.next().unwrap_or("")))
        })
    }
}

struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// A name that is all digits is always a number.
fn id(name: &str) -> Result<Option<u32>, Error> {
    if !name.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    match name.parse() {
        Ok(id) if id <= ID_MAX => Ok(Some(id)),
        _ => Err(Error::Range(name.to_owned())),
    }
}

/// A file of the image; one that is missing is empty.
fn read(root: BorrowedFd<'_>, path: &'static str) -> Result<String, Error> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = match openat2(root, path, flags, Mode::empty(), resolve) {
        Ok(file) => File::from(file),
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(String::new()),
        Err(error) => return Err(Error::Read(path, error.into())),
    };
    let metadata = file.metadata().map_err(|error| Error::Read(path, error))?;
    if !metadata.is_file() || metadata.len() > FILE_MAX {
        return Err(Error::File(path));
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(|error| Error::Read(path, error))?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(Error::File(path));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;

    fn accounts() -> Accounts {
        Accounts {
            passwd:
                "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/var/www:\nodd:x:no:1::/:\n100:x:200:200::/h:"
                    .into(),
            group: "root:x:0:\nweb:x:33:\nlog:x:4:web,bob\ntape:x:26:web".into(),
        }
    }

    fn user(uid: u32, gid: u32, additional: &[u32]) -> User {
        User { uid, gid, additional_gids: additional.to_vec() }
    }

    #[test]
    fn names_and_numbers_are_resolved_as_docker_does() {
        let accounts = accounts();
        assert_eq!(accounts.resolve("web").unwrap(), user(33, 33, &[33, 4, 26]));
        assert_eq!(accounts.resolve("33").unwrap(), user(33, 33, &[33, 4, 26]));
        assert_eq!(accounts.resolve("web:log").unwrap(), user(33, 4, &[4]));
        assert_eq!(accounts.resolve("web:777").unwrap(), user(33, 777, &[777]));
        assert_eq!(accounts.resolve("4711").unwrap(), user(4711, 0, &[0]));
        assert_eq!(accounts.resolve("4711:log").unwrap(), user(4711, 4, &[4]));
        assert_eq!(accounts.resolve(":log").unwrap(), user(0, 4, &[4]));
        assert_eq!(accounts.resolve("100").unwrap(), user(100, 0, &[0]), "a number is never a name");
    }

    #[test]
    fn what_is_not_found_is_named() {
        let accounts = accounts();
        assert!(accounts.resolve("bob").unwrap_err().to_string().contains("user bob"));
        assert!(
            accounts.resolve("odd").unwrap_err().to_string().contains("user odd"),
            "its uid is no number"
        );
        assert!(accounts.resolve("web:nobody").unwrap_err().to_string().contains("group nobody"));
        assert!(accounts.resolve("4294967296").unwrap_err().to_string().contains("4294967296"));
        assert!(accounts.resolve(":").is_err());
    }

    #[test]
    fn homes_are_those_of_the_uid() {
        assert_eq!(accounts().home(33), Some("/var/www"));
        assert_eq!(accounts().home(34), None);
    }

    #[test]
    fn links_are_followed_within_the_root_only() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("etc")).unwrap();
        std::fs::create_dir(directory.path().join("usr")).unwrap();
        symlink("/usr/passwd", directory.path().join("etc/passwd")).unwrap();
        symlink("../../../../../../../etc/group", directory.path().join("etc/group")).unwrap();
        std::fs::write(directory.path().join("usr/passwd"), "inside:x:7:7::/:").unwrap();
        let root = File::open(directory.path()).unwrap();
        // etc/group is a link to itself within this root, so it is a loop rather than the host's file.
        assert!(matches!(Accounts::read(root.as_fd()), Err(Error::Read("etc/group", _))));
        std::fs::remove_file(directory.path().join("etc/group")).unwrap();
        assert_eq!(Accounts::read(root.as_fd()).unwrap().resolve("inside").unwrap().uid, 7);
    }

    #[test]
    fn a_device_is_no_passwd_file() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(directory.path().join("etc/passwd")).unwrap();
        let root = File::open(directory.path()).unwrap();
        assert!(matches!(Accounts::read(root.as_fd()), Err(Error::File("etc/passwd"))));
    }

    proptest! {
        #[test]
        fn any_files_and_any_user_are_resolved_or_refused(passwd in ".{0,200}", group in ".{0,200}", user in ".{0,30}") {
            if let Ok(user) = (Accounts { passwd, group }).resolve(&user) {
                prop_assert!(user.additional_gids.len() <= GROUPS_MAX);
            }
        }
    }
}
