//! Extended attributes.

use std::ffi::CStr;

use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};
use rustix::io::Errno;

use super::Result;
use crate::attributes::Attributes;
use crate::nodes::ROOT;
use crate::session::Session;
use crate::wire::{InHeader, Reader, SETXATTR_ACL_KILL_SGID, Writer};

/// Bytes of a value or of a list of names: Linux's XATTR_SIZE_MAX and XATTR_LIST_MAX.
const MAX: usize = 64 << 10;

/// Bytes of a name: Linux's XATTR_NAME_MAX.
const NAME_MAX: usize = 255;

/// What the guest may see and set. What is not among it is the host's: labels of its security module, for example. `trusted.` takes
/// a capability that the server has not, which the kernel says.
fn is_allowed(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || name.starts_with(b"trusted.")
        || matches!(name, b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default")
}

fn check(name: &CStr) -> Result<()> {
    match name.to_bytes() {
        name if name.len() > NAME_MAX => Err(Errno::RANGE),
        name if is_allowed(name) => Ok(()),
        _ => Err(Errno::OPNOTSUPP),
    }
}

/// A value or list, or only its length if no room was offered.
fn give(value: &[u8], room: u32) -> Result<Writer> {
    let mut reply = Writer::reply();
    if room == 0 {
        reply.u32(u32::try_from(value.len()).map_err(|_| Errno::TOOBIG)?).u32(0);
    } else if value.len() > room as usize {
        return Err(Errno::RANGE);
    } else {
        reply.bytes(value);
    }
    Ok(reply)
}

/// GETXATTR
pub(super) fn get(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let (room, _, name) = (body.u32()?, body.u32()?, body.text()?);
    check(name)?;
    if header.node == ROOT {
        return Err(Errno::NODATA);
    }
    let at = session.at(header.node)?;
    let path = session.own.path(&*at.descriptor);
    let mut value = vec![0; if room == 0 { MAX } else { MAX.min(room as usize) }];
    let length = getxattr(path.as_c_str(), name, &mut value[..])?;
    give(value.get(..length).ok_or(Errno::IO)?, room)
}

/// LISTXATTR
pub(super) fn list(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let (room, _) = (body.u32()?, body.u32()?);
    if header.node == ROOT {
        return give(&[], room);
    }
    let at = session.at(header.node)?;
    let path = session.own.path(&*at.descriptor);
    let mut names = vec![0; MAX];
    let length = listxattr(path.as_c_str(), &mut names[..])?;
    let names = names.get(..length).ok_or(Errno::IO)?;
    let allowed = names.split_inclusive(|byte| *byte == 0).filter(|name| {
        let name = name.strip_suffix(&[0]).unwrap_or(name);
        is_allowed(name)
    });
    give(&allowed.flatten().copied().collect::<Vec<_>>(), room)
}

/// SETXATTR
pub(super) fn set(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let (size, flags) = (body.u32()? as usize, body.u32()?);
    let more = if session.features.setxattr_ext { body.u64()? } else { 0 };
    let name = body.text()?;
    let value = body.bytes(size)?;
    check(name)?;
    if size > MAX {
        return Err(Errno::TOOBIG);
    }
    let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
    let at = session.at_for_change(header.node)?;
    let path = session.own.path(&*at.descriptor);
    setxattr(path.as_c_str(), name, value, flags)?;
    // The kernel spares those with CAP_FSETID.
    if more & u64::from(SETXATTR_ACL_KILL_SGID) != 0 {
        let mode = Attributes::of(&*at.descriptor)?.mode();
        if mode & libc::S_ISGID != 0 {
            session.own.chmod(&*at.descriptor, mode & !libc::S_ISGID)?;
        }
    }
    Ok(Writer::reply())
}

/// REMOVEXATTR
pub(super) fn remove(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let name = body.text()?;
    check(name)?;
    let at = session.at_for_change(header.node)?;
    let path = session.own.path(&*at.descriptor);
    removexattr(path.as_c_str(), name)?;
    Ok(Writer::reply())
}
