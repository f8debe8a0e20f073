//! The index of the store, a JSON document.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Error, failed};
use crate::oci::Digest;

const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Index {
    version: u32,
    /// By the digest of their configuration.
    pub(super) images: BTreeMap<Digest, ImageRecord>,
    /// By the digest of their uncompressed archive.
    pub(super) layers: BTreeMap<Digest, LayerRecord>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ImageRecord {
    pub(super) names: BTreeSet<String>,
    /// Bottom first.
    pub(super) layers: Vec<Digest>,
}

/// The EROFS image of a layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LayerRecord {
    /// In bytes.
    pub(super) size: u64,
    /// Of its bytes.
    pub(super) digest: Digest,
}

impl Index {
    /// Reads the index; a missing one is empty.
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let document = match std::fs::read(path) {
            Ok(document) => document,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self { version: VERSION, images: BTreeMap::new(), layers: BTreeMap::new() });
            }
            Err(error) => return Err(failed("reading", path)(error)),
        };
        let index: Self =
            serde_json::from_slice(&document).map_err(|source| Error::Index { path: path.into(), source })?;
        if index.version != VERSION {
            return Err(Error::Version { path: path.into(), found: index.version, expected: VERSION });
        }
        Ok(index)
    }

    /// The document, without layers that no image has.
    pub(super) fn to_json(&self) -> String {
        let used: BTreeSet<&Digest> = self.images.values().flat_map(|image| &image.layers).collect();
        let layers = self.layers.iter().filter(|(digest, _)| used.contains(digest));
        let layers: BTreeMap<&Digest, &LayerRecord> = layers.collect();
        serde_json::json!({ "version": self.version, "images": self.images, "layers": layers }).to_string()
    }

    /// Gives an image a name, which it takes from any other.
    pub(super) fn name(&mut self, digest: &Digest, name: String) {
        for image in self.images.values_mut() {
            image.names.remove(&name);
        }
        if let Some(image) = self.images.get_mut(digest) {
            image.names.insert(name);
        }
    }
}
