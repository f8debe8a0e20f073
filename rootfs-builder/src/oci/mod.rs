//! Where images come from: an OCI layout (a directory or a tar of it), the tar of `docker save`, or a registry.
//!
//! A source lists its images for linux/amd64 and hands out their layers as streams. Everything in it is untrusted: JSON is
//! bounded, every blob is read through its digest and size, and layers in addition through the `diff_id` of the
//! configuration, which the configuration's digest, the image's identity, covers.

mod compression;
mod digest;
mod docker;
mod files;
mod layout;
mod manifest;
#[cfg(feature = "registry")]
mod registry;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use oci_spec::image::ImageConfiguration;

pub(crate) use compression::decompress;
pub use digest::Digest;
pub(crate) use digest::Hashing;
pub use files::FileError;

/// The largest index, manifest or configuration that is read, in bytes.
pub const JSON_MAX: u64 = 4 << 20;

/// A place to import images from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory or tar file: an OCI image layout, or what `docker save` writes. Which it is shows when it is opened.
    Local(PathBuf),
    /// An image in a registry, by its reference.
    #[cfg(feature = "registry")]
    Registry(String),
}

/// Why an image could not be read from its source.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The source is not there or cannot be read.
    #[error("opening {path:?} failed; give an OCI layout directory or a tar file of `docker save`")]
    Open {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Neither kind of image.
    #[error("{path:?} holds no image: it has neither oci-layout with index.json nor manifest.json")]
    NotAnImage {
        /// Its path.
        path: PathBuf,
    },
    /// A compressed archive of images.
    #[error("{path:?} is compressed as a whole; decompress it first, for example with gunzip or unzstd")]
    Compressed {
        /// Its path.
        path: PathBuf,
    },
    /// A file of the source cannot be used.
    #[error("reading {name} of the image failed")]
    File {
        /// Its name within the source.
        name: String,
        /// Why.
        source: FileError,
    },
    /// A document is not what it should be.
    #[error("{name} is not a valid {what}")]
    Json {
        /// Its name within the source.
        name: String,
        /// What it should be.
        what: &'static str,
        /// Why it is not.
        source: serde_json::Error,
    },
    /// Something with an unknown media type where an image is expected.
    #[error("{name} has the media type {media_type:?}, which is not that of {expected}")]
    MediaType {
        /// The blob.
        name: String,
        /// Its type.
        media_type: String,
        /// What is needed.
        expected: &'static str,
    },
    /// Indexes within indexes.
    #[error("the index of the image is nested more than {limit} levels deep")]
    Nesting {
        /// How deep it may be.
        limit: usize,
    },
    /// More manifests than any image has.
    #[error("the index of the image lists more than {limit} manifests")]
    TooManyManifests {
        /// How many it may list.
        limit: usize,
    },
    /// Nothing that runs here.
    #[error(
        "the image is for {available}, but this machine needs linux/amd64; import a build for that platform"
    )]
    Platform {
        /// The platforms that it is for.
        available: String,
    },
    /// A manifest and a configuration that disagree.
    #[error("the configuration {config} names {diff_ids} layers, but the manifest has {layers}")]
    LayerCount {
        /// Digest of the configuration.
        config: Digest,
        /// Layers in the configuration.
        diff_ids: usize,
        /// Layers in the manifest.
        layers: usize,
    },
    /// More layers than a container can have.
    #[error("the image {config} has {layers} layers, more than the {limit} possible; squash it into fewer")]
    TooManyLayers {
        /// Digest of the configuration.
        config: Digest,
        /// How many it has.
        layers: usize,
        /// How many it may have.
        limit: usize,
    },
    /// A digest that is none, or of an unknown algorithm.
    #[error("{name} has the digest {digest:?}; only sha256 digests are supported")]
    Digest {
        /// What has it.
        name: String,
        /// The digest.
        digest: String,
    },
    /// The registry did not deliver.
    #[cfg(feature = "registry")]
    #[error(transparent)]
    Registry(#[from] registry::RegistryError),
}

#[cfg(feature = "registry")]
pub use registry::RegistryError;

/// An image as its source describes it.
pub(crate) struct FoundImage {
    /// Names in the source, not normalised.
    pub(crate) names: Vec<String>,
    /// Digest of the configuration: the image's identity.
    pub(crate) id: Digest,
    pub(crate) config: Vec<u8>,
    /// Bottom first.
    pub(crate) layers: Vec<FoundLayer>,
}

/// A layer of an image, not yet read.
#[derive(Clone)]
pub(crate) struct FoundLayer {
    /// Its name within the source, and in messages.
    pub(crate) name: String,
    /// Digest and size of the blob; `docker save` tells neither.
    pub(crate) blob: Option<(Digest, u64)>,
    /// Digest of the uncompressed archive.
    pub(crate) diff_id: Digest,
}

/// An open source.
pub(crate) trait ImageSource {
    /// The images in it that run here.
    fn images(&mut self) -> Result<Vec<FoundImage>, Error>;
    /// The blob of a layer as it is stored, unverified, and its size.
    fn open_layer(&mut self, layer: &FoundLayer) -> Result<(Box<dyn Read>, u64), Error>;
}

impl Source {
    pub(crate) fn open(&self) -> Result<Box<dyn ImageSource>, Error> {
        match self {
            Self::Local(path) => open_local(path),
            #[cfg(feature = "registry")]
            Self::Registry(reference) => Ok(Box::new(registry::Registry::new(reference)?)),
        }
    }
}

fn open_local(path: &Path) -> Result<Box<dyn ImageSource>, Error> {
    let open = |source| Error::Open { path: path.into(), source };
    let files: Box<dyn files::Files> = if std::fs::metadata(path).map_err(open)?.is_dir() {
        Box::new(files::Directory::open(path).map_err(open)?)
    } else {
        let file = File::open(path).map_err(open)?;
        if compression::is_compressed(&file).map_err(open)? {
            return Err(Error::Compressed { path: path.into() });
        }
        Box::new(
            files::TarFile::new(file)
                .map_err(|source| Error::File { name: path.display().to_string(), source })?,
        )
    };
    if files.has("oci-layout") && files.has("index.json") {
        Ok(Box::new(layout::Layout::new(files)))
    } else if files.has("manifest.json") {
        Ok(Box::new(docker::DockerArchive::new(files)))
    } else {
        Err(Error::NotAnImage { path: path.into() })
    }
}

/// Parses a configuration whose digest was checked.
pub(crate) fn parse_config(name: &str, config: &[u8]) -> Result<ImageConfiguration, Error> {
    manifest::parse(name, "image configuration", config)
}
