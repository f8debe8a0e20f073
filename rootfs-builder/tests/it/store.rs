//! The image store, from sources of every kind.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bulkhead_rootfs_builder::oci::Source;
use bulkhead_rootfs_builder::store::{Error, Image, Phase, Store};
use bulkhead_rootfs_builder::tar::Limits;
use serde_json::json;

use crate::oci::{Blobs, INDEX, MANIFEST, Packing, docker_archive, gzip, index, layer, platform, with};
use crate::tree::{Content, read_image};

struct Bench {
    directory: tempfile::TempDir,
    store: Store,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().join("store")).unwrap();
        Self { directory, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn import(&self, path: &Path, name: Option<&str>) -> Result<Vec<Image>, Error> {
        self.store.import(&Source::Local(path.into()), name, &mut |_| {})
    }

    /// Imports a layout of these blobs and manifests.
    fn layout(&self, blobs: &Blobs, manifests: &[serde_json::Value]) -> Result<Vec<Image>, Error> {
        let path = tempfile::tempdir_in(self.directory.path()).unwrap().keep();
        blobs.write(&path, manifests);
        self.import(&path, None)
    }

    fn file(&self, bytes: &[u8], name: Option<&str>) -> Result<Vec<Image>, Error> {
        let path = self.path("archive.tar");
        std::fs::write(&path, bytes).unwrap();
        self.import(&path, name)
    }

    /// All files of the store but its lock and index.
    fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        for directory in ["configs", "layers", "work"] {
            files.extend(
                std::fs::read_dir(self.path("store").join(directory)).unwrap().map(|e| e.unwrap().path()),
            );
        }
        files
    }
}

/// The whole chain of an error, as a user sees it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

fn failure(result: Result<Vec<Image>, Error>) -> String {
    chain(&result.unwrap_err())
}

fn named(name: &str) -> serde_json::Value {
    json!({ "org.opencontainers.image.ref.name": name })
}

#[test]
fn the_same_image_in_every_form_is_one_image() {
    let bench = Bench::new();
    let layers = [layer("lower"), layer("upper")];
    let mut digests = Vec::new();
    for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
        let mut blobs = Blobs::default();
        let manifest = blobs.image("amd64", &layers, packing);
        // Twice: once as a directory, once as a tar.
        digests.push(bench.layout(&blobs, std::slice::from_ref(&manifest)).unwrap()[0].digest.clone());
        digests.push(bench.file(&blobs.archive(&[manifest]), None).unwrap()[0].digest.clone());
    }
    let image = bench.file(&docker_archive(&["debian:13"], &layers), None).unwrap().remove(0);
    digests.push(image.digest.clone());
    assert!(digests.iter().all(|digest| *digest == image.digest), "{digests:?}");
    assert_eq!(image.names, ["docker.io/library/debian:13"]);
    assert_eq!(image.config.config().as_ref().unwrap().cmd().as_deref(), Some(&["/bin/sh".to_string()][..]));
    assert_eq!(image.layers.len(), 2);
    for (path, content) in image.layers.iter().zip(["lower", "upper"]) {
        assert_eq!(read_image(path)[&b"etc/content"[..]].content, Content(content.as_bytes().to_vec()));
    }
    assert_eq!(bench.files().len(), 3);
    assert_eq!(image.size, image.layers.iter().map(|path| path.metadata().unwrap().len()).sum::<u64>());
    bench.store.verify("debian:13").unwrap();
}

