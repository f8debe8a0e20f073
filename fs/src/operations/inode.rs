//! Nodes: LOOKUP, FORGET, attributes, READLINK.

use std::ffi::CStr;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, Gid, OFlags, Timespec, Timestamps, Uid, chownat, ftruncate, readlinkat, utimensat,
};
use rustix::io::Errno;

use super::Result;
use crate::attributes::{Attributes, write_root, write_timeouts};
use crate::handles::Open;
use crate::host::{FileSystem, open_in};
use crate::nodes::ROOT;
use crate::session::{At, Session};
use crate::wire::{ATTR_SUBMOUNT, GETATTR_FH, InHeader, Reader, Writer, fattr, opcode};

/// `UTIME_NOW` and `UTIME_OMIT`, which a guest gives in other ways.
const NOW: i64 = (1 << 30) - 1;
const OMIT: i64 = (1 << 30) - 2;

/// LOOKUP: a name in a directory becomes a node.
pub(super) fn lookup(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let name = body.name()?;
    let mut reply = Writer::reply();
    if header.node == ROOT {
        let share = session.shares.by_name(name.as_bytes()).ok_or(Errno::NOENT)?;
        write_share(session, share, &mut reply)?;
        return Ok(reply);
    }
    let at = session.at(header.node)?;
    match Attributes::at(&*at.descriptor, name.as_c_str()) {
        Ok(found) => drop(write_entry(session, &at, name.as_c_str(), &found, &mut reply)?),
        Err(Errno::NOENT) => {
            // No node, and for how long there is none.
            let timeout = at.kind.negative_timeout().ok_or(Errno::NOENT)?;
            reply.zeros(16);
            write_timeouts(&mut reply, timeout, timeout);
            reply.zeros(88);
        }
        Err(errno) => return Err(errno),
    }
    Ok(reply)
}

/// Has the guest know what was found in a directory: `fuse_entry_out`. Gives the node. What the host's kernel says of itself, which may be
/// mounted below a share, is there to be passed over or covered, but closed.
pub(super) fn write_entry(
    session: &mut Session,
    at: &At,
    name: &CStr,
    found: &Attributes,
    to: &mut Writer,
) -> Result<u64> {
    let mounted = if found.identity().mount == at.identity.mount {
        None
    } else {
        Some(FileSystem::of(open_in(&*at.descriptor, name, OFlags::PATH, 0)?)?)
    };
    let id = session.nodes.enter(at.share, at.node, name, found)?;
    if let Some(file_system) = mounted
        && let Some(node) = session.nodes.get_mut(id)
    {
        node.file_system = file_system;
    }
    let flags = submount(session, found, at.identity.device);
    to.u64(id).u64(0);
    write_timeouts(to, at.kind.timeout(), at.kind.timeout());
    found.write(to, flags);
    Ok(id)
}

/// The same, of a share in the root directory. Its name must be looked up each time, since it may be gone or another's.
pub(super) fn write_share(session: &mut Session, id: u64, to: &mut Writer) -> Result<Attributes> {
    let share = session.shares.get(id)?;
    let (found, kind, file_system) = (Attributes::of(&*share.root)?, share.kind, share.file_system);
    let name = std::ffi::CString::new(share.name.as_bytes()).map_err(|_| Errno::INVAL)?;
    let node = session.nodes.enter(id, ROOT, &name, &found)?;
    if let Some(known) = session.nodes.get_mut(node) {
        known.file_system = file_system;
    }
    let flags = submount(session, &found, 0);
    to.u64(node).u64(0);
    write_timeouts(to, std::time::Duration::ZERO, kind.timeout());
    found.write(to, flags);
    Ok(found)
}

/// Directories on another file system than their parent get a device number of their own in the guest as well.
fn submount(session: &Session, found: &Attributes, parent: u64) -> u32 {
    let is = session.features.submounts && found.kind() == FileType::Directory && found.device() != parent;
    if is { ATTR_SUBMOUNT } else { 0 }
}

/// FORGET and BATCH_FORGET, which have no reply.
pub(crate) fn forget(session: &mut Session, header: &InHeader, mut body: Reader<'_>) {
    if header.opcode == opcode::FORGET {
        if let Ok(lookups) = body.u64() {
            session.nodes.forget(header.node, lookups);
        }
        return;
    }
    // The number of them, which their length tells as well.
    let _ = body.u64();
    while let (Ok(node), Ok(lookups)) = (body.u64(), body.u64()) {
        session.nodes.forget(node, lookups);
    }
}

/// GETATTR
pub(super) fn get_attributes(
    session: &mut Session,
    header: &InHeader,
    mut body: Reader<'_>,
) -> Result<Writer> {
    let (flags, _, handle) = (body.u32()?, body.u32()?, body.u64()?);
    let mut reply = Writer::reply();
    if header.node == ROOT {
        write_timeouts_of_attributes(&mut reply, std::time::Duration::ZERO);
        write_root(&mut reply);
        return Ok(reply);
    }
    let found = if flags & GETATTR_FH != 0
        && let Ok(file) = session.handles.file(handle, header.node)
    {
        Attributes::of(&*file)?
    } else {
        session.attributes(header.node)?
    };
    write_attributes(session, header.node, &found)
}

