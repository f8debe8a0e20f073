//! Directories: OPENDIR, READDIR, READDIRPLUS, FSYNCDIR.

use std::sync::Arc;

use rustix::fs::{FileType, OFlags, SeekFrom, seek};
use rustix::io::Errno;

use super::Result;
use super::inode::{write_entry, write_share};
use crate::attributes::Attributes;
use crate::directory::{Batch, Entry};
use crate::handles::Open;
use crate::host::open_in;
use crate::name::Name;
use crate::nodes::ROOT;
use crate::session::{At, REPLY_MAX, Session};
use crate::wire::{DIRENT, ENTRY_OUT, FSYNC_FDATASYNC, InHeader, OUT_HEADER, Reader, Writer};
use crate::worker::Work;

/// Cookies of `.` and `..` in the root directory; a share's is its id beyond them.
const DOTS: u64 = 2;

/// OPENDIR
pub(super) fn open(session: &mut Session, header: &InHeader, _: Reader<'_>) -> Result<Writer> {
    session.handles.check_room()?;
    let mut reply = Writer::reply();
    if header.node == ROOT {
        let handle = session.handles.insert(ROOT, 0, Open::Root);
        reply.u64(handle).u64(0);
        return Ok(reply);
    }
    let at = session.at(header.node)?;
    if at.file_type != FileType::Directory {
        return Err(Errno::NOTDIR);
    }
    let directory = open_in(&*at.descriptor, c".", OFlags::RDONLY | OFlags::DIRECTORY, 0)?;
    let open = Open::Directory(Arc::new(directory), 0);
    let handle = session.handles.insert(header.node, at.share, open);
    reply.u64(handle).u32(at.kind.open_directory_flags()).u32(0);
    Ok(reply)
}

/// FSYNCDIR
pub(super) fn sync(session: &mut Session, header: &InHeader, mut body: Reader<'_>) -> Result<Writer> {
    let (handle, flags) = (body.u64()?, body.u32()?);
    match session.handles.get(handle, header.node)? {
        Open::File(_) => return Err(Errno::BADF),
        Open::Root => {}
        Open::Directory(directory, _) => {
            session.work = Some(Work::Sync(Arc::clone(directory), flags & FSYNC_FDATASYNC != 0));
        }
    }
    Ok(Writer::reply())
}

/// READDIR
pub(super) fn read(session: &mut Session, header: &InHeader, body: Reader<'_>) -> Result<Writer> {
    list(session, header, body, Form::Plain)
}

/// READDIRPLUS
pub(super) fn read_plus(session: &mut Session, header: &InHeader, body: Reader<'_>) -> Result<Writer> {
    list(session, header, body, Form::Plus)
}

/// What an entry consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// `fuse_dirent`
    Plain,
    /// `fuse_direntplus`: it is looked up as well.
    Plus,
}

/// Entries, as many as there is room for.
struct Listing {
    form: Form,
    room: usize,
    reply: Writer,
}

fn list(session: &mut Session, header: &InHeader, mut body: Reader<'_>, form: Form) -> Result<Writer> {
    let (handle, offset, size) = (body.u64()?, body.u64()?, body.u32()?);
    let room = OUT_HEADER.saturating_add(size as usize).min(REPLY_MAX);
    let mut listing = Listing { form, room, reply: Writer::reply() };
    match session.handles.get(handle, header.node)?.clone() {
        Open::File(_) => return Err(Errno::NOTDIR),
        Open::Root => list_shares(session, offset, &mut listing)?,
        Open::Directory(directory, position) => {
            // The directory that is open, whether it can still be found or not.
            let at = session.at_open(header.node, &directory)?;
            let mut batch = match session.read_ahead.take(handle, offset) {
                Some(batch) => batch,
                None => read_batch(session, (handle, header.node), &directory, position, offset)?,
            };
            while !batch.is_empty() {
                if !listing.add_all(session, &at, &directory, &mut batch)? {
                    break;
                }
                let offset = batch.end();
                batch = read_batch(session, (handle, header.node), &directory, offset, offset)?;
            }
            session.read_ahead.keep(handle, batch);
        }
    }
    Ok(listing.reply)
}

