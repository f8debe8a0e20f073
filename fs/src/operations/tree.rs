//! The tree of names: making, removing, renaming and linking. Who makes something looks at it, too: a directory of a network file system may
//! be closed to root.

use std::ffi::CStr;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, RenameFlags, linkat, mkdirat, mknodat, renameat_with, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::Result;
use super::inode::write_entry;
use crate::attributes::{Attributes, decode_device};
use crate::host::open_in;
use crate::name::Name;
use crate::session::{At, Session};
use crate::wire::{InHeader, Reader, Writer};

/// The reply that tells of what has just been made.
fn made(session: &mut Session, at: &At, name: Name<'_>) -> Result<Writer> {
    let found = Attributes::at(&*at.descriptor, name.as_c_str())?;
    let mut reply = Writer::reply();
    write_entry(session, at, name.as_c_str(), &found, &mut reply)?;
    Ok(reply)
}

/// MKDIR
pub(super) fn make_directory(
    session: &mut Session,
    header: &InHeader,
    mut body: Reader<'_>,
) -> Result<Writer> {
    let (mode, mask, name) = (body.u32()?, body.u32()?, body.name()?);
    let at = session.at_for_change(header.node)?;
    let _assumed = session.identities.assume(header.uid, header.gid, mask)?;
    mkdirat(&*at.descriptor, name.as_c_str(), Mode::from_raw_mode(mode & 0o7777))?;
    made(session, &at, name)
}

/// MKNOD
pub(super) fn make_node(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let (mode, device, mask, _) = (body.u32()?, body.u32()?, body.u32()?, body.u32()?);
    let name = body.name()?;
    let kind = FileType::from_raw_mode(mode);
    match kind {
        FileType::RegularFile
        | FileType::Fifo
        | FileType::Socket
        | FileType::CharacterDevice
        | FileType::BlockDevice => {}
        _ => return Err(Errno::INVAL),
    }
    let at = session.at_for_change(header.node)?;
    let _assumed = session.identities.assume(header.uid, header.gid, mask)?;
    let mode = Mode::from_raw_mode(mode & 0o7777);
    mknodat(&*at.descriptor, name.as_c_str(), kind, mode, decode_device(device))?;
    made(session, &at, name)
}

/// SYMLINK. The server never follows it, so it may lead anywhere.
pub(super) fn make_symlink(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let (name, target) = (body.name()?, body.text()?);
    let at = session.at_for_change(header.node)?;
    let _assumed = session.identities.assume(header.uid, header.gid, 0)?;
    symlinkat(target, &*at.descriptor, name.as_c_str())?;
    made(session, &at, name)
}

/// UNLINK
pub(super) fn unlink(session: &mut Session, header: &InHeader, body: Reader<'_>) -> Result<Writer> {
    remove(session, header, body, AtFlags::empty())
}

/// RMDIR
pub(super) fn remove_directory(session: &mut Session, header: &InHeader, body: Reader<'_>) -> Result<Writer> {
    remove(session, header, body, AtFlags::REMOVEDIR)
}

fn remove(session: &mut Session, header: &InHeader, mut body: Reader<'_>, flags: AtFlags) -> Result<Writer> {
    let name = body.name()?;
    let at = session.at_for_change(header.node)?;
    pin_known(session, &at, name.as_c_str());
    unlinkat(&*at.descriptor, name.as_c_str(), flags)?;
    Ok(Writer::reply())
}

/// A name is about to go. If the guest knows the file, its descriptor is kept, since the guest may have it open. When that does not
/// succeed, the file will be stale, as if somebody else had removed it.
fn pin_known(session: &mut Session, at: &At, name: &CStr) {
    let Ok(found) = Attributes::at(&*at.descriptor, name) else { return };
    let Some(id) = session.nodes.find(at.share, found.identity()) else { return };
    let Ok(known) = session.nodes.get(id) else { return };
    if known.parent != at.node || *known.name != *name {
        return;
    }
    if known.slot.is_none() {
        let Ok(opened) = open_in(&*at.descriptor, name, rustix::fs::OFlags::PATH, 0) else { return };
        if Attributes::of(&opened).is_ok_and(|opened| opened.identity() == found.identity()) {
            session.keep(id, Arc::new(opened));
        }
    }
    if let Some(slot) = session.nodes.get(id).ok().and_then(|known| known.slot) {
        session.nodes.descriptors.pin(slot);
    }
}

/// RENAME
pub(super) fn rename(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let directory = body.u64()?;
    rename_to(session, header, directory, RenameFlags::empty(), body)
}

/// RENAME2
pub(super) fn rename_with_flags(
    session: &mut Session,
    header: &InHeader,
    mut body: Reader<'_>,
) -> Result<Writer> {
    let (directory, flags, _) = (body.u64()?, body.u32()?, body.u32()?);
    let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
    rename_to(session, header, directory, flags, body)
}

fn rename_to(
    session: &mut Session,
    header: &InHeader,
    directory: u64,
    flags: RenameFlags,
    mut body: Reader<'_>,
) -> Result<Writer> {
    let (old_name, new_name) = (body.name()?, body.name()?);
    let old = session.at_for_change(header.node)?;
    let new = session.at_for_change(directory)?;
    if old.share != new.share {
        return Err(Errno::XDEV);
    }
    // A whiteout that it leaves is the guest's as well.
    let _assumed = session.identities.assume(header.uid, header.gid, 0)?;
    if !flags.intersects(RenameFlags::EXCHANGE | RenameFlags::NOREPLACE) {
        pin_known(session, &new, new_name.as_c_str());
    }
    renameat_with(&*old.descriptor, old_name.as_c_str(), &*new.descriptor, new_name.as_c_str(), flags)?;
    follow(session, &new, new_name.as_c_str());
    if flags.contains(RenameFlags::EXCHANGE) {
        follow(session, &old, old_name.as_c_str());
    }
    Ok(Writer::reply())
}

/// What the guest knows has come to another place.
fn follow(session: &mut Session, at: &At, name: &CStr) {
    if let Ok(found) = Attributes::at(&*at.descriptor, name)
        && let Some(id) = session.nodes.find(at.share, found.identity())
    {
        session.nodes.moved(id, at.node, name);
    }
}

/// LINK
pub(super) fn link(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let (old, name) = (body.u64()?, body.name()?);
    let at = session.at_for_change(header.node)?;
    let old = session.at_for_change(old)?;
    if old.share != at.share {
        return Err(Errno::XDEV);
    }
    // Through the descriptor: what is linked is the node, whatever has its name by now.
    let path = session.own.path(&*old.descriptor);
    linkat(CWD, path.as_c_str(), &*at.descriptor, name.as_c_str(), AtFlags::SYMLINK_FOLLOW)?;
    made(session, &at, name)
}
