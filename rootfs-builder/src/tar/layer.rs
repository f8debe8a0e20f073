//! Turns the entries of an archive into the tree of a layer.

use std::io::Read;

use super::archive::Archive;
use super::entry::{Entry, Kind};
use super::path::{Whiteout, components, whiteout};
use super::{EntryError, Error, Limits};
use crate::erofs::{Builder, FileType, Metadata, NodeId, Special};
use crate::excerpt::excerpt_of_bytes;

/// What reading a layer came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Entries of the archive.
    pub entries: u64,
    /// Extended attributes that were left out because Linux has no such namespace; Docker leaves them out too.
    pub foreign_xattrs: u64,
}

/// Adds the layer in the tar stream `source` to `builder`, to the end of the stream.
///
/// Whiteouts become what overlayfs understands: a character device 0:0, or `trusted.overlay.opaque` on a directory. A
/// later entry replaces an earlier one of the same name, and a directory keeps what is in it. Missing parents are made:
/// root's, 0755, of 1970.
///
/// # Errors
/// If the stream is not an intact archive or an entry of it is refused; the image is then of no use.
pub fn append_layer(source: impl Read, builder: &mut Builder, limits: &Limits) -> Result<Report, Error> {
    let mut archive = Archive::new(source, *limits);
    let mut layer = Layer {
        builder,
        limits,
        report: Report::default(),
        nodes: 0,
        metadata_bytes: 0,
        whiteouts: Vec::new(),
        opaque: Vec::new(),
    };
    while let Some(entry) = archive.next()? {
        let (name, foreign) = (entry.display_name(), entry.foreign_xattrs);
        layer.add(entry, &mut archive).map_err(|source| Error::Entry { name, source })?;
        layer.report.entries += 1;
        layer.report.foreign_xattrs += foreign;
    }
    archive.drain()?;
    layer.apply_whiteouts()?;
    Ok(layer.report)
}

struct Layer<'a> {
    builder: &'a mut Builder,
    limits: &'a Limits,
    report: Report,
    /// Names given so far.
    nodes: u64,
    metadata_bytes: u64,
    /// Names that hide those of lower layers, with their directories.
    whiteouts: Vec<(NodeId, Box<[u8]>)>,
    /// Directories that hide those of lower layers.
    opaque: Vec<NodeId>,
}

