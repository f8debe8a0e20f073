//! The image with a large file, and the bundle that has the same root: busybox's layer, and one with the file and this program.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_tests::bulkhead::bulkhead;
use bulkhead_tests::vm::{Result, artifact};
use serde_json::{Value, json};

use crate::repeat::{stdout_of, timed};

/// The image's reference.
pub(crate) const NAME: &str = "bench:1";
/// The large file in it.
pub(crate) const DATA: &str = "/data";
/// This program in it.
pub(crate) const HELPER: &str = "/lab-bench";

const DATA_SIZE: usize = 256 << 20;
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// Makes and imports the image in `directory`. Only the directory `bundle`, with its `rootfs`, stays there.
pub(crate) fn make(directory: &Path) -> Result<PathBuf> {
    let (layout, bundle) = (Layout(directory.join("layout")), directory.join("bundle"));
    let rootfs = bundle.join("rootfs");
    fs::create_dir_all(&layout.0)?;
    fs::create_dir_all(&rootfs)?;
    timed(
        Command::new("tar")
            .arg("-xf")
            .arg(artifact("share/bulkhead-tests/busybox.tar"))
            .arg("-C")
            .arg(&layout.0),
    )?;

    let index = layout.document("index.json")?;
    let manifest = layout.document(&blob(&index["manifests"][0]["digest"])?)?;
    let lower = layout.0.join(blob(&manifest["layers"][0]["digest"])?);
    timed(Command::new("tar").arg("-xzf").arg(lower).arg("-C").arg(&rootfs))?;

    let added = [DATA, HELPER].map(|path| path.trim_start_matches('/'));
    write_data(&rootfs.join(added[0]))?;
    fs::copy(std::env::current_exe()?, rootfs.join(added[1]))?;
    let layer = directory.join("layer.tar");
    timed(Command::new("tar").arg("-cf").arg(&layer).arg("-C").arg(&rootfs).args(added))?;
    layout.add_layer(index, manifest, &layer)?;

    timed(bulkhead(["image", "import"]).arg(&layout.0))?;
    fs::remove_dir_all(&layout.0)?;
    Ok(bundle)
}

/// Bytes that no file system stores in less than their size.
pub(crate) fn write_data(path: &Path) -> Result {
    let mut file = BufWriter::new(File::create(path)?);
    let mut state = SEED;
    for _ in 0..DATA_SIZE / size_of::<u64>() {
        // Marsaglia's xorshift.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&state.to_le_bytes())?;
    }
    Ok(file.flush()?)
}

/// The directory of an OCI image layout with one image.
struct Layout(PathBuf);

impl Layout {
    fn document(&self, name: &str) -> Result<Value> {
        Ok(serde_json::from_slice(&fs::read(self.0.join(name))?)?)
    }

    /// Puts a layer on top of the image, which is [`NAME`] then.
    fn add_layer(&self, mut index: Value, mut manifest: Value, layer: &Path) -> Result {
        let mut config = self.document(&blob(&manifest["config"]["digest"])?)?;
        let layer = self.store(layer, "application/vnd.oci.image.layer.v1.tar")?;
        append(&mut config["rootfs"]["diff_ids"], layer["digest"].clone())?;
        append(&mut manifest["layers"], layer)?;
        manifest["config"] = self.store_json(&config, "application/vnd.oci.image.config.v1+json")?;
        let mut descriptor = self.store_json(&manifest, "application/vnd.oci.image.manifest.v1+json")?;
        descriptor["annotations"] = json!({ "org.opencontainers.image.ref.name": NAME });
        index["manifests"] = json!([descriptor]);
        Ok(fs::write(self.0.join("index.json"), index.to_string())?)
    }

    fn store_json(&self, document: &Value, media_type: &str) -> Result<Value> {
        let file = self.0.join("new");
        fs::write(&file, document.to_string())?;
        self.store(&file, media_type)
    }

    /// Moves a file in and returns its descriptor.
    fn store(&self, file: &Path, media_type: &str) -> Result<Value> {
        let sum = stdout_of(Command::new("sha256sum").arg(file))?;
        let digest = format!("sha256:{}", sum.split_whitespace().next().unwrap_or_default());
        let size = fs::metadata(file)?.len();
        fs::rename(file, self.0.join(blob(&json!(digest))?))?;
        Ok(json!({ "mediaType": media_type, "digest": digest, "size": size }))
    }
}

/// Where a layout has the blob of a digest.
fn blob(digest: &Value) -> Result<String> {
    let digest = digest.as_str().ok_or("a descriptor without a digest")?;
    Ok(format!("blobs/{}", digest.replace(':', "/")))
}

fn append(array: &mut Value, value: Value) -> Result {
    array.as_array_mut().ok_or("an image without layers")?.push(value);
    Ok(())
}
