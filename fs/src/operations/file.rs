//! Regular files: opening and creating them for the VMM, and what is done to them when they are open.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FallocateFlags, FileType, OFlags, SeekFrom, seek as lseek};
use rustix::io::Errno;

use super::Result;
use super::inode::write_entry;
use crate::attributes::Attributes;
use crate::control::ShareKind;
use crate::handles::Open;
use crate::host::{FileSystem, open_in};
use crate::nodes::ROOT;
use crate::session::{At, Passed, Session};
use crate::wire::{
    FOPEN_KEEP_CACHE, FOPEN_NOFLUSH, FSYNC_FDATASYNC, InHeader, OPEN_KILL_SUIDGID, Reader, Writer,
};
use crate::worker::Work;

/// How a file is opened. O_DIRECT is dropped, since the guest's buffers are not aligned as the host's disk wants it.
const OPEN_FLAGS: OFlags =
    OFlags::ACCMODE.union(OFlags::APPEND).union(OFlags::TRUNC).union(OFlags::DSYNC).union(OFlags::SYNC);

/// Bytes that one COPY_FILE_RANGE copies at most. The rest of a longer one is asked for again, and others get their turn before.
const COPY_MAX: u64 = 16 << 20;

/// What is asked for by OPEN or CREATE.
#[derive(Clone, Copy)]
struct Wanted {
    flags: OFlags,
    exclusive: bool,
    /// Set-id bits go with the content.
    clear_set_id: bool,
}

impl Wanted {
    fn new(flags: u32, open_flags: u32) -> Self {
        let all = OFlags::from_bits_retain(flags);
        Self {
            flags: all & OPEN_FLAGS,
            exclusive: all.contains(OFlags::EXCL),
            clear_set_id: all.contains(OFlags::TRUNC) && open_flags & OPEN_KILL_SUIDGID != 0,
        }
    }

    fn access(self) -> Result<OFlags> {
        match self.flags & OFlags::ACCMODE {
            access if access == OFlags::ACCMODE => Err(Errno::INVAL),
            access => Ok(access),
        }
    }

    /// What is opened can be written to.
    fn writes(self) -> bool {
        self.flags.intersects(OFlags::ACCMODE)
    }

    /// And read.
    fn reads_and_writes(self) -> bool {
        self.flags & OFlags::ACCMODE == OFlags::RDWR
    }

    fn changes(self) -> Result<bool> {
        Ok(self.access()? != OFlags::RDONLY || self.flags.contains(OFlags::TRUNC))
    }
}

/// OPEN
pub(super) fn open(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let wanted = Wanted::new(body.u32()?, body.u32()?);
    if header.node == ROOT {
        return Err(Errno::ISDIR);
    }
    session.handles.check_room()?;
    let (file, at) = open_node(session, header.node, wanted)?;
    let mut reply = Writer::reply();
    pass(session, &at, header.node, file, wanted, &mut reply);
    Ok(reply)
}

/// Opens a node, which must be a regular file: nothing else does nothing when it is opened.
fn open_node(session: &mut Session, node: u64, wanted: Wanted) -> Result<(OwnedFd, At)> {
    match session.nodes.get(node)?.kind {
        FileType::RegularFile => {}
        FileType::Directory => return Err(Errno::ISDIR),
        FileType::Symlink => return Err(Errno::LOOP),
        _ => return Err(Errno::INVAL),
    }
    if wanted.changes()? {
        session.check_writable(node)?;
    }
    let at = session.at(node)?;
    let file = session.own.reopen(&*at.descriptor, wanted.flags)?;
    if wanted.clear_set_id {
        session.own.clear_set_id(&file)?;
    }
    Ok((file, at))
}

/// `fuse_open_out`, and the file that goes with it. It was found at its own node, or made in a directory.
fn pass(session: &mut Session, at: &At, node: u64, file: OwnedFd, wanted: Wanted, to: &mut Writer) {
    let file = Arc::new(file);
    let handle = session.handles.insert(node, at.share, Open::File(Arc::clone(&file)));
    let cache = match at.kind {
        ShareKind::Root => FOPEN_KEEP_CACHE,
        ShareKind::Bind if is_unchanged(session, node, &file) => FOPEN_KEEP_CACHE,
        ShareKind::Bind => 0,
    };
    // What failed to be written of a mapping is told by close(2) as well, by the guest's kernel, and a mapping is written by way of a file
    // that may be read, too.
    let tells = wanted.reads_and_writes() || at.file_system == FileSystem::Remote && wanted.writes();
    let flush = if tells { 0 } else { FOPEN_NOFLUSH };
    to.u64(handle).u32(cache | flush).u32(0);
    session.passed = Some(Passed { file, handle, node, is_new: node != at.node });
}

/// True when nobody has changed a file since the guest opened it last. What others do to it from now on, the guest learns from its time of
/// modification.
fn is_unchanged(session: &mut Session, node: u64, file: &OwnedFd) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let content = Attributes::of(file).ok().and_then(|attributes| attributes.content(now));
    let Some(node) = session.nodes.get_mut(node) else { return false };
    let unchanged = content.is_some() && node.content.as_deref() == content.as_ref();
    node.content = content.map(Box::new);
    unchanged
}

