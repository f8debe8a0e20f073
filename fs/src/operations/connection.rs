//! What concerns the whole connection or a file system of the host: INIT, STATFS, SYNCFS.

use std::collections::BTreeSet;
use std::sync::Arc;

use rustix::fs::{FileType, fstatvfs};
use rustix::io::Errno;

use super::Result;
use crate::attributes::Attributes;
use crate::name::NAME_MAX;
use crate::nodes::ROOT;
use crate::session::{Features, Session};
use crate::wire::{InHeader, MAJOR, MINOR, MINOR_MIN, Reader, Writer, init};
use crate::worker::Work;

/// What of FUSE the server uses, if the guest's driver knows it. READDIRPLUS_AUTO is not among it: a walk through a tree asks for the
/// attributes of all that it sees. Nor is WRITEBACK_CACHE, since others write as well.
const FLAGS: u32 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::DONT_MASK
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::PARALLEL_DIROPS
    | init::POSIX_ACL
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::SUBMOUNTS
    | init::HANDLE_KILLPRIV_V2
    | init::SETXATTR_EXT
    | init::INIT_EXT;

/// Bytes that a WRITE moves at most, and pages that it has then.
const MAX_WRITE: u32 = 1 << 20;
const MAX_PAGES: u16 = 256;

/// Requests that the guest's kernel makes on its own account at a time, and from when on it waits with more.
const MAX_BACKGROUND: u16 = 64;
const CONGESTION: u16 = 48;

/// INIT: settles the version and what is used of it.
pub(super) fn init(session: &mut Session, _: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let (major, minor) = (body.u32()?, body.u32()?);
    let mut reply = Writer::reply();
    if major > MAJOR {
        // The driver asks again, in our version.
        reply.u32(MAJOR).u32(MINOR).zeros(56);
        return Ok(reply);
    }
    if major < MAJOR || minor < MINOR_MIN {
        return Err(Errno::PROTO);
    }
    let (max_readahead, flags) = (body.u32()?, body.u32()? & FLAGS);
    session.features =
        Features { setxattr_ext: flags & init::SETXATTR_EXT != 0, submounts: flags & init::SUBMOUNTS != 0 };
    reply.u32(MAJOR).u32(MINOR.min(minor)).u32(max_readahead).u32(flags);
    reply.u16(MAX_BACKGROUND).u16(CONGESTION).u32(MAX_WRITE);
    // Times are exact to the nanosecond.
    reply.u32(1).u16(MAX_PAGES).u16(0).zeros(32);
    Ok(reply)
}

/// STATFS: the file system that a node is on.
pub(super) fn stat_file_system(session: &mut Session, header: &InHeader, _: Reader<'_>) -> Result<Writer> {
    let mut reply = Writer::reply();
    if header.node == ROOT {
        reply.zeros(40).u32(4096).u32(u32::try_from(NAME_MAX).expect("255")).u32(4096).zeros(28);
        return Ok(reply);
    }
    let at = session.at(header.node)?;
    let stat = fstatvfs(&at.descriptor)?;
    let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    reply.u64(stat.f_blocks).u64(stat.f_bfree).u64(stat.f_bavail).u64(stat.f_files).u64(stat.f_ffree);
    reply.u32(narrow(stat.f_bsize)).u32(narrow(stat.f_namemax)).u32(narrow(stat.f_frsize)).zeros(28);
    Ok(reply)
}

/// SYNCFS: the file systems of all shares, or of a submount.
pub(super) fn sync_file_system(session: &mut Session, header: &InHeader, _: Reader<'_>) -> Result<Writer> {
    // What else there is has no file system that could be written out by it.
    let is_opened = |kind| matches!(kind, FileType::Directory | FileType::RegularFile);
    let mut files = Vec::new();
    if header.node == ROOT {
        let (mut done, mut share) = (BTreeSet::new(), 0);
        while let Some((next, found)) = session.shares.after(share) {
            share = next;
            let attributes = Attributes::of(&*found.root)?;
            if !found.read_only && is_opened(attributes.kind()) && done.insert(attributes.device()) {
                files.push(Arc::clone(&found.root));
            }
        }
    } else {
        let at = session.at(header.node)?;
        if is_opened(at.file_type) {
            files.push(at.descriptor);
        }
    }
    session.work = Some(Work::SyncFileSystems(files, session.own));
    Ok(Writer::reply())
}
