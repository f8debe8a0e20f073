//! One request and its reply.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use crate::attributes::{Attributes, Identity};
use crate::control::ShareKind;
use crate::directory::ReadAhead;
use crate::handles::Handles;
use crate::host::{FileSystem, OwnDescriptors, open_in};
use crate::identity::Identities;
use crate::nodes::{DEPTH_MAX, Nodes, ROOT};
use crate::operations;
use crate::shares::{ShareError, Shares};
use crate::wire::{InHeader, OUT_HEADER, Writer, opcode};
use crate::worker::{Job, Work};

/// Longest reply: what is read of a directory or of extended attributes, and a header.
pub const REPLY_MAX: usize = (128 << 10) + OUT_HEADER;

/// What becomes of a request.
#[derive(Debug)]
pub enum Answer {
    /// It is answered.
    Reply(Reply),
    /// There is something to do that may take long, and then it is answered.
    Later(Job),
    /// It has no answer.
    Nothing,
}

/// A reply that is to be sent.
#[derive(Debug)]
pub struct Reply {
    /// Header and body.
    pub bytes: Vec<u8>,
    /// The file that goes with it.
    pub file: Option<Passed>,
}

/// A file that has been opened, for the VMM.
#[derive(Debug)]
pub struct Passed {
    /// The file.
    pub file: Arc<OwnedFd>,
    /// Its handle.
    pub handle: u64,
    /// Its node.
    pub node: u64,
    /// The guest learns of the node by the same reply.
    pub is_new: bool,
}

/// What INIT has settled.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Features {
    /// SETXATTR has flags.
    pub(crate) setxattr_ext: bool,
    /// The guest mounts directories of other file systems as such.
    pub(crate) submounts: bool,
}

/// What a session may keep open, all together less than the limit on descriptors.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Descriptors of nodes.
    pub cached: usize,
    /// Open files and directories.
    pub handles: usize,
    /// Shares.
    pub shares: usize,
}

/// The guest's view of the shares.
#[derive(Debug)]
pub struct Session {
    pub(crate) shares: Shares,
    pub(crate) nodes: Nodes,
    pub(crate) handles: Handles,
    pub(crate) read_ahead: ReadAhead,
    pub(crate) features: Features,
    pub(crate) own: OwnDescriptors,
    pub(crate) identities: Identities,
    /// The file that the request at hand has opened.
    pub(crate) passed: Option<Passed>,
    /// What the request at hand takes, if that may take long: its reply comes of that.
    pub(crate) work: Option<Work>,
}

/// A node at hand: its descriptor, and what its share is like.
#[derive(Clone, Debug)]
pub(crate) struct At {
    pub(crate) node: u64,
    pub(crate) share: u64,
    pub(crate) kind: ShareKind,
    pub(crate) file_type: FileType,
    pub(crate) identity: Identity,
    pub(crate) file_system: FileSystem,
    pub(crate) descriptor: Arc<OwnedFd>,
}

impl Session {
    /// A session without shares.
    pub fn new(limits: Limits, own: OwnDescriptors, identities: Identities) -> Self {
        Self {
            shares: Shares::new(limits.shares),
            nodes: Nodes::new(limits.cached),
            handles: Handles::new(limits.handles),
            read_ahead: ReadAhead::default(),
            features: Features::default(),
            own,
            identities,
            passed: None,
            work: None,
        }
    }

    /// Adds a share.
    ///
    /// # Errors
    /// [`ShareError`]
    pub fn add_share(
        &mut self,
        name: &str,
        root: OwnedFd,
        kind: ShareKind,
        read_only: bool,
    ) -> Result<(), ShareError> {
        self.shares.add(name, root, kind, read_only)
    }

    /// Has a share refuse changes from now on.
    ///
    /// # Errors
    /// [`ShareError::Missing`]
    pub fn protect_share(&mut self, name: &str) -> Result<(), ShareError> {
        self.shares.protect(name)
    }

    /// Removes a share: what the guest knows of it is stale, what it has open is closed.
    ///
    /// # Errors
    /// [`ShareError::Missing`]
    pub fn remove_share(&mut self, name: &str) -> Result<(), ShareError> {
        let id = self.shares.remove(name)?;
        self.nodes.close_share(id);
        self.handles.close_share(id);
        Ok(())
    }

    /// Does what a packet asks. Nothing is said to what has no header, nor to FORGET and DESTROY.
    pub fn answer(&mut self, packet: &[u8]) -> Answer {
        let Ok((header, body)) = InHeader::parse(packet) else { return Answer::Nothing };
        (self.passed, self.work) = (None, None);
        match header.opcode {
            opcode::FORGET | opcode::BATCH_FORGET => {
                operations::forget(self, &header, body);
                return Answer::Nothing;
            }
            opcode::DESTROY => {
                self.forget_all();
                return Answer::Nothing;
            }
            _ => {}
        }
        let result = if header.len as usize == packet.len() {
            operations::perform(self, &header, body)
        } else {
            Err(Errno::INVAL)
        };
        debug_assert!(result.is_ok() || self.passed.is_none());
        match (result, self.work.take()) {
            (Ok(_), Some(work)) => Answer::Later(Job { unique: header.unique, work }),
            (result, _) => Answer::Reply(Reply::new(header.unique, result, self.passed.take())),
        }
    }

    /// The guest is gone, or another one.
    pub fn forget_all(&mut self) {
        self.nodes.clear();
        self.handles.clear();
        self.read_ahead.clear();
        self.features = Features::default();
    }