/// `fuse_attr_out`
fn write_attributes(session: &mut Session, node: u64, found: &Attributes) -> Result<Writer> {
    let known = session.nodes.get(node)?;
    let (share, parent) = (session.shares.get(known.share)?, known.parent);
    let parent = session.nodes.get(parent).map_or(0, |parent| parent.identity.device);
    let mut reply = Writer::reply();
    write_timeouts_of_attributes(&mut reply, share.kind.timeout());
    found.write(&mut reply, submount(session, found, parent));
    Ok(reply)
}

fn write_timeouts_of_attributes(to: &mut Writer, timeout: std::time::Duration) {
    to.u64(timeout.as_secs()).u32(timeout.subsec_nanos()).u32(0);
}

/// `fuse_setattr_in`
struct SetAttributes {
    valid: u32,
    handle: u64,
    size: u64,
    times: Timestamps,
    mode: u32,
    uid: u32,
    gid: u32,
}

impl SetAttributes {
    fn parse(mut body: Reader<'_>) -> Result<Self> {
        let (valid, _, handle, size, _) = (body.u32()?, body.u32()?, body.u64()?, body.u64()?, body.u64()?);
        let (access, modification, _) = (body.u64()?, body.u64()?, body.u64()?);
        let (access_ns, modification_ns, _) = (body.u32()?, body.u32()?, body.u32()?);
        let (mode, _, uid, gid, _) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?, body.u32()?);
        let time = |set, now, seconds: u64, nanoseconds: u32| {
            let (tv_sec, tv_nsec) = match (valid & set != 0, valid & now != 0) {
                (false, _) => (0, OMIT),
                (true, true) => (0, NOW),
                (true, false) if nanoseconds < 1_000_000_000 => {
                    (seconds.cast_signed(), i64::from(nanoseconds))
                }
                (true, false) => return Err(Errno::INVAL),
            };
            Ok(Timespec { tv_sec, tv_nsec })
        };
        let times = Timestamps {
            last_access: time(fattr::ATIME, fattr::ATIME_NOW, access, access_ns)?,
            last_modification: time(fattr::MTIME, fattr::MTIME_NOW, modification, modification_ns)?,
        };
        Ok(Self { valid, handle, size, times, mode, uid, gid })
    }

    fn sets(&self, what: u32) -> bool {
        self.valid & what != 0
    }
}

/// SETATTR. The owner comes first, since a change of it takes set-id bits away.
pub(super) fn set_attributes(session: &mut Session, header: &InHeader, body: Reader<'_>) -> Result<Writer> {
    let wanted = SetAttributes::parse(body)?;
    session.check_writable(header.node)?;
    let open =
        if wanted.sets(fattr::FH) { Some(session.handles.get(wanted.handle, header.node)?) } else { None };
    // What is open can be changed even if it cannot be found any more.
    let (file, open) = match open {
        Some(Open::File(file)) => (Arc::clone(file), true),
        _ => (session.at(header.node)?.descriptor, false),
    };
    let file_type = session.nodes.get(header.node)?.kind;
    if wanted.sets(fattr::UID | fattr::GID) {
        let id = |set, id: u32| match (wanted.sets(set), id) {
            (false, _) => Ok(None),
            // To the kernel it means that nothing is to change.
            (true, u32::MAX) => Err(Errno::INVAL),
            (true, id) => Ok(Some(id)),
        };
        let uid = id(fattr::UID, wanted.uid)?.map(Uid::from_raw);
        let gid = id(fattr::GID, wanted.gid)?.map(Gid::from_raw);
        chownat(&*file, c"", uid, gid, AtFlags::EMPTY_PATH)?;
    }
    if wanted.sets(fattr::MODE) {
        session.own.chmod(&*file, wanted.mode)?;
    }
    if wanted.sets(fattr::SIZE) {
        match file_type {
            FileType::RegularFile if open => ftruncate(&*file, wanted.size)?,
            FileType::RegularFile => ftruncate(session.own.reopen(&*file, OFlags::WRONLY)?, wanted.size)?,
            FileType::Directory => return Err(Errno::ISDIR),
            _ => return Err(Errno::INVAL),
        }
        if wanted.sets(fattr::KILL_SUIDGID) {
            session.own.clear_set_id(&*file)?;
        }
    }
    if wanted.sets(fattr::ATIME | fattr::MTIME) {
        utimensat(&*file, c"", &wanted.times, AtFlags::EMPTY_PATH)?;
    }
    let found = Attributes::of(&*file)?;
    write_attributes(session, header.node, &found)
}

/// READLINK
pub(super) fn read_link(session: &mut Session, header: &InHeader, _: Reader<'_>) -> Result<Writer> {
    if header.node == ROOT || session.nodes.get(header.node)?.kind != FileType::Symlink {
        return Err(Errno::INVAL);
    }
    let at = session.at(header.node)?;
    let target = readlinkat(&*at.descriptor, c"", Vec::with_capacity(256))?;
    let mut reply = Writer::reply();
    reply.bytes(target.as_bytes());
    Ok(reply)
}
