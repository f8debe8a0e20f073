//! Images in a registry, without credentials, by the OCI distribution protocol.

use std::future::poll_fn;
use std::io::{self, Read};
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_core::Stream;
use oci_client::Reference;
use oci_client::client::{Client, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth;
use oci_spec::image::{Descriptor, MediaType};
use serde::Deserialize;
use tokio::runtime::{Builder, Runtime};

use super::digest::Digest;
use super::files::FileError;
use super::manifest::{Target, image_of, parse, target};
use super::{Error, FoundImage, FoundLayer, ImageSource, JSON_MAX, layout};
use crate::excerpt::excerpt;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a registry may be silent in the middle of a blob.
const READ_TIMEOUT: Duration = Duration::from_mins(1);
const MANIFEST_TYPES: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

/// Why a registry did not deliver.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Not a reference.
    #[error("{reference:?} is not an image reference such as debian:13 or quay.io/org/image:tag")]
    Reference {
        /// As it was given.
        reference: String,
        /// Why not.
        source: oci_client::ParseError,
    },
    /// No client could be made.
    #[error("setting up the client of the registry failed")]
    Setup(#[source] io::Error),
    /// Asking the registry failed.
    #[error(
        "getting {what} of {reference} from its registry failed; check the name, the network, and that it is public"
    )]
    Request {
        /// What was asked for.
        what: String,
        /// The image.
        reference: String,
        /// Why.
        source: Box<OciDistributionError>,
    },
}

pub(super) struct Registry {
    // Streams that are handed out need it as long as they live.
    runtime: Rc<Runtime>,
    client: Client,
    reference: Reference,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Typed {
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
}

impl Registry {
    pub(super) fn new(reference: &str) -> Result<Self, Error> {
        let parsed = reference.parse();
        let reference: Reference =
            parsed.map_err(|source| RegistryError::Reference { reference: reference.into(), source })?;
        // Fails only if another part of the process has chosen one, which then serves as well.
        drop(rustls::crypto::ring::default_provider().install_default());
        let runtime = Builder::new_current_thread().enable_all().build().map_err(RegistryError::Setup)?;
        // As Docker does: no TLS on the loopback interface.
        let registry = reference.resolve_registry();
        let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
        let local = host == "localhost" || host.starts_with("127.");
        let client = Client::new(ClientConfig {
            protocol: if local { ClientProtocol::Http } else { ClientProtocol::Https },
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: concat!("bulkhead/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        });
        Ok(Self { runtime: Rc::new(runtime), client, reference })
    }

    fn manifest(&self, reference: &Reference) -> Result<Vec<u8>, Error> {
        let request = self.client.pull_manifest_raw(reference, &RegistryAuth::Anonymous, &MANIFEST_TYPES);
        let (document, _) =
            self.runtime.block_on(request).map_err(|source| self.failed("the manifest".into(), source))?;
        Ok(document.into())
    }

    fn blob(&self, digest: &str) -> Result<BlobReader, Error> {
        let request = self.client.pull_blob_stream(&self.reference, digest);
        let stream = self.runtime.block_on(request).map_err(|source| self.failed(digest.into(), source))?;
        Ok(BlobReader {
            runtime: self.runtime.clone(),
            stream: stream.stream,
            chunk: Bytes::new(),
            ended: false,
        })
    }

    fn failed(&self, what: String, source: OciDistributionError) -> RegistryError {
        RegistryError::Request { what, reference: self.reference.whole(), source: Box::new(source) }
    }

    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>, Error> {
        let digest = super::manifest::digest_of(descriptor)?;
        let name = digest.to_string();
        let document = if target(descriptor.media_type()) == Target::Other {
            let mut document = Vec::new();
            let read = self.blob(&name)?.take(JSON_MAX).read_to_end(&mut document);
            read.map_err(|source| Error::File { name: name.clone(), source: source.into() })?;
            document
        } else {
            self.manifest(&self.reference.clone_with_digest(name.clone()))?
        };
        layout::check(document, &digest, descriptor.size()).map_err(|source| Error::File { name, source })
    }
}

impl ImageSource for Registry {
    fn images(&mut self) -> Result<Vec<FoundImage>, Error> {
        let name = self.reference.whole();
        let root = self.manifest(&self.reference)?;
        let actual = Digest::of(&root);
        if let Some(expected) = self.reference.digest() {
            let unsupported = |_| Error::Digest { name: name.clone(), digest: excerpt(expected) };
            let expected: Digest = expected.parse().map_err(unsupported)?;
            if expected != actual {
                return Err(Error::File { name, source: FileError::Digest { expected, actual } });
            }
        }
        let typed: Typed = parse(&name, "image manifest or index", &root)?;
        let media_type = match (typed.media_type, typed.manifests) {
            (Some(media_type), _) => MediaType::from(media_type.as_str()),
            (None, Some(_)) => MediaType::ImageIndex,
            (None, None) => MediaType::ImageManifest,
        };
        if target(&media_type) == Target::Other {
            let expected = "a container image";
            return Err(Error::MediaType { name, media_type: excerpt(media_type.as_ref()), expected });
        }
        let digest = oci_spec::image::Digest::try_from(actual.to_string()).expect("made by us");
        let descriptor = Descriptor::new(media_type, root.len() as u64, digest);
        let image = image_of(&descriptor, &mut |wanted| {
            if wanted == &descriptor { Ok(root.clone()) } else { self.document(wanted) }
        })?;
        Ok(vec![FoundImage { names: vec![name], ..image }])
    }

    fn open_layer(&mut self, layer: &FoundLayer) -> Result<(Box<dyn Read>, u64), Error> {
        let (digest, size) = layer.blob.as_ref().expect("registries tell the digests of all blobs");
        Ok((Box::new(self.blob(&digest.to_string())?), *size))
    }
}

/// A blob on its way, read from a thread that may block.
struct BlobReader {
    runtime: Rc<Runtime>,
    stream: Pin<Box<dyn Stream<Item = Result<Bytes, io::Error>> + Send>>,
    chunk: Bytes,
    /// The stream must not be asked again: it checks the digest each time that it ends.
    ended: bool,
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() && !buffer.is_empty() && !self.ended {
            let next = self.runtime.block_on(poll_fn(|context| self.stream.as_mut().poll_next(context)));
            self.ended = next.is_none();
            self.chunk = next.transpose()?.unwrap_or_default();
        }
        let count = buffer.len().min(self.chunk.len());
        buffer[..count].copy_from_slice(&self.chunk.split_to(count));
        Ok(count)
    }
}