#[test]
fn images_are_found_as_users_name_them() {
    let bench = Bench::new();
    let mut blobs = Blobs::default();
    let one = with(blobs.image("amd64", &[layer("one")], Packing::Plain), "annotations", named("team/app:1"));
    let two = with(blobs.image("amd64", &[layer("two")], Packing::Plain), "annotations", named("latest"));
    let images = bench.layout(&blobs, &[one.clone(), two]).unwrap();
    // A bare tag is no name.
    assert_eq!((images[0].names.len(), images[1].names.len()), (1, 0));
    let find = |reference: &str| bench.store.resolve(reference).map(|image| image.digest);
    assert_eq!(find("team/app:1").unwrap(), images[0].digest);
    assert_eq!(find("docker.io/team/app:1").unwrap(), images[0].digest);
    assert_eq!(find(&images[1].digest.to_string()).unwrap(), images[1].digest);
    assert_eq!(find(&images[1].digest.hex()[..12]).unwrap(), images[1].digest);
    assert!(matches!(find("team/app:2"), Err(Error::Unknown { .. })));
    assert!(matches!(find("sha256:0000000000"), Err(Error::Unknown { .. })));
    assert!(matches!(find("No Name"), Err(Error::Name { .. })));
    assert_eq!(bench.store.list().unwrap().len(), 2);

    // A name moves to the image that is imported with it.
    let moved = bench.layout(&Blobs(blobs.0.clone()), &[one]).unwrap();
    assert_eq!(moved[0].names, ["docker.io/team/app:1"]);
    let three = bench.file(&docker_archive(&[], &[layer("three")]), Some("team/app:1")).unwrap();
    assert_eq!(find("team/app:1").unwrap(), three[0].digest);
    assert_eq!(bench.store.resolve(&images[0].digest.to_string()).unwrap().names.len(), 0);
}

#[test]
fn a_name_for_several_images_is_refused() {
    let bench = Bench::new();
    let mut blobs = Blobs::default();
    let manifests = ["one", "two"].map(|content| blobs.image("amd64", &[layer(content)], Packing::Plain));
    let result = bench.file(&blobs.archive(&manifests), Some("name"));
    assert!(matches!(result, Err(Error::SeveralImages { count: 2, .. })));
}

#[test]
fn the_build_for_this_platform_is_chosen() {
    let bench = Bench::new();
    let mut blobs = Blobs::default();
    let build = |blobs: &mut Blobs, architecture: &str, content: &str| {
        let manifest = blobs.image(architecture, &[layer(content)], Packing::Gzip);
        with(manifest, "platform", platform(architecture))
    };
    let arm = build(&mut blobs, "arm64", "arm");
    let newer = build(&mut blobs, "amd64", "newer");
    let newer = with(newer, "platform", json!({ "architecture": "amd64", "os": "linux", "variant": "v3" }));
    let amd = build(&mut blobs, "amd64", "amd");
    let attestation = blobs.json(MANIFEST, &json!({ "what": "ever" }));
    let attestation = with(attestation, "platform", json!({ "architecture": "unknown", "os": "unknown" }));
    let inner = blobs.json(INDEX, &index(&[attestation, arm.clone(), newer, amd]));
    let images = bench.layout(&blobs, &[with(inner, "annotations", named("multi:1"))]).unwrap();
    assert_eq!(images.len(), 1);
    assert_eq!(images[0].names, ["docker.io/library/multi:1"]);
    assert_eq!(read_image(&images[0].layers[0])[&b"etc/content"[..]].content, Content(b"amd".to_vec()));

    let text = failure(bench.layout(&blobs, &[arm]));
    assert!(text.contains("is for linux/arm64, but this machine needs linux/amd64"), "{text}");
    // Without a platform in the index the configuration tells.
    let mut blobs = Blobs::default();
    let bare = blobs.image("riscv64", &[layer("x")], Packing::Plain);
    assert!(failure(bench.layout(&blobs, &[bare])).contains("linux/riscv64"));
}