    /// The reply did not reach the VMM: it has no such file, and the guest does not know the node.
    pub fn take_back(&mut self, passed: &Passed) {
        self.handles.remove(passed.handle, passed.node);
        if passed.is_new {
            self.nodes.forget(passed.node, 1);
        }
    }

    /// A node with its descriptor.
    ///
    /// # Errors
    /// EROFS for the root directory, in which nothing can be done that needs one; EACCES for what is closed; ESTALE, and those of opening it.
    pub(crate) fn at(&mut self, node: u64) -> Result<At, Errno> {
        if node == ROOT {
            return Err(Errno::ROFS);
        }
        if self.nodes.get(node)?.file_system == FileSystem::Kernel {
            return Err(Errno::ACCESS);
        }
        let descriptor = self.descriptor(node)?;
        self.at_open(node, &descriptor)
    }

    /// The same, with a descriptor that is there.
    pub(crate) fn at_open(&self, node: u64, descriptor: &Arc<OwnedFd>) -> Result<At, Errno> {
        let known = self.nodes.get(node)?;
        Ok(At {
            node,
            share: known.share,
            kind: self.shares.get(known.share)?.kind,
            file_type: known.kind,
            identity: known.identity,
            file_system: known.file_system,
            descriptor: Arc::clone(descriptor),
        })
    }

    /// The same, of a node that is to be changed.
    pub(crate) fn at_for_change(&mut self, node: u64) -> Result<At, Errno> {
        self.check_writable(node)?;
        self.at(node)
    }

    /// EROFS when nothing may be changed in the share of a node.
    pub(crate) fn check_writable(&self, node: u64) -> Result<(), Errno> {
        if node == ROOT || self.shares.get(self.nodes.get(node)?.share)?.read_only {
            return Err(Errno::ROFS);
        }
        Ok(())
    }

    /// The descriptor of a node. If it is not kept and the guest does not have the file open, it is opened again by name, from the nearest
    /// directory above of which there is one.
    fn descriptor(&mut self, node: u64) -> Result<Arc<OwnedFd>, Errno> {
        let mut way = Vec::new();
        let mut at = node;
        let mut descriptor = loop {
            let known = self.nodes.get(at)?;
            let (share, parent, slot) = (self.shares.get(known.share)?, known.parent, known.slot);
            if parent == ROOT {
                break Arc::clone(&share.root);
            }
            if let Some(kept) = slot.and_then(|slot| self.nodes.descriptors.get(slot)) {
                break kept;
            }
            if let Some(open) = self.handles.of(at) {
                break open;
            }
            if way.len() == DEPTH_MAX {
                return Err(Errno::LOOP);
            }
            way.push(at);
            at = parent;
        };
        for id in way.into_iter().rev() {
            let known = self.nodes.get(id)?;
            let opened = open_in(&*descriptor, &known.name, OFlags::PATH, 0).map_err(stale)?;
            let found = Attributes::of(&opened)?;
            if found.identity() != known.identity || found.kind() != known.kind {
                return Err(Errno::STALE);
            }
            descriptor = Arc::new(opened);
            self.keep(id, Arc::clone(&descriptor));
        }
        Ok(descriptor)
    }

    /// Keeps the descriptor of a node.
    pub(crate) fn keep(&mut self, node: u64, descriptor: Arc<OwnedFd>) {
        let (slot, gone) = self.nodes.descriptors.insert(node, descriptor);
        if let Some(gone) = gone.and_then(|gone| self.nodes.get_mut(gone)) {
            gone.slot = None;
        }
        match self.nodes.get_mut(node) {
            Some(known) => {
                if let Some(old) = known.slot.replace(slot) {
                    self.nodes.descriptors.remove(old);
                }
            }
            None => self.nodes.descriptors.remove(slot),
        }
    }

    /// The attributes of a node, for which it need not be opened.
    pub(crate) fn attributes(&mut self, node: u64) -> Result<Attributes, Errno> {
        let known = self.nodes.get(node)?;
        if known.slot.is_some() || known.parent == ROOT || self.handles.of(node).is_some() {
            return Attributes::of(&*self.descriptor(node)?);
        }
        let parent = known.parent;
        let parent = self.descriptor(parent)?;
        let known = self.nodes.get(node)?;
        let found = Attributes::at(&*parent, &known.name).map_err(stale)?;
        if found.identity() != known.identity || found.kind() != known.kind {
            return Err(Errno::STALE);
        }
        Ok(found)
    }
}

/// What is not where it was is stale, and so is what is no directory any more.
fn stale(errno: Errno) -> Errno {
    match errno {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV => Errno::STALE,
        other => other,
    }
}

impl Reply {
    /// A reply with what came of a request.
    pub fn new(unique: u64, result: Result<Writer, Errno>, file: Option<Passed>) -> Self {
        match result {
            Ok(writer) => Self { bytes: writer.finish(unique, None), file },
            Err(errno) => Self::error(unique, errno),
        }
    }

    /// A reply that says what went wrong.
    pub fn error(unique: u64, errno: Errno) -> Self {
        // What is not one of Linux's for user space is not for the guest's kernel.
        let errno = if (1..=511).contains(&errno.raw_os_error()) { errno } else { Errno::IO };
        Self { bytes: Writer::reply().finish(unique, Some(errno)), file: None }
    }
}

#[cfg(test)]
mod tests;
