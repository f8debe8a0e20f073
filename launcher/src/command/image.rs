//! `image`: the images that containers are made from.

use std::path::Path;

use bulkhead_rootfs_builder::oci::Source;
use bulkhead_rootfs_builder::store::{Image, Phase, Store};
use bulkhead_sandbox::paths::Paths;
use bulkhead_sandbox::size::Size;
use rustix::process::{Resource, Rlimit, setrlimit};

use super::table::table;
use crate::cli::ImageCommand;
use crate::failure::Failure;
use crate::message;
use crate::progress::Progress;

/// Memory for an import from a registry, in bytes: many times what one takes.
const REGISTRY_MEMORY: u64 = 1 << 30;
/// Digits of a digest in a table.
const DIGEST_DIGITS: usize = 12;

/// Imports, lists or removes images.
pub(crate) fn image(command: &ImageCommand) -> Result<u8, Failure> {
    let store = Store::open(Paths::from_environment().images())?;
    match command {
        ImageCommand::Import { name, source } => import(&store, name.as_deref(), &parse_source(source)),
        ImageCommand::Ls { json } => list(&store, *json),
        ImageCommand::Rm { images } => {
            for image in images {
                let removed = store.remove(image)?;
                message::result(&format!("{image}: {} freed\n", Size(removed.freed)));
            }
            Ok(0)
        }
    }
}

/// A source as the user names it: with the prefix that skopeo and podman use for registries, or else a path.
fn parse_source(source: &Path) -> Source {
    match source.to_str().and_then(|text| text.strip_prefix("docker://")) {
        Some(reference) => Source::Registry(reference.to_owned()),
        None => Source::Local(source.to_owned()),
    }
}

fn import(store: &Store, name: Option<&str>, source: &Source) -> Result<u8, Failure> {
    if matches!(source, Source::Registry(_)) {
        // oci-client reads manifests and tokens whole, however long a registry makes them: that must not be the host's memory.
        let bound = Some(REGISTRY_MEMORY);
        setrlimit(Resource::Data, Rlimit { current: bound, maximum: bound })?;
    }
    let mut progress = Progress::start();
    let images = store.import(source, name, &mut |now| {
        progress.show(|| match now.phase {
            Phase::Examining => "examining the source".into(),
            Phase::Layer { number, count } => {
                format!("layer {number} of {count}: {} of {}", Size(now.done), Size(now.total))
            }
            Phase::Storing => "writing to disk".into(),
        });
    });
    drop(progress);
    for image in images? {
        let name = image.names.first().cloned().unwrap_or_else(|| image.digest.to_string());
        message::result(&format!("{name}\n"));
    }
    Ok(0)
}

fn list(store: &Store, json: bool) -> Result<u8, Failure> {
    let mut images = Vec::new();
    let mut damaged = false;
    for image in store.list()? {
        match image {
            Ok(image) => images.push(image),
            Err(error) => {
                message::warn(&Failure::from(error).to_string());
                damaged = true;
            }
        }
    }
    if json {
        let rows: Vec<serde_json::Value> = images.iter().map(as_json).collect();
        message::result(&format!("{}\n", serde_json::to_string_pretty(&rows)?));
    } else {
        message::result(&text(&images));
    }
    Ok(u8::from(damaged))
}

fn as_json(image: &Image) -> serde_json::Value {
    serde_json::json!({
        "digest": image.digest.to_string(),
        "names": image.names,
        "layers": image.layers.len(),
        "size_bytes": image.size,
    })
}

fn text(images: &[Image]) -> String {
    let mut lines = vec![["NAME", "DIGEST", "LAYERS", "SIZE"].map(str::to_owned).to_vec()];
    for image in images {
        let digest: String = image.digest.hex().chars().take(DIGEST_DIGITS).collect();
        let unnamed = ["<none>".to_owned()];
        let names = if image.names.is_empty() { &unnamed[..] } else { &image.names };
        for name in names {
            lines.push(vec![
                name.clone(),
                digest.clone(),
                image.layers.len().to_string(),
                Size(image.size).to_string(),
            ]);
        }
    }
    table(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_path_unless_it_names_a_registry() {
        let registry = Source::Registry("quay.io/org/app:1".into());
        assert_eq!(parse_source(Path::new("docker://quay.io/org/app:1")), registry);
        assert_eq!(parse_source(Path::new("docker/app.tar")), Source::Local("docker/app.tar".into()));
    }
}