#[test]
fn damaged_sources_are_refused_and_leave_nothing() {
    let bench = Bench::new();
    let mut good = Blobs::default();
    let manifest = good.image("amd64", &[layer("content")], Packing::Gzip);
    // Blobs are added in the order configuration, layer, manifest.
    for (at, cut, expected) in [
        (0, false, "its digest is"),
        (0, true, "bytes, not"),
        (1, false, "its digest is"),
        (1, true, "bytes, not"),
        (2, false, "its digest is"),
    ] {
        let mut blobs = good.clone();
        let bytes = &mut blobs.0[at].1;
        if cut {
            bytes.pop();
        } else {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
        }
        let text = failure(bench.layout(&blobs, std::slice::from_ref(&manifest)));
        assert!(text.contains(expected), "blob {at}: {text}");
    }
    for at in 0..3 {
        let mut blobs = good.clone();
        let (digest, _) = blobs.0.remove(at);
        let text = failure(bench.layout(&blobs, std::slice::from_ref(&manifest)));
        assert!(text.contains("it is missing") && text.contains(&digest.to_string()), "blob {at}: {text}");
    }
    // An intact blob that is not what the configuration names.
    let mut lying = docker_archive(&[], &[layer("promised")]);
    let text = {
        let at = lying.windows(8).position(|window| window == b"promised").unwrap();
        lying[at] = b'P';
        failure(bench.file(&lying, None))
    };
    assert!(text.contains("its uncompressed digest is"), "{text}");

    let mut no_tar = Blobs::default();
    let manifest = no_tar.image("amd64", &[b"this is text".to_vec()], Packing::Gzip);
    let text = failure(bench.layout(&no_tar, &[manifest]));
    assert!(text.contains("this is not a tar archive"), "{text}");

    let mut hostile = Blobs::default();
    let evil = crate::archive::Tar::default().file("../../etc/passwd", b"x").end();
    let manifest = hostile.image("amd64", &[evil], Packing::Zstd);
    let text = failure(bench.layout(&hostile, &[manifest]));
    assert!(
        text.contains(r#"entry "../../etc/passwd" cannot be used: its name leads out of the root"#),
        "{text}"
    );

    assert_eq!(bench.files(), Vec::<PathBuf>::new());
    assert!(bench.store.list().unwrap().is_empty());
}

#[test]
fn what_is_no_image_says_what_it_is() {
    let bench = Bench::new();
    assert!(failure(bench.import(&bench.path("missing"), None)).contains("opening"));
    assert!(failure(bench.import(bench.directory.path(), None)).contains("holds no image"));
    assert!(failure(bench.file(&gzip(&layer("x")), None)).contains("compressed as a whole"));
    assert!(failure(bench.file(&layer("x"), None)).contains("holds no image"));
    assert!(failure(bench.file(b"text", None)).contains("not a tar archive"));
    let mut blobs = Blobs::default();
    let config = blobs.json("application/vnd.example+json", &json!({}));
    let artifact = blobs.json(MANIFEST, &json!({ "schemaVersion": 2, "config": config, "layers": [] }));
    assert!(
        failure(bench.layout(&blobs, &[artifact])).contains(r#"media type "application/vnd.example+json""#)
    );
    let mut nested = Blobs::default();
    let deepest = nested.image("amd64", &[layer("x")], Packing::Plain);
    let deep = (0..8).fold(deepest, |inner, _| nested.json(INDEX, &index(&[inner])));
    assert!(failure(bench.layout(&nested, &[deep])).contains("nested more than"));
}

#[test]
fn too_many_layers_are_refused_before_any_is_read() {
    let bench = Bench::new();
    let most: Vec<Vec<u8>> = (0..128).map(|at| layer(&at.to_string())).collect();
    let import = |layers: &[Vec<u8>]| {
        let path = bench.path("archive.tar");
        std::fs::write(&path, docker_archive(&[], layers)).unwrap();
        let mut last = None;
        let result = bench.store.import(&Source::Local(path), None, &mut |now| last = Some(now.phase));
        (result, last)
    };
    let (refused, last) = import(&[&most[..], &[layer("more")]].concat());
    let text = failure(refused);
    assert!(text.contains("129 layers, more than the 128 possible"), "{text}");
    assert_eq!(last, Some(Phase::Examining));
    assert_eq!(import(&most).0.unwrap()[0].layers.len(), 128);
}

#[test]
fn an_unpacked_archive_names_no_files_of_the_host() {
    let bench = Bench::new();
    let (root, config, content) = (bench.path("unpacked"), bench.path("config"), bench.path("layer.tar"));
    std::fs::create_dir(&root).unwrap();
    std::fs::write(&config, crate::oci::config("amd64", &[layer("x")]).to_string()).unwrap();
    std::fs::write(&content, layer("x")).unwrap();
    let import = |config: &str, layer: &str| {
        let manifest = json!([{ "Config": config, "RepoTags": ["x:1"], "Layers": [layer] }]).to_string();
        std::fs::write(root.join("manifest.json"), manifest).unwrap();
        bench.import(&root, None)
    };
    let absolute = |path: &Path| path.to_str().unwrap().to_owned();
    for config in [absolute(&config), "../config".into()] {
        assert!(
            failure(import(&config, "layer.tar")).contains("not within the image's directory"),
            "{config}"
        );
    }
    std::fs::copy(&config, root.join("config")).unwrap();
    for layer in [absolute(&content), "../layer.tar".into()] {
        assert!(failure(import("config", &layer)).contains("not within the image's directory"), "{layer}");
    }
    std::fs::copy(&content, root.join("layer.tar")).unwrap();
    assert_eq!(import("config", "layer.tar").unwrap()[0].layers.len(), 1);
}

#[test]
fn errors_show_no_more_of_a_name_than_people_read() {
    let bench = Bench::new();
    let long = "x".repeat(100_000);
    let mut texts = Vec::new();
    for manifest in [
        json!([{ "Config": long, "RepoTags": [], "Layers": [] }]),
        json!([{ "Config": "config", "RepoTags": [], "Layers": [long] }]),
        json!([{ "Config": "config", "RepoTags": [format!("{long}:!")], "Layers": ["layer.tar"] }]),
        json!([{ "Config": "arm", "RepoTags": [], "Layers": ["layer.tar"] }]),
        json!([{ "Config": 1, "RepoTags": long }]),
    ] {
        let config = crate::oci::config("amd64", &[layer("x")]).to_string();
        let arm = crate::oci::config(&long, &[layer("x")]).to_string();
        let tar =
            crate::archive::Tar::default().file("config", config.as_bytes()).file("arm", arm.as_bytes());
        let tar = tar.file("layer.tar", &layer("x")).file("manifest.json", manifest.to_string().as_bytes());
        texts.push(failure(bench.file(&tar.end(), None)));
    }
    let mut blobs = Blobs::default();
    let manifest = blobs.image("amd64", &[layer("x")], Packing::Plain);
    let digest = with(manifest.clone(), "digest", json!(format!("sha512:{}", "0".repeat(100_000))));
    texts.push(failure(bench.layout(&blobs, &[digest])));
    let config = blobs.json(&long, &json!({}));
    let artifact = blobs.json(MANIFEST, &json!({ "schemaVersion": 2, "config": config, "layers": [] }));
    texts.push(failure(bench.layout(&blobs, &[artifact])));
    let platform = json!({ "architecture": long, "os": "linux" });
    texts.push(failure(bench.layout(&blobs, &[with(manifest, "platform", platform)])));
    for text in texts {
        assert!(text.len() < 1000, "{} bytes: {}", text.len(), &text[..1000]);
    }
}

#[test]
fn a_limit_is_kept_and_nothing_stays() {
    let bench = Bench::new();
    let store = Store::open(bench.path("store")).unwrap();
    let store = store.with_limits(Limits { archive_bytes: 100_000, ..Limits::default() });
    let bomb = crate::archive::Tar::default().file("zeros", &vec![0; 1 << 20]).end();
    let path = bench.path("bomb.tar");
    std::fs::write(&path, docker_archive(&[], &[gzip(&bomb)])).unwrap();
    let text = chain(&store.import(&Source::Local(path), None, &mut |_| {}).unwrap_err());
    assert!(
        text.contains(r#"entry "zeros" cannot be used"#) && text.contains("limit of 100000 bytes"),
        "{text}"
    );
    assert_eq!(bench.files(), Vec::<PathBuf>::new());
}

#[test]
fn removing_keeps_what_others_need() {
    let bench = Bench::new();
    let (base, first, second) = (layer("base"), layer("first"), layer("second"));
    let a = bench.file(&docker_archive(&["a:1", "a:2"], &[base.clone(), first]), None).unwrap().remove(0);
    let b = bench.file(&docker_archive(&["b:1"], &[base, second]), None).unwrap().remove(0);
    assert_eq!(a.layers[0], b.layers[0]);
    assert_eq!(bench.files().len(), 5);

    let untagged = bench.store.remove("a:1").unwrap();
    assert_eq!(
        (untagged.names.as_slice(), untagged.digest, untagged.freed),
        (&["docker.io/library/a:1".into()][..], None, 0)
    );
    let removed = bench.store.remove("a:2").unwrap();
    assert_eq!(removed.digest, Some(a.digest));
    assert_eq!(
        removed.freed,
        a.size - b.layers[0].metadata().unwrap_or_else(|_| panic!("shared layer is gone")).len()
    );
    assert!(!a.layers[1].exists());
    bench.store.verify("b:1").unwrap();
    let removed = bench.store.remove(&b.digest.hex()[..8]).unwrap();
    assert_eq!((removed.names.len(), removed.freed), (1, b.size));
    assert!(matches!(bench.store.remove("b:1"), Err(Error::Unknown { .. })));
    assert_eq!(bench.files(), Vec::<PathBuf>::new());
}

#[test]
fn damaged_layers_are_noticed_and_mended() {
    let bench = Bench::new();
    let archive = docker_archive(&["x:1"], &[layer("content")]);
    let image = bench.file(&archive, None).unwrap().remove(0);
    let path = &image.layers[0];
    let whole = std::fs::read(path).unwrap();
    let damaged = |text: &str| {
        let error = chain(&bench.store.resolve("x:1").unwrap_err());
        assert!(error.contains(text) && error.contains("import the image again"), "{error}");
        assert!(bench.store.list().unwrap()[0].is_err());
        // What is damaged is converted again, not taken from the cache.
        bench.file(&archive, None).unwrap();
        assert!(std::fs::read(path).unwrap() == whole);
    };
    File::options().write(true).open(path).unwrap().set_len(whole.len() as u64 - 4096).unwrap();
    damaged("its size has changed");
    File::options().write(true).open(path).unwrap().write_all_at(b"x", 1040).unwrap();
    damaged("its superblock is not intact");
    std::fs::remove_file(path).unwrap();
    damaged("it is missing");
    // Only reading everything finds this.
    File::options().write(true).open(path).unwrap().write_all_at(b"x", whole.len() as u64 - 1).unwrap();
    bench.store.resolve("x:1").unwrap();
    assert!(matches!(bench.store.verify("x:1"), Err(Error::Damaged { .. })));
}

#[test]
fn a_damaged_index_or_one_of_another_version_is_an_error() {
    let bench = Bench::new();
    for (document, expected) in
        [("{", "is damaged"), (r#"{"version":9,"images":{},"layers":{}}"#, "has version 9")]
    {
        std::fs::write(bench.path("store/index.json"), document).unwrap();
        let store = Store::open(bench.path("store")).unwrap();
        assert!(chain(&store.list().unwrap_err()).contains(expected));
    }
}

#[test]
fn what_a_crash_left_is_removed_but_not_what_is_in_use() {
    let bench = Bench::new();
    let archive = docker_archive(&["x:1"], &[layer("a"), layer("b")]);
    let path = bench.path("archive.tar");
    std::fs::write(&path, archive).unwrap();
    let stale = bench.path("store/work/crashed");
    std::fs::create_dir_all(stale.join("deep")).unwrap();
    std::fs::write(stale.join("layer"), "half").unwrap();
    std::fs::write(bench.path("store/work/file"), "half").unwrap();
    std::fs::write(bench.path("store/layers/unknown.erofs"), "moved, but not in the index").unwrap();
    let mut seen = Vec::new();
    let images = bench.store.import(&Source::Local(path), None, &mut |progress| {
        if seen.last() != Some(&progress.phase) {
            seen.push(progress.phase);
            // Another process opens the store in the middle of everything.
            Store::open(bench.path("store")).unwrap();
        }
        assert!(progress.done <= progress.total);
    });
    assert_eq!(images.unwrap()[0].layers.len(), 2);
    let layer = |number| Phase::Layer { number, count: 2 };
    assert_eq!(seen, [Phase::Examining, layer(1), layer(2), Phase::Storing]);
    assert_eq!(bench.files().len(), 3);
}

#[test]
fn imports_and_removals_at_the_same_time_leave_whole_images() {
    let bench = Bench::new();
    let base = layer("shared");
    let archives: Vec<PathBuf> = (0..4)
        .map(|at| {
            let path = bench.path(&format!("{at}.tar"));
            std::fs::write(
                &path,
                docker_archive(&[&format!("i{at}:1")], &[base.clone(), layer(&at.to_string())]),
            )
            .unwrap();
            path
        })
        .collect();
    std::thread::scope(|scope| {
        for (at, path) in archives.iter().enumerate() {
            let root = bench.path("store");
            scope.spawn(move || {
                for _ in 0..10 {
                    let store = Store::open(&root).unwrap();
                    store.import(&Source::Local(path.clone()), None, &mut |_| {}).unwrap();
                    store.verify(&format!("i{at}:1")).unwrap();
                    store.remove(&format!("i{at}:1")).unwrap();
                }
            });
        }
    });
    assert!(bench.store.list().unwrap().is_empty());
    assert_eq!(bench.files(), Vec::<PathBuf>::new());
}
