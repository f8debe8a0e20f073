//! Makes images in all the forms that they come in, right and wrong.

use std::io::Write;
use std::path::Path;

use bulkhead_rootfs_builder::oci::Digest;
use flate2::Compression;
use flate2::write::GzEncoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use serde_json::{Value, json};

use crate::archive::Tar;

pub(crate) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

#[derive(Clone, Copy)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

/// The blobs of a layout.
#[derive(Clone, Default)]
pub(crate) struct Blobs(pub(crate) Vec<(Digest, Vec<u8>)>);

impl Blobs {
    /// Adds a blob; its descriptor.
    pub(crate) fn add(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = Digest::of(&bytes);
        let descriptor =
            json!({ "mediaType": media_type, "digest": digest.to_string(), "size": bytes.len() });
        self.0.push((digest, bytes));
        descriptor
    }

    pub(crate) fn json(&mut self, media_type: &str, document: &Value) -> Value {
        self.add(media_type, document.to_string().into_bytes())
    }

    /// Adds an image; the descriptor of its manifest.
    pub(crate) fn image(&mut self, architecture: &str, layers: &[Vec<u8>], packing: Packing) -> Value {
        let config = self.json(CONFIG, &config(architecture, layers));
        let layers: Vec<Value> = layers
            .iter()
            .map(|layer| match packing {
                Packing::Plain => self.add("application/vnd.oci.image.layer.v1.tar", layer.clone()),
                Packing::Gzip => self.add("application/vnd.docker.image.rootfs.diff.tar.gzip", gzip(layer)),
                Packing::Zstd => {
                    let blob = compress_to_vec(&layer[..], CompressionLevel::Fastest);
                    self.add("application/vnd.oci.image.layer.v1.tar+zstd", blob)
                }
            })
            .collect();
        let manifest =
            json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers });
        self.json(MANIFEST, &manifest)
    }

    /// Writes the blobs as a layout with these manifests in its index.
    pub(crate) fn write(&self, directory: &Path, manifests: &[Value]) {
        let blobs = directory.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        std::fs::write(directory.join("index.json"), index(manifests).to_string()).unwrap();
        for (digest, bytes) in &self.0 {
            std::fs::write(blobs.join(digest.hex()), bytes).unwrap();
        }
    }

    /// The same as a tar file.
    pub(crate) fn archive(&self, manifests: &[Value]) -> Vec<u8> {
        let start =
            Tar::default().file("./oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#).directory("blobs");
        let start = start.file("./index.json", index(manifests).to_string().as_bytes());
        self.0
            .iter()
            .fold(start, |tar, (digest, bytes)| tar.file(format!("blobs/sha256/{}", digest.hex()), bytes))
            .end()
    }
}

pub(crate) fn index(manifests: &[Value]) -> Value {
    json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests })
}

pub(crate) fn config(architecture: &str, layers: &[Vec<u8>]) -> Value {
    let diff_ids: Vec<String> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
    json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Cmd": ["/bin/sh"], "Env": ["PATH=/bin"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
}

/// A descriptor with more in it.
pub(crate) fn with(mut descriptor: Value, key: &str, value: Value) -> Value {
    descriptor[key] = value;
    descriptor
}

pub(crate) fn platform(architecture: &str) -> Value {
    json!({ "architecture": architecture, "os": "linux" })
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The layer of an image, with something in it to tell it by.
pub(crate) fn layer(content: &str) -> Vec<u8> {
    Tar::default().directory("etc").file("etc/content", content.as_bytes()).end()
}

/// What `docker save` writes: layers by name, the second time as a link.
pub(crate) fn docker_archive(names: &[&str], layers: &[Vec<u8>]) -> Vec<u8> {
    let config = config("amd64", layers).to_string();
    let manifest: Vec<String> = (0..layers.len()).map(|at| format!("{at}/layer.tar")).collect();
    let manifest = json!([{ "Config": "abc.json", "RepoTags": names, "Layers": manifest }]).to_string();
    let mut tar = Tar::default().file("abc.json", config.as_bytes());
    for (at, layer) in layers.iter().enumerate() {
        tar = match layers[..at].iter().position(|earlier| earlier == layer) {
            Some(earlier) => tar.link(b'2', format!("{at}/layer.tar"), format!("../{earlier}/layer.tar")),
            None => tar.file(format!("{at}/layer.tar"), layer),
        };
    }
    tar.file("manifest.json", manifest.as_bytes()).end()
}
