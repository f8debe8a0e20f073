//! What manifests, indexes and configurations say: which image of an index runs here, and which layers it has.

use oci_spec::image::{Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os};
use serde::de::{DeserializeOwned, Error as _};

use super::digest::Digest;
use super::{Error, FoundImage, FoundLayer};
use crate::excerpt::excerpt;

/// Indexes may contain indexes, this deep.
pub(super) const NESTING_MAX: usize = 4;
/// Manifests that one source may list.
pub(super) const MANIFESTS_MAX: usize = 1000;

/// Layers of an image: what the partitions of a container's disk can hold, so that no image is converted which then does
/// not start. Docker's own limit is 127.
pub(super) const LAYERS_MAX: usize = 128;

/// What a descriptor points at.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target {
    Index,
    Manifest,
    /// An artifact, or what else may be in an index.
    Other,
}

pub(super) fn target(media_type: &MediaType) -> Target {
    match media_type {
        MediaType::ImageIndex => Target::Index,
        MediaType::ImageManifest => Target::Manifest,
        MediaType::Other(docker) => match docker.as_str() {
            "application/vnd.docker.distribution.manifest.list.v2+json" => Target::Index,
            "application/vnd.docker.distribution.manifest.v2+json" => Target::Manifest,
            _ => Target::Other,
        },
        _ => Target::Other,
    }
}

/// Gets a document by its descriptor, verified.
pub(super) type Fetch<'a> = dyn FnMut(&Descriptor) -> Result<Vec<u8>, Error> + 'a;

pub(super) fn parse<T: DeserializeOwned>(
    name: &str,
    what: &'static str,
    document: &[u8],
) -> Result<T, Error> {
    serde_json::from_slice(document).map_err(|error| {
        // It quotes what it does not expect.
        let source = serde_json::Error::custom(excerpt(&error.to_string()));
        Error::Json { name: name.into(), what, source }
    })
}

/// The name of a blob in messages and in layouts.
pub(super) fn digest_of(descriptor: &Descriptor) -> Result<Digest, Error> {
    let digest = descriptor.digest().to_string();
    let name = format!("a blob of type {}", excerpt(descriptor.media_type().as_ref()));
    digest.parse().map_err(|_| Error::Digest { name, digest: excerpt(&digest) })
}

/// The images that the manifests of an index describe, if they run here. `names` finds the names of an image in its
/// descriptor.
///
/// An index that is itself in the index stands for one image with builds for several platforms.
pub(super) fn images_of_index(
    index: &ImageIndex,
    names: &dyn Fn(&Descriptor) -> Vec<String>,
    fetch: &mut Fetch<'_>,
) -> Result<Vec<FoundImage>, Error> {
    let mut walk = Walk { fetch, manifests: 0, others: Vec::new() };
    let mut images = Vec::new();
    for descriptor in index.manifests() {
        let found = walk.image(descriptor, NESTING_MAX)?;
        images.extend(found.map(|image| FoundImage { names: names(descriptor), ..image }));
    }
    if images.is_empty() {
        return Err(walk.nothing());
    }
    Ok(images)
}

/// The one image that a descriptor leads to, through an index or not.
#[cfg(feature = "registry")]
pub(super) fn image_of(descriptor: &Descriptor, fetch: &mut Fetch<'_>) -> Result<FoundImage, Error> {
    let mut walk = Walk { fetch, manifests: 0, others: Vec::new() };
    match walk.image(descriptor, NESTING_MAX)? {
        Some(image) => Ok(image),
        None => Err(walk.nothing()),
    }
}

struct Walk<'a, 'b> {
    fetch: &'a mut Fetch<'b>,
    manifests: usize,
    /// Platforms that were passed over.
    others: Vec<String>,
}

impl Walk<'_, '_> {
    fn image(&mut self, descriptor: &Descriptor, depth: usize) -> Result<Option<FoundImage>, Error> {
        self.manifests += 1;
        if self.manifests > MANIFESTS_MAX {
            return Err(Error::TooManyManifests { limit: MANIFESTS_MAX });
        }
        match target(descriptor.media_type()) {
            Target::Other => Ok(None),
            Target::Manifest => self.manifest(descriptor),
            Target::Index if depth == 0 => Err(Error::Nesting { limit: NESTING_MAX }),
            Target::Index => {
                let document = (self.fetch)(descriptor)?;
                let index: ImageIndex = parse(descriptor.digest().as_ref(), "image index", &document)?;
                // Newer instruction sets are marked as variants; every CPU runs the build without one.
                let mut manifests: Vec<_> = index.manifests().iter().collect();
                manifests
                    .sort_by_key(|found| found.platform().as_ref().is_some_and(|p| p.variant().is_some()));
                for descriptor in manifests {
                    if let Some(image) = self.image(descriptor, depth - 1)? {
                        return Ok(Some(image));
                    }
                }
                Ok(None)
            }
        }
    }

