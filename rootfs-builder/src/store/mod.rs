//! The image store: one directory with layers as EROFS images, cached by their `diff_id`, and an index of images.
//!
//! ```text
//! lock             flock: exclusive while the index changes, shared while it is read
//! index.json       images, their names and layers; replaced as a whole
//! configs/HEX.json configurations by their digest, which is the image's identity
//! layers/HEX.erofs layers by the digest of their uncompressed archive
//! work/XXXXXX/     one for each import under way, locked as long as it lives
//! ```
//!
//! An import works in its own directory, without the lock, so that containers start meanwhile. Then, under the lock, its
//! layers are synced and moved into place and the index is replaced, synced before and after: whatever happens, the
//! index names only files that are whole. What a crashed import leaves in `work/` is removed when the store is opened
//! next, and so are files which no index entry refers to.

mod import;
mod index;
mod reference;
mod space;
mod work;

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};

use oci_spec::image::ImageConfiguration;
use rustix::fs::FlockOperation;

use crate::oci::{self, Digest, Hashing};
use crate::{erofs, tar};
pub use import::{Phase, Progress};
use index::{ImageRecord, Index};
use reference::Reference;
pub use space::Space;

/// The image store in a directory that only its owner can enter.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    limits: tar::Limits,
}

/// An image in the store.
#[derive(Clone, Debug)]
pub struct Image {
    /// Digest of the configuration: the same image has the same one wherever it came from.
    pub digest: Digest,
    /// All its names, in full: `docker.io/library/debian:13`.
    pub names: Vec<String>,
    /// What to run and how.
    pub config: ImageConfiguration,
    /// EROFS images, bottom first. They exist and are neither truncated nor overwritten at their start.
    pub layers: Vec<PathBuf>,
    /// Bytes of all layers on disk; other images may share them.
    pub size: u64,
}

/// What removing an image did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names that are gone.
    pub names: Vec<String>,
    /// The image itself, if that was its last name.
    pub digest: Option<Digest>,
    /// Bytes of layers that nothing refers to any more.
    pub freed: u64,
}

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the store cannot be used.
    #[error("{action} {path:?} in the image store failed; check its permissions and the free space")]
    Io {
        /// What was being done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The index is damaged.
    #[error(
        "the index {path:?} of the image store is damaged; remove that directory and import the images again"
    )]
    Index {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The index is of another version.
    #[error(
        "the image store {path:?} has version {found}, not {expected}; remove it and import the images again"
    )]
    Version {
        /// The store.
        path: PathBuf,
        /// As found.
        found: u32,
        /// As needed.
        expected: u32,
    },
    /// A name that is none.
    #[error("{name:?} is not an image name; write it like debian:13 or registry.example/team/app:1.0")]
    Name {
        /// As it was given.
        name: String,
        /// Why not.
        source: oci_spec::distribution::ParseError,
    },
    /// There is no such image.
    #[error(
        "there is no image {name:?} here; `bulkhead image ls` lists those there are, `bulkhead image import` adds one"
    )]
    Unknown {
        /// As it was given.
        name: String,
    },
    /// A prefix of several digests.
    #[error("{prefix:?} is the beginning of {count} images' digests; give more of it")]
    Ambiguous {
        /// As it was given.
        prefix: String,
        /// How many there are.
        count: usize,
    },
    /// One name for several images.
    #[error("the source has {count} images, which cannot all be called {name:?}; import them without a name")]
    SeveralImages {
        /// As it was given.
        name: String,
        /// How many there are.
        count: usize,
    },
    /// A layer or configuration in the store is not as it was written.
    #[error("{path:?} of image {image} is damaged: {what}; import the image again")]
    Damaged {
        /// The image.
        image: Digest,
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// The source cannot be read.
    #[error("importing from {from} failed")]
    Source {
        /// The source.
        from: String,
        /// Why.
        source: Box<oci::Error>,
    },
    /// A layer cannot be used.
    #[error("layer {layer} of {from} cannot be imported")]
    Layer {
        /// The layer's name in the source.
        layer: String,
        /// The source.
        from: String,
        /// Why.
        source: Box<LayerError>,
    },
}