/// What the kernel has from an offset on of the directory with this handle and node.
fn read_batch(
    session: &mut Session,
    (handle, node): (u64, u64),
    directory: &std::os::fd::OwnedFd,
    position: u64,
    offset: u64,
) -> Result<Batch> {
    if position != offset {
        if i64::try_from(offset).is_err() {
            return Err(Errno::INVAL);
        }
        seek(directory, SeekFrom::Start(offset))?;
        session.handles.set_position(handle, node, offset);
    }
    let batch = Batch::read(directory, offset)?;
    session.handles.set_position(handle, node, batch.end());
    Ok(batch)
}

fn list_shares(session: &mut Session, mut offset: u64, listing: &mut Listing) -> Result<()> {
    for (cookie, name) in [(1, c"."), (2, c"..")] {
        if offset < cookie {
            let entry = Entry { inode: ROOT, next: cookie, kind: libc::DT_DIR, name };
            if !listing.begin(&entry)? {
                return Ok(());
            }
            listing.unknown();
            listing.end(&entry);
            offset = cookie;
        }
    }
    while let Some((id, share)) = session.shares.after(offset - DOTS) {
        let name = std::ffi::CString::new(share.name.as_bytes()).map_err(|_| Errno::INVAL)?;
        let mut entry = Entry { inode: 0, next: id + DOTS, kind: libc::DT_UNKNOWN, name: &name };
        if !listing.begin(&entry)? {
            return Ok(());
        }
        let start = listing.reply.0.len();
        let found = match listing.form {
            Form::Plus => write_share(session, id, &mut listing.reply),
            Form::Plain => Attributes::of(&*session.shares.get(id)?.root),
        };
        if let Ok(found) = found {
            entry.inode = found.identity().inode;
            entry.kind = directory_type(found.mode());
        } else {
            listing.reply.0.truncate(start);
            listing.unknown();
        }
        listing.end(&entry);
        offset = entry.next;
    }
    Ok(())
}

/// `DT_*` of a mode.
fn directory_type(mode: u32) -> u8 {
    u8::try_from((mode & libc::S_IFMT) >> 12).unwrap_or(libc::DT_UNKNOWN)
}

impl Listing {
    /// True when there is room for an entry. If there is none for even one, the guest would take it for the end.
    fn begin(&self, entry: &Entry<'_>) -> Result<bool> {
        let entry_out = if self.form == Form::Plus { ENTRY_OUT } else { 0 };
        let length = entry_out + DIRENT + entry.name.count_bytes().next_multiple_of(8);
        let fits = self.reply.0.len() + length <= self.room;
        if !fits && self.reply.0.len() == OUT_HEADER { Err(Errno::INVAL) } else { Ok(fits) }
    }

    /// Nothing is said of an entry but its name: no node.
    fn unknown(&mut self) {
        if self.form == Form::Plus {
            self.reply.zeros(ENTRY_OUT);
        }
    }

    fn end(&mut self, entry: &Entry<'_>) {
        let name = entry.name.to_bytes();
        let length = u32::try_from(name.len()).expect("names have at most 64 KiB");
        self.reply.u64(entry.inode).u64(entry.next).u32(length).u32(entry.kind.into()).bytes(name);
        self.reply.zeros(name.len().next_multiple_of(8) - name.len());
    }

    /// Adds the entries of a batch. False when there was no room for all.
    fn add_all(
        &mut self,
        session: &mut Session,
        at: &At,
        directory: &std::os::fd::OwnedFd,
        batch: &mut Batch,
    ) -> Result<bool> {
        while let Some(entry) = batch.peek() {
            let dots = matches!(entry.name.to_bytes(), b"." | b"..");
            // Longer names than the guest may use are left out.
            if dots || Name::new(entry.name).is_ok() {
                if !self.begin(&entry)? {
                    return Ok(false);
                }
                if dots || self.form == Form::Plain {
                    self.unknown();
                } else {
                    self.look_up(session, at, directory, &entry);
                }
                self.end(&entry);
            }
            batch.advance();
        }
        Ok(true)
    }

    /// What is gone by now or has no room in the table has no node: the guest asks for it if it needs it.
    fn look_up(
        &mut self,
        session: &mut Session,
        at: &At,
        directory: &std::os::fd::OwnedFd,
        entry: &Entry<'_>,
    ) {
        let start = self.reply.0.len();
        let done = Attributes::at(directory, entry.name)
            .and_then(|found| write_entry(session, at, entry.name, &found, &mut self.reply));
        if done.is_err() {
            self.reply.0.truncate(start);
            self.unknown();
        }
    }
}