    fn manifest(&mut self, descriptor: &Descriptor) -> Result<Option<FoundImage>, Error> {
        if let Some(platform) = descriptor.platform()
            && !self.runs_here(platform.os(), platform.architecture())
        {
            return Ok(None);
        }
        let document = (self.fetch)(descriptor)?;
        let name = descriptor.digest().to_string();
        let manifest: ImageManifest = parse(&name, "image manifest", &document)?;
        if !is_config(manifest.config().media_type()) {
            return Err(Error::MediaType {
                name: format!("the configuration of {name}"),
                media_type: excerpt(manifest.config().media_type().as_ref()),
                expected: "a container image's configuration",
            });
        }
        let config = (self.fetch)(manifest.config())?;
        let layers = manifest.layers().iter().map(layer_blob).collect::<Result<_, _>>()?;
        let image = found_image(digest_of(manifest.config())?, config, layers)?;
        let parsed: ImageConfiguration = parse(&image.id.to_string(), "image configuration", &image.config)?;
        Ok(self.runs_here(parsed.os(), parsed.architecture()).then_some(image))
    }

    fn runs_here(&mut self, os: &Os, architecture: &Arch) -> bool {
        if *os == Os::Linux && *architecture == Arch::Amd64 {
            return true;
        }
        let platform = format!("{os}/{architecture}");
        // Attestations of BuildKit hide behind this platform.
        if platform != "unknown/unknown" && !self.others.contains(&platform) {
            self.others.push(platform);
        }
        false
    }

    fn nothing(self) -> Error {
        let available =
            if self.others.is_empty() { "no platform at all".into() } else { self.others.join(", ") };
        Error::Platform { available: excerpt(&available) }
    }
}

/// Puts an image together from its configuration and the blobs of its layers, named or with digest and size.
pub(super) fn found_image(
    id: Digest,
    config: Vec<u8>,
    blobs: Vec<(String, Option<(Digest, u64)>)>,
) -> Result<FoundImage, Error> {
    let parsed: ImageConfiguration = parse(&id.to_string(), "image configuration", &config)?;
    let diff_ids = parsed.rootfs().diff_ids();
    if diff_ids.len() > LAYERS_MAX {
        return Err(Error::TooManyLayers { config: id, layers: diff_ids.len(), limit: LAYERS_MAX });
    }
    if diff_ids.len() != blobs.len() {
        return Err(Error::LayerCount { config: id, diff_ids: diff_ids.len(), layers: blobs.len() });
    }
    let layers = blobs.into_iter().zip(diff_ids).map(|((name, blob), digest)| {
        let diff_id =
            digest.parse().map_err(|_| Error::Digest { name: excerpt(&name), digest: excerpt(digest) })?;
        Ok(FoundLayer { name, blob, diff_id })
    });
    Ok(FoundImage { names: Vec::new(), layers: layers.collect::<Result<_, Error>>()?, id, config })
}

/// Fails if a configuration is for another platform.
pub(super) fn check_platform(image: &FoundImage) -> Result<(), Error> {
    let config: ImageConfiguration = parse(&image.id.to_string(), "image configuration", &image.config)?;
    if *config.os() == Os::Linux && *config.architecture() == Arch::Amd64 {
        return Ok(());
    }
    Err(Error::Platform { available: excerpt(&format!("{}/{}", config.os(), config.architecture())) })
}

fn layer_blob(descriptor: &Descriptor) -> Result<(String, Option<(Digest, u64)>), Error> {
    let digest = digest_of(descriptor)?;
    if is_layer(descriptor.media_type()) {
        return Ok((digest.to_string(), Some((digest, descriptor.size()))));
    }
    Err(Error::MediaType {
        name: format!("layer {digest}"),
        media_type: excerpt(descriptor.media_type().as_ref()),
        expected: "a file system layer",
    })
}

fn is_layer(media_type: &MediaType) -> bool {
    match media_type {
        MediaType::ImageLayer
        | MediaType::ImageLayerGzip
        | MediaType::ImageLayerZstd
        | MediaType::ImageLayerNonDistributable
        | MediaType::ImageLayerNonDistributableGzip
        | MediaType::ImageLayerNonDistributableZstd => true,
        MediaType::Other(docker) => docker.starts_with("application/vnd.docker.image.rootfs."),
        _ => false,
    }
}

fn is_config(media_type: &MediaType) -> bool {
    match media_type {
        MediaType::ImageConfig => true,
        MediaType::Other(docker) => docker == "application/vnd.docker.container.image.v1+json",
        _ => false,
    }
}