impl Layer<'_> {
    fn add(&mut self, entry: Entry, content: &mut dyn Read) -> Result<(), EntryError> {
        let path = components(&entry.name).ok_or(EntryError::Escapes)?;
        self.charge(path.last().map_or(0, |name| name.len()) + entry.meta.xattrs.len())?;
        let Some((name, parents)) = path.split_last() else {
            return self.set_root(entry);
        };
        match whiteout(&path) {
            Whiteout::None => {}
            Whiteout::Bookkeeping => return Ok(()),
            Whiteout::Opaque => {
                let parent = self.directory(parents)?;
                self.opaque.push(parent);
                return Ok(());
            }
            Whiteout::File(b"" | b"." | b"..") => return Err(EntryError::Whiteout),
            Whiteout::File(hidden) => {
                let parent = self.directory(parents)?;
                self.whiteouts.push((parent, hidden.into()));
                return Ok(());
            }
        }
        let place = (self.directory(parents)?, *name);
        match entry.kind {
            Kind::File { size } => drop(self.builder.add_file(place, entry.meta, size, content)?),
            Kind::SparseFile { size, extents } => {
                self.builder.add_sparse_file(place, entry.meta, size, &extents, content)?;
            }
            Kind::Symlink(target) => drop(self.builder.add_symlink(place, entry.meta, &target)?),
            Kind::Special(special) => drop(self.builder.add_special(place, entry.meta, special)?),
            Kind::HardLink(target) => {
                let target = self.link_target(&target)?;
                self.builder.add_hard_link(place, target)?;
            }
            Kind::Directory => self.add_directory(place, entry.meta)?,
        }
        Ok(())
    }

    fn set_root(&mut self, entry: Entry) -> Result<(), EntryError> {
        let root = self.builder.root();
        match (entry.kind, self.builder.directory_metadata(root)) {
            (Kind::Directory, Some(meta)) => *meta = entry.meta,
            _ => return Err(EntryError::Root),
        }
        Ok(())
    }

    fn add_directory(&mut self, place: (NodeId, &[u8]), meta: Metadata) -> Result<(), EntryError> {
        let existing = self.builder.lookup(place.0, place.1);
        match existing.and_then(|id| self.builder.directory_metadata(id)) {
            Some(old) => *old = meta,
            None => drop(self.builder.add_directory(place, meta)?),
        }
        Ok(())
    }

    /// The directory at `path`, made if it is missing. Nothing but directories is passed through.
    fn directory(&mut self, path: &[&[u8]]) -> Result<NodeId, EntryError> {
        let mut at = self.builder.root();
        for (depth, name) in path.iter().enumerate() {
            at = match self.builder.lookup(at, name) {
                Some(id) if self.builder.file_type(id) == FileType::Directory => id,
                Some(id) => {
                    let parent = excerpt_of_bytes(&path[..=depth].join(&b'/'));
                    return Err(EntryError::Parent { parent, what: describe(self.builder.file_type(id)) });
                }
                None => {
                    self.charge(name.len())?;
                    let meta = Metadata { mode: 0o755, ..Metadata::default() };
                    self.builder.add_directory((at, name), meta)?
                }
            };
        }
        Ok(at)
    }

    fn link_target(&self, target: &[u8]) -> Result<NodeId, EntryError> {
        let shown = || excerpt_of_bytes(target);
        let path = components(target).ok_or_else(|| EntryError::LinkEscapes { target: shown() })?;
        let found = path.iter().try_fold(self.builder.root(), |at, name| self.builder.lookup(at, name));
        match found {
            None => Err(EntryError::LinkToNothing { target: shown() }),
            Some(id) if self.builder.file_type(id) == FileType::Directory => {
                Err(EntryError::LinkToDirectory { target: shown() })
            }
            Some(id) => Ok(id),
        }
    }

    /// Whiteouts concern lower layers only, wherever in the archive they are: a file of the same name in this layer hides
    /// what is below by itself, and a directory must be opaque to do so.
    fn apply_whiteouts(&mut self) -> Result<(), Error> {
        for (parent, name) in std::mem::take(&mut self.whiteouts) {
            match self.builder.lookup(parent, &name) {
                Some(id) if self.builder.file_type(id) == FileType::Directory => self.opaque.push(id),
                Some(_) => {}
                None => {
                    let device = Special::CharDevice(0, 0);
                    let added = self.builder.add_special((parent, &name), Metadata::default(), device);
                    added.map_err(|error| Error::Entry {
                        name: format!(".wh.{}", String::from_utf8_lossy(&name)),
                        source: error.into(),
                    })?;
                }
            }
        }
        self.opaque.sort_unstable();
        self.opaque.dedup();
        for directory in std::mem::take(&mut self.opaque) {
            let meta = self.builder.directory_metadata(directory).expect("only directories are listed");
            meta.xattrs.add(b"trusted.overlay.opaque", b"y").map_err(Error::Image)?;
        }
        Ok(())
    }

    fn charge(&mut self, metadata_bytes: usize) -> Result<(), EntryError> {
        self.nodes += 1;
        self.metadata_bytes += metadata_bytes as u64;
        if self.nodes > self.limits.entries {
            return Err(EntryError::TooMany { limit: self.limits.entries });
        }
        if self.metadata_bytes > self.limits.metadata_bytes {
            return Err(EntryError::TooMuchMetadata { limit: self.limits.metadata_bytes });
        }
        Ok(())
    }
}

fn describe(kind: FileType) -> &'static str {
    match kind {
        FileType::Symlink => "a symbolic link",
        FileType::File => "a file",
        FileType::Directory => "a directory",
        FileType::CharDevice | FileType::BlockDevice | FileType::Fifo | FileType::Socket => "a special file",
    }
}