/// CREATE. What somebody else has made since the guest looked is stale news, unless it asked for a file of its own: the guest's kernel then
/// looks again, and decides who may open what is there.
pub(super) fn create(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let (flags, mode, mask, open_flags) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
    let (wanted, name) = (Wanted::new(flags, open_flags), body.name()?);
    wanted.access()?;
    let at = session.at_for_change(header.node)?;
    session.handles.check_room()?;
    let created = {
        let _assumed = session.identities.assume(header.uid, header.gid, mask)?;
        let flags = wanted.flags | OFlags::CREATE | OFlags::EXCL | OFlags::NONBLOCK;
        open_in(&*at.descriptor, name.as_c_str(), flags, mode)
    };
    match created {
        Ok(file) => {
            let found = Attributes::of(&file)?;
            let mut reply = Writer::reply();
            let node = write_entry(session, &at, name.as_c_str(), &found, &mut reply)?;
            pass(session, &at, node, file, wanted, &mut reply);
            Ok(reply)
        }
        Err(Errno::EXIST) if !wanted.exclusive => Err(Errno::STALE),
        Err(errno) => Err(errno),
    }
}

/// TMPFILE: a file without a name, in the file system of a directory. LINK may give it one.
pub(super) fn create_unnamed(
    session: &mut Session,
    header: &InHeader,
    mut body: Reader<'_>,
) -> Result<Writer> {
    let (flags, mode, mask, open_flags) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
    let wanted = Wanted::new(flags, open_flags);
    wanted.access()?;
    let at = session.at_for_change(header.node)?;
    session.handles.check_room()?;
    let file = {
        let _assumed = session.identities.assume(header.uid, header.gid, mask)?;
        let exclusive = if wanted.exclusive { OFlags::EXCL } else { OFlags::empty() };
        let flags = wanted.flags.difference(OFlags::TRUNC) | OFlags::TMPFILE | exclusive;
        open_in(&*at.descriptor, c".", flags, mode)?
    };
    let found = Attributes::of(&file)?;
    let descriptor = session.own.reopen(&file, OFlags::PATH)?;
    let mut reply = Writer::reply();
    let node = write_entry(session, &at, c"", &found, &mut reply)?;
    session.keep(node, Arc::new(descriptor));
    if let Some(slot) = session.nodes.get(node)?.slot {
        session.nodes.descriptors.pin(slot);
    }
    pass(session, &at, node, file, wanted, &mut reply);
    Ok(reply)
}

/// RELEASE and RELEASEDIR
pub(super) fn release(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let handle = body.u64()?;
    session.handles.get(handle, header.node)?;
    session.handles.remove(handle, header.node);
    session.read_ahead.remove(handle);
    Ok(Writer::reply())
}

/// FSYNC
pub(super) fn sync(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let (handle, flags) = (body.u64()?, body.u32()?);
    let file = session.handles.file(handle, header.node)?;
    session.work = Some(Work::Sync(file, flags & FSYNC_FDATASYNC != 0));
    Ok(Writer::reply())
}

/// FALLOCATE
pub(super) fn allocate(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let (handle, offset, length, mode) = (body.u64()?, body.u64()?, body.u64()?, body.u32()?);
    let allowed = FallocateFlags::KEEP_SIZE | FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE;
    let mode = FallocateFlags::from_bits(mode).filter(|mode| allowed.contains(*mode));
    let mode = mode.ok_or(Errno::OPNOTSUPP)?;
    session.check_writable(header.node)?;
    let file = session.handles.file(handle, header.node)?;
    session.work = Some(Work::Allocate { file, mode, offset, length, own: session.own });
    Ok(Writer::reply())
}

/// LSEEK, which is for what only the host knows: where data is. The file's own position is nobody's.
pub(super) fn seek(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let (handle, offset, whence) = (body.u64()?, body.u64()?, body.u32()?);
    let to = match i32::try_from(whence) {
        Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
        Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
        _ => return Err(Errno::INVAL),
    };
    let file = session.handles.file(handle, header.node)?;
    let found = lseek(&*file, to)?;
    let mut reply = Writer::reply();
    reply.u64(found);
    Ok(reply)
}

/// COPY_FILE_RANGE
pub(super) fn copy_range(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let (from_handle, from_offset) = (body.u64()?, body.u64()?);
    let (to_node, to_handle, to_offset) = (body.u64()?, body.u64()?, body.u64()?);
    let (length, flags) = (body.u64()?, body.u64()?);
    if flags != 0 {
        return Err(Errno::INVAL);
    }
    session.check_writable(to_node)?;
    let from = session.handles.file(from_handle, header.node)?;
    let to = session.handles.file(to_handle, to_node)?;
    let length = usize::try_from(length.min(COPY_MAX)).map_err(|_| Errno::INVAL)?;
    let (from, to) = ((from, from_offset), (to, to_offset));
    session.work = Some(Work::Copy { from, to, length, own: session.own });
    Ok(Writer::reply())
}
