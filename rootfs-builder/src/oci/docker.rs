//! The tar of `docker save` and `podman save`: `manifest.json`, configurations, and layers as tar files.

use std::io::Read;

use serde::Deserialize;

use super::digest::Digest;
use super::files::Files;
use super::manifest::{MANIFESTS_MAX, check_platform, found_image, parse};
use super::{Error, FoundImage, FoundLayer, ImageSource};
use crate::excerpt::excerpt;

pub(super) struct DockerArchive {
    files: Box<dyn Files>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Item {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

impl DockerArchive {
    pub(super) fn new(files: Box<dyn Files>) -> Self {
        Self { files }
    }

    fn document(&self, name: &str) -> Result<Vec<u8>, Error> {
        self.files.document(name).map_err(|source| Error::File { name: excerpt(name), source })
    }
}

impl ImageSource for DockerArchive {
    fn images(&mut self) -> Result<Vec<FoundImage>, Error> {
        let items: Vec<Item> = parse("manifest.json", "list of images", &self.document("manifest.json")?)?;
        if items.len() > MANIFESTS_MAX {
            return Err(Error::TooManyManifests { limit: MANIFESTS_MAX });
        }
        let images = items.into_iter().map(|item| {
            // The identity is computed, not taken from the file's name: the names of the two tools differ.
            let config = self.document(&item.config)?;
            let layers = item.layers.into_iter().map(|name| (name, None)).collect();
            let image = found_image(Digest::of(&config), config, layers)?;
            check_platform(&image)?;
            Ok(FoundImage { names: item.repo_tags.unwrap_or_default(), ..image })
        });
        images.collect()
    }

    fn open_layer(&mut self, layer: &FoundLayer) -> Result<(Box<dyn Read>, u64), Error> {
        self.files.open(&layer.name).map_err(|source| Error::File { name: excerpt(&layer.name), source })
    }
}
