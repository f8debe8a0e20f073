//! OCI image layouts, written by hand.

use std::fs::{create_dir_all, write};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_rootfs_builder::oci::Digest;
use serde_json::{Value, json};

use crate::files::tool;
use crate::vm::Result;

/// An image.
pub struct Image {
    /// Its reference.
    pub name: &'static str,
    /// What it is for.
    pub architecture: &'static str,
    /// What to run, and how.
    pub config: Value,
    /// Uncompressed archives, the lowest first.
    pub layers: Vec<Vec<u8>>,
}

/// A directory as an archive.
pub fn archive(tree: &Path) -> Result<Vec<u8>> {
    tool(Command::new("tar").args(["--sort=name", "--numeric-owner", "-cf", "-", "-C"]).arg(tree).arg("."))
}

impl Image {
    /// Writes it as a layout into an empty directory. Where its layers are, the lowest first.
    pub fn write(&self, directory: &Path) -> Result<Vec<PathBuf>> {
        create_dir_all(directory.join("blobs/sha256"))?;
        let digests: Vec<String> = self.layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
        let config = json!({
            "architecture": self.architecture,
            "os": "linux",
            "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": digests },
        });
        let (config, _) = blob(directory, "config.v1+json", config.to_string().as_bytes())?;
        let layers: Result<Vec<_>> =
            self.layers.iter().map(|layer| blob(directory, "layer.v1.tar", layer)).collect();
        let (layers, paths): (Vec<Value>, Vec<PathBuf>) = layers?.into_iter().unzip();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers,
        });
        let (mut manifest, _) = blob(directory, "manifest.v1+json", manifest.to_string().as_bytes())?;
        manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": self.name });
        let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
        write(directory.join("index.json"), index.to_string())?;
        write(directory.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(paths)
    }
}

/// Writes a blob: its descriptor, and its path.
fn blob(directory: &Path, kind: &str, bytes: &[u8]) -> Result<(Value, PathBuf)> {
    let digest = Digest::of(bytes);
    let path = directory.join("blobs/sha256").join(digest.hex());
    write(&path, bytes)?;
    let descriptor = json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest.to_string(), "size": bytes.len() });
    Ok((descriptor, path))
}