/// Why a layer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// Its blob is not the announced one, or cannot be read.
    #[error(transparent)]
    Blob(#[from] oci::Error),
    /// Its bytes are not the announced ones.
    #[error("its bytes are not those that the manifest announces")]
    Content(#[from] oci::FileError),
    /// Its bytes cannot be read.
    #[error("its bytes cannot be read to the end")]
    Read(#[source] io::Error),
    /// It cannot be decompressed.
    #[error("it cannot be decompressed")]
    Decompress(#[source] io::Error),
    /// Its uncompressed content is not the one that the configuration names.
    #[error("its uncompressed digest is {actual}, not {expected}; the image is damaged")]
    DiffId {
        /// As the configuration has it.
        expected: Digest,
        /// As it is.
        actual: Digest,
    },
    /// It is not an archive, or a hostile one.
    #[error(transparent)]
    Archive(#[from] tar::Error),
    /// No image can be written.
    #[error("its file system image cannot be written")]
    Image(#[from] erofs::Error),
    /// The file system of the store has no room for it.
    #[error(
        "{} MiB are free in {path:?}, {} MiB of which are left to others, and it needs more than the rest, {usable} bytes; \
         remove images that are not needed with `bulkhead image rm`, or have the store on a larger file system",
        .space.free >> 20,
        .space.reserve >> 20,
        usable = .space.usable()
    )]
    NoSpace {
        /// The store.
        path: PathBuf,
        /// What there was before.
        space: Space,
    },
    /// The free space cannot be found out.
    #[error("asking for the free space failed")]
    Space(#[source] io::Error),
}

impl Store {
    /// Opens the store in `root`, which is made with mode 0700 if it is missing, and removes what crashed imports left.
    ///
    /// # Errors
    /// If the directories cannot be made or read.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, Error> {
        let store = Self { root: root.into(), limits: tar::Limits::default() };
        for directory in [store.root.clone(), store.path("configs"), store.path("layers"), store.path("work")]
        {
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory);
            made.map_err(failed("creating", &directory))?;
        }
        let _lock = store.lock(FlockOperation::LockExclusive)?;
        work::remove_stale(&store.path("work"))?;
        // A damaged index is the next operation's error, and no reason to remove anything.
        if let Ok(index) = store.index() {
            store.collect_garbage(&index)?;
        }
        Ok(store)
    }

    /// The same store with other limits for what is imported.
    #[must_use]
    pub fn with_limits(self, limits: tar::Limits) -> Self {
        Self { limits, ..self }
    }

    /// Finds an image by a name as Docker understands names (`debian:13` is `docker.io/library/debian:13`), or by its digest
    /// or at least six digits from its beginning, and checks its files cheaply.
    ///
    /// # Errors
    /// If there is none, or a file of it is missing, truncated or overwritten.
    pub fn resolve(&self, reference: &str) -> Result<Image, Error> {
        let _lock = self.lock(FlockOperation::LockShared)?;
        let index = self.index()?;
        let digest = Reference::new(reference).find(&index)?;
        self.image(&index, &digest)
    }

    /// All images, by digest. One with damaged files is an error in its place.
    ///
    /// # Errors
    /// If the index cannot be read.
    pub fn list(&self) -> Result<Vec<Result<Image, Error>>, Error> {
        let _lock = self.lock(FlockOperation::LockShared)?;
        let index = self.index()?;
        Ok(index.images.keys().map(|digest| self.image(&index, digest)).collect())
    }

    /// Removes a name, and with an image's last name, or when given by its digest, the image and the layers that no other
    /// image has. Containers that use them keep them open.
    ///
    /// # Errors
    /// If there is no such image, or the store cannot be changed.
    pub fn remove(&self, reference: &str) -> Result<Removed, Error> {
        let parsed = Reference::new(reference);
        let _lock = self.lock(FlockOperation::LockExclusive)?;
        let mut index = self.index()?;
        let digest = parsed.find(&index)?;
        let record = index.images.get_mut(&digest).expect("it was found");
        let mut removed = Removed::default();
        if record.names.remove(parsed.name()) {
            removed.names.push(parsed.name().into());
        } else {
            removed.names.extend(std::mem::take(&mut record.names));
        }
        if record.names.is_empty() {
            index.images.remove(&digest);
            removed.digest = Some(digest);
        }
        self.write_index(&index)?;
        removed.freed = self.collect_garbage(&index)?;
        Ok(removed)
    }

    /// Reads all layers of an image and compares them with what was written.
    ///
    /// # Errors
    /// If there is no such image or a layer is not as it was.
    pub fn verify(&self, reference: &str) -> Result<(), Error> {
        let image = self.resolve(reference)?;
        let index = {
            let _lock = self.lock(FlockOperation::LockShared)?;
            self.index()?
        };
        let Some(record) = index.images.get(&image.digest) else {
            return Err(Error::Unknown { name: reference.into() });
        };
        for (layer, path) in record.layers.iter().zip(&image.layers) {
            let file = File::open(path).map_err(failed("opening", path))?;
            let mut hashing = Hashing::new(file);
            io::copy(&mut hashing, &mut io::sink()).map_err(failed("reading", path))?;
            if index.layers.get(layer).map(|record| &record.digest) != Some(&hashing.finish().0) {
                return Err(damaged(&image.digest, path, "its content has changed"));
            }
        }
        Ok(())
    }

    fn image(&self, index: &Index, digest: &Digest) -> Result<Image, Error> {
        let record = &index.images[digest];
        let path = self.config_path(digest);
        let config = std::fs::read(&path).map_err(failed("reading", &path))?;
        if Digest::of(&config) != *digest {
            return Err(damaged(digest, &path, "its content has changed"));
        }
        let config = oci::parse_config(&digest.to_string(), &config)
            .map_err(|_| damaged(digest, &path, "it is not an image configuration"))?;
        let mut size = 0;
        let mut layers = Vec::with_capacity(record.layers.len());
        for layer in &record.layers {
            let path = self.layer_path(layer);
            let expected = index.layers.get(layer).map(|layer| layer.size);
            let expected = expected.ok_or_else(|| damaged(digest, &path, "the index does not know it"))?;
            check_layer(&path, expected).map_err(|what| damaged(digest, &path, what))?;
            size += expected;
            layers.push(path);
        }
        let names = record.names.iter().cloned().collect();
        Ok(Image { digest: digest.clone(), names, config, layers, size })
    }

    /// Removes files that the index does not know; how many bytes of layers that were.
    fn collect_garbage(&self, index: &Index) -> Result<u64, Error> {
        let layers = index.images.values().flat_map(|image| &image.layers);
        let layers: HashSet<PathBuf> = layers.map(|digest| self.layer_path(digest)).collect();
        let configs: HashSet<PathBuf> = index.images.keys().map(|digest| self.config_path(digest)).collect();
        let freed = remove_others(&self.path("layers"), &layers)?;
        remove_others(&self.path("configs"), &configs)?;
        Ok(freed)
    }

    fn index(&self) -> Result<Index, Error> {
        Index::read(&self.path("index.json"))
    }

    fn write_index(&self, index: &Index) -> Result<(), Error> {
        self.replace(&self.path("index.json"), index.to_json().as_bytes())
    }

    /// Writes a file in `work/` and moves it to its place, syncing both. The caller holds the lock.
    fn replace(&self, path: &Path, content: &[u8]) -> Result<(), Error> {
        let write = || {
            let mut file = tempfile::NamedTempFile::new_in(self.path("work"))?;
            file.write_all(content)?;
            file.as_file().sync_all()?;
            file.persist(path).map_err(|error| error.error)
        };
        write().map_err(failed("writing", path))?;
        sync_directory(path.parent().expect("in the store"))
    }

    /// Holds the store's lock until the file is dropped.
    fn lock(&self, operation: FlockOperation) -> Result<File, Error> {
        let path = self.path("lock");
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(failed("opening", &path))?;
        rustix::fs::flock(&file, operation).map_err(|error| failed("locking", &path)(error.into()))?;
        Ok(file)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn config_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("configs").join(format!("{}.json", digest.hex()))
    }

    fn layer_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("layers").join(format!("{}.erofs", digest.hex()))
    }
}

/// Opens a layer and looks at its size and superblock.
fn check_layer(path: &Path, expected: u64) -> Result<(), &'static str> {
    let file = File::open(path).map_err(|_| "it is missing or cannot be opened")?;
    if file.metadata().map_err(|_| "it cannot be examined")?.len() != expected {
        return Err("its size has changed");
    }
    let mut block = [0; erofs::BLOCK_BYTES];
    file.read_exact_at(&mut block, 0).map_err(|_| "it cannot be read")?;
    if erofs::image_size(&block) == Some(expected) { Ok(()) } else { Err("its superblock is not intact") }
}

fn remove_others(directory: &Path, keep: &HashSet<PathBuf>) -> Result<u64, Error> {
    let mut freed = 0;
    for entry in std::fs::read_dir(directory).map_err(failed("reading", directory))? {
        let path = entry.map_err(failed("reading", directory))?.path();
        if !keep.contains(&path) {
            freed += std::fs::metadata(&path).map_or(0, |found| found.len());
            std::fs::remove_file(&path).map_err(failed("removing", &path))?;
        }
    }
    Ok(freed)
}

fn damaged(image: &Digest, path: &Path, what: &'static str) -> Error {
    Error::Damaged { image: image.clone(), path: path.into(), what }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| Error::Io { action, path, source }
}

/// Makes a finished rename durable.
fn sync_directory(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(failed("syncing", path))
}

impl ImageRecord {
    fn named(names: impl IntoIterator<Item = String>, layers: Vec<Digest>) -> Self {
        Self { names: names.into_iter().collect(), layers }
    }
}
