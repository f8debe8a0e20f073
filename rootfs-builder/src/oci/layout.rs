//! OCI image layouts (OCI image specification, "Image Layout").

use std::io::Read;

use oci_spec::image::{Descriptor, ImageIndex};

use super::digest::Digest;
use super::files::{FileError, Files};
use super::manifest::{digest_of, images_of_index, parse};
use super::{Error, FoundImage, FoundLayer, ImageSource, JSON_MAX};

/// containerd and Docker put the whole reference here.
const NAME_FULL: &str = "io.containerd.image.name";
/// The specification's own: a whole reference, or a bare tag.
const NAME: &str = "org.opencontainers.image.ref.name";

pub(super) struct Layout {
    files: Box<dyn Files>,
}

impl Layout {
    pub(super) fn new(files: Box<dyn Files>) -> Self {
        Self { files }
    }

    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        let digest = digest_of(descriptor)?;
        let document = self.files.document(&blob_name(&digest));
        let checked = document.and_then(|document| check(document, &digest, descriptor.size()));
        checked.map_err(|source| Error::File { name: digest.to_string(), source })
    }
}

impl ImageSource for Layout {
    fn images(&mut self) -> Result<Vec<FoundImage>, Error> {
        let name = "index.json";
        let index = self.files.document(name).map_err(|source| Error::File { name: name.into(), source })?;
        let index: ImageIndex = parse(name, "image index", &index)?;
        images_of_index(&index, &names, &mut |descriptor| self.document(descriptor))
    }

    fn open_layer(&mut self, layer: &FoundLayer) -> Result<(Box<dyn Read>, u64), Error> {
        let (digest, _) = layer.blob.as_ref().expect("layouts tell the digests of all blobs");
        self.files.open(&blob_name(digest)).map_err(|source| Error::File { name: layer.name.clone(), source })
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Checks a document against its descriptor.
pub(super) fn check(document: Vec<u8>, digest: &Digest, size: u64) -> Result<Vec<u8>, FileError> {
    let (actual, length) = (Digest::of(&document), document.len() as u64);
    if size > JSON_MAX {
        Err(FileError::TooLarge { size, limit: JSON_MAX })
    } else if length != size {
        Err(FileError::Size { expected: size, actual: length })
    } else if actual != *digest {
        Err(FileError::Digest { expected: digest.clone(), actual })
    } else {
        Ok(document)
    }
}

/// The names of an image in its descriptor. A bare tag names nothing by itself, so such an image stays nameless.
fn names(descriptor: &Descriptor) -> Vec<String> {
    let annotation = |key| descriptor.annotations().as_ref().and_then(|all| all.get(key));
    let bare_tag = |name: &&String| name.contains([':', '/', '@']);
    annotation(NAME_FULL).or_else(|| annotation(NAME).filter(bare_tag)).cloned().into_iter().collect()
}
