//! Importing: layers are converted in a directory of their own, then moved into the store together.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::index::{ImageRecord, LayerRecord};
use super::reference::normalise;
use super::work::Work;
use super::{Error, Image, LayerError, Space, Store, check_layer, failed, sync_directory};
use crate::erofs::{self, Builder, Options};
use crate::excerpt::excerpt;
use crate::oci::{Digest, FileError, FoundImage, FoundLayer, Hashing, ImageSource, Source, decompress};
use crate::tar;

/// What an import is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Looking for images in the source.
    Examining,
    /// Converting a layer, counted from one.
    Layer {
        /// Which.
        number: usize,
        /// Of how many.
        count: usize,
    },
    /// Writing to disk what was converted.
    Storing,
}

/// How far an import is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Bytes of the layer that were read.
    pub done: u64,
    /// Bytes of the layer as it is stored in the source.
    pub total: u64,
}

/// A converted or cached layer in the import's directory.
struct Ready {
    diff_id: Digest,
    path: PathBuf,
    record: LayerRecord,
}

impl Store {
    /// Imports all images of a source that run here. They get the names that the source gives them, or the one that the
    /// caller gives; each name is taken from any image that had it. Layers that are in the store are not read again.
    ///
    /// This blocks; within an asynchronous program it must run on a thread for blocking work.
    ///
    /// # Errors
    /// If the source has no image for this machine, is damaged or hostile, or the store cannot be written. The store is
    /// then as it was.
    pub fn import(
        &self,
        source: &Source,
        name: Option<&str>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Vec<Image>, Error> {
        let from = describe(source);
        let name = name.map(normalise).transpose()?;
        progress(Progress { phase: Phase::Examining, done: 0, total: 0 });
        let source_error = |source| Error::Source { from: from.clone(), source: Box::new(source) };
        let mut opened = source.open().map_err(source_error)?;
        let mut images = opened.images().map_err(source_error)?;
        if let Some(name) = name {
            let count = images.len();
            match images.as_mut_slice() {
                [image] => image.names = vec![name],
                _ => return Err(Error::SeveralImages { name, count }),
            }
        }
        for name in images.iter_mut().flat_map(|image| &mut image.names) {
            *name = normalise(name)?;
        }
        let work = {
            let _lock = self.lock(FlockOperation::LockExclusive)?;
            Work::new(&self.path("work"))?
        };
        let mut importer =
            Importer { store: self, source: opened.as_mut(), from: &from, work: &work, ready: Vec::new() };
        importer.prepare(&images, progress)?;
        let ready = importer.ready;
        progress(Progress { phase: Phase::Storing, done: 0, total: 0 });
        self.commit(images, &ready)
    }

    /// Moves what is ready into the store and names it in the index.
    fn commit(&self, images: Vec<FoundImage>, ready: &[Ready]) -> Result<Vec<Image>, Error> {
        for layer in ready {
            File::open(&layer.path)
                .and_then(|file| file.sync_all())
                .map_err(failed("syncing", &layer.path))?;
        }
        let _lock = self.lock(FlockOperation::LockExclusive)?;
        let mut index = self.index()?;
        for layer in ready {
            let path = self.layer_path(&layer.diff_id);
            std::fs::rename(&layer.path, &path).map_err(failed("moving a layer to", &path))?;
            index.layers.insert(layer.diff_id.clone(), layer.record.clone());
        }
        sync_directory(&self.path("layers"))?;
        let mut digests = Vec::with_capacity(images.len());
        for image in images {
            self.replace(&self.config_path(&image.id), &image.config)?;
            let layers = image.layers.into_iter().map(|layer| layer.diff_id).collect();
            index.images.entry(image.id.clone()).or_insert_with(|| ImageRecord::named([], layers));
            for name in image.names {
                index.name(&image.id, name);
            }
            digests.push(image.id);
        }
        self.write_index(&index)?;
        digests.iter().map(|digest| self.image(&index, digest)).collect()
    }
}

struct Importer<'a> {
    store: &'a Store,
    source: &'a mut dyn ImageSource,
    from: &'a str,
    work: &'a Work,
    ready: Vec<Ready>,
}

impl Importer<'_> {
    fn prepare(&mut self, images: &[FoundImage], progress: &mut dyn FnMut(Progress)) -> Result<(), Error> {
        let layers: Vec<&FoundLayer> = images.iter().flat_map(|image| &image.layers).collect();
        for (position, layer) in layers.iter().enumerate() {
            if self.ready.iter().any(|ready| ready.diff_id == layer.diff_id) {
                continue;
            }
            let phase = Phase::Layer { number: position + 1, count: layers.len() };
            let path = self.work.path().join(layer.diff_id.hex());
            let record = match self.cached(layer, &path)? {
                Some(record) => record,
                // Asked anew for each: the layers before have taken their part, and others write too.
                None => Space::of(self.work.path())
                    .map_err(LayerError::Space)
                    .and_then(|space| self.convert(layer, &path, space, phase, progress))
                    .map_err(|source| Error::Layer {
                        layer: excerpt(&layer.name),
                        from: self.from.into(),
                        source: Box::new(source),
                    })?,
            };
            self.ready.push(Ready { diff_id: layer.diff_id.clone(), path, record });
        }
        Ok(())
    }

    /// Takes hold of a layer that is in the store by a hard link, which keeps it even if the image it came with is removed
    /// meanwhile. A damaged one is converted again.
    fn cached(&self, layer: &FoundLayer, path: &Path) -> Result<Option<LayerRecord>, Error> {
        let _lock = self.store.lock(FlockOperation::LockShared)?;
        let index = self.store.index()?;
        let stored = self.store.layer_path(&layer.diff_id);
        let record =
            index.layers.get(&layer.diff_id).filter(|record| check_layer(&stored, record.size).is_ok());
        let Some(record) = record else { return Ok(None) };
        std::fs::hard_link(&stored, path).map_err(failed("linking", &stored))?;
        Ok(Some(record.clone()))
    }

    fn convert(
        &mut self,
        layer: &FoundLayer,
        path: &Path,
        space: Space,
        phase: Phase,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<LayerRecord, LayerError> {
        let limit = self.store.limits.archive_bytes;
        let converted = self.convert_within(layer, path, limit.min(space.usable()), phase, progress);
        converted.map_err(|error| {
            if space.usable() < limit && is_full(&error) {
                LayerError::NoSpace { path: self.store.root.clone(), space }
            } else {
                error
            }
        })
    }

    fn convert_within(
        &mut self,
        layer: &FoundLayer,
        path: &Path,
        max_size: u64,
        phase: Phase,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<LayerRecord, LayerError> {
        let (blob, size) = self.source.open_layer(layer)?;
        if let Some((_, expected)) = layer.blob.as_ref().filter(|(_, expected)| *expected != size) {
            return Err(FileError::Size { expected: *expected, actual: size }.into());
        }
        let options = Options { uuid: uuid(&layer.diff_id), max_size };
        let output = File::options().create_new(true).read(true).write(true).open(path);
        let output = output.map_err(erofs::Error::Write)?;
        let scratch = tempfile::tempfile_in(self.work.path()).map_err(erofs::Error::Scratch)?;
        let mut builder = Builder::new(output, scratch, options)?;

        // One byte more than announced is enough to know that the blob is too long.
        let watched =
            Watched { source: blob.take(size.saturating_add(1)), phase, done: 0, total: size, progress };
        let mut compressed = Hashing::new(watched);
        let uncompressed = decompress(&mut compressed).map_err(LayerError::Decompress)?;
        let mut archive = Hashing::new(uncompressed);
        let read = tar::append_layer(&mut archive, &mut builder, &self.store.limits);
        let (diff_id, _) = archive.finish();
        // Damage explains a senseless archive better than the archive does.
        let drained = io::copy(&mut compressed, &mut io::sink());
        let (digest, length) = compressed.finish();
        if drained.is_ok() {
            check_blob(layer, size, &digest, length)?;
        }
        read?;
        drained.map_err(LayerError::Read)?;
        if diff_id != layer.diff_id {
            return Err(LayerError::DiffId { expected: layer.diff_id.clone(), actual: diff_id });
        }
        let (file, summary) = builder.finish()?;
        Ok(LayerRecord { size: summary.size, digest: digest_of(&file).map_err(erofs::Error::Write)? })
    }
}

/// Whether an image met its limit.
fn is_full(error: &LayerError) -> bool {
    use erofs::Error::TooLarge;
    use tar::{EntryError, Error};
    matches!(
        error,
        LayerError::Image(TooLarge { .. })
            | LayerError::Archive(
                Error::Image(TooLarge { .. })
                    | Error::Entry { source: EntryError::Image(TooLarge { .. }), .. }
            )
    )
}

fn check_blob(layer: &FoundLayer, size: u64, digest: &Digest, length: u64) -> Result<(), FileError> {
    if length != size {
        return Err(FileError::Size { expected: size, actual: length });
    }
    match &layer.blob {
        Some((expected, _)) if expected != digest => {
            Err(FileError::Digest { expected: expected.clone(), actual: digest.clone() })
        }
        _ => Ok(()),
    }
}

fn digest_of(mut file: &File) -> io::Result<Digest> {
    io::Seek::rewind(&mut file)?;
    let mut hashing = Hashing::new(file);
    let mut buffer = vec![0; 256 << 10];
    while hashing.read(&mut buffer)? > 0 {}
    Ok(hashing.finish().0)
}

/// A volume identity of version 8 (RFC 9562) out of the layer's: unique among layers, the same each time.
fn uuid(diff_id: &Digest) -> [u8; 16] {
    let mut uuid = diff_id.first_half();
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

fn describe(source: &Source) -> String {
    match source {
        Source::Local(path) => path.display().to_string(),
        #[cfg(feature = "registry")]
        Source::Registry(reference) => reference.clone(),
    }
}

/// Tells the caller how much of a blob was read.
struct Watched<'a, R> {
    source: R,
    phase: Phase,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(Progress),
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.done += count as u64;
        (self.progress)(Progress { phase: self.phase, done: self.done, total: self.total });
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci;

    struct One(Vec<u8>);

    impl ImageSource for One {
        fn images(&mut self) -> Result<Vec<FoundImage>, oci::Error> {
            Ok(Vec::new())
        }

        fn open_layer(&mut self, _: &FoundLayer) -> Result<(Box<dyn Read>, u64), oci::Error> {
            Ok((Box::new(io::Cursor::new(self.0.clone())), self.0.len() as u64))
        }
    }

    /// A tar of one file with so many bytes.
    fn archive(bytes: usize) -> Vec<u8> {
        let mut header = [0; 512];
        header[..4].copy_from_slice(b"file");
        header[100..108].copy_from_slice(b"0000644\0");
        header[124..136].copy_from_slice(format!("{bytes:011o}\0").as_bytes());
        header[148..156].fill(b' ');
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let mut archive = header.to_vec();
        archive.resize(512 + bytes.next_multiple_of(512) + 1024, 0);
        archive[512..512 + bytes].fill(7);
        archive
    }

    #[test]
    fn a_layer_takes_no_more_than_the_free_space_less_the_reserve() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let work = Work::new(&store.path("work")).unwrap();
        let archive = archive(100_000);
        let layer = FoundLayer { name: "one".into(), blob: None, diff_id: Digest::of(&archive) };
        let mut source = One(archive);
        let mut importer =
            Importer { store: &store, source: &mut source, from: "here", work: &work, ready: Vec::new() };
        let mut convert = |name: &str, free| {
            let space = Space { free, reserve: 1 << 20 };
            let phase = Phase::Layer { number: 1, count: 1 };
            let path = work.path().join(name);
            let converted = importer.convert(&layer, &path, space, phase, &mut |_| {});
            (converted, path.metadata().map_or(0, |found| found.len()))
        };
        let (enough, size) = convert("enough", (1 << 20) + 200_000);
        assert_eq!(enough.unwrap().size, size);
        // The reserve would have had room for it; nothing at all is the edge.
        for usable in [50_000, 0] {
            let (error, size) = convert(&format!("{usable}"), (1 << 20) + usable);
            let error = error.unwrap_err();
            assert!(matches!(error, LayerError::NoSpace { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.contains("1 MiB are free") && text.contains("`bulkhead image rm`"), "{text}");
            assert!(text.contains(&format!("the rest, {usable} bytes")), "{text}");
            assert!(size <= usable, "{size}");
        }
    }
}
