//! Images from a registry: a server on the loopback interface that speaks as much of the protocol as a pull needs.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use bulkhead_rootfs_builder::oci::{Digest, Source};
use bulkhead_rootfs_builder::store::{Image, Store};

use crate::oci::{Blobs, INDEX, MANIFEST, Packing, index, layer, platform, with};
use crate::tree::{Content, read_image};

/// What the server gives for a path: its media type and bytes.
type Pages = HashMap<String, (&'static str, Vec<u8>)>;

/// Serves until the test's process ends; the address.
fn serve(pages: Pages) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let pages = Arc::new(pages);
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let pages = pages.clone();
            std::thread::spawn(move || answer(connection.unwrap(), &pages));
        }
    });
    address
}

fn answer(mut connection: TcpStream, pages: &Pages) {
    let mut lines = BufReader::new(connection.try_clone().unwrap()).lines().map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    lines.by_ref().take_while(|line| !line.is_empty()).for_each(drop);
    let mut words = request.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let found = pages.get(path).or_else(|| pages.get(path.trim_end_matches('/')));
    let (status, kind, body) = match found {
        Some((kind, body)) => ("200 OK", *kind, body.as_slice()),
        None => ("404 Not Found", "application/json", &br#"{"errors":[{"code":"NAME_UNKNOWN"}]}"#[..]),
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    let sent = connection.write_all(head.as_bytes());
    // A client that has seen enough hangs up.
    let _ = sent.and_then(|()| if method == "HEAD" { Ok(()) } else { connection.write_all(body) });
}

/// A registry with the image `app:1` for two platforms.
fn pages(damage: impl Fn(&mut Vec<u8>)) -> Pages {
    let mut blobs = Blobs::default();
    let manifests = ["arm64", "amd64"].map(|architecture| {
        let manifest = blobs.image(architecture, &[layer(architecture), layer("upper")], Packing::Gzip);
        with(manifest, "platform", platform(architecture))
    });
    let mut pages = Pages::from([("/v2".into(), ("application/json", b"{}".to_vec()))]);
    for (digest, mut bytes) in blobs.0 {
        if bytes.starts_with(&[0x1f, 0x8b]) {
            damage(&mut bytes);
        }
        pages.insert(format!("/v2/app/manifests/{digest}"), (MANIFEST, bytes.clone()));
        pages.insert(format!("/v2/app/blobs/{digest}"), ("application/octet-stream", bytes));
    }
    let root = index(&manifests).to_string().into_bytes();
    pages.insert(format!("/v2/app/manifests/{}", Digest::of(&root)), (INDEX, root.clone()));
    pages.insert("/v2/app/manifests/1".into(), (INDEX, root));
    pages
}

fn pull(reference: String) -> Result<Vec<(Image, Content)>, String> {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let images = store.import(&Source::Registry(reference), None, &mut |_| {}).map_err(|error| {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        text
    })?;
    let lowest = |image: &Image| read_image(&image.layers[0])[&b"etc/content"[..]].content.clone();
    Ok(images.into_iter().map(|image| (image.clone(), lowest(&image))).collect())
}

#[test]
fn the_build_for_this_platform_is_pulled() {
    let pages = pages(|_| {});
    let digest = Digest::of(&pages["/v2/app/manifests/1"].1);
    let address = serve(pages);
    for reference in [format!("{address}/app:1"), format!("{address}/app@{digest}")] {
        let (image, content) = pull(reference.clone()).unwrap().remove(0);
        assert_eq!(image.names, [reference]);
        assert_eq!(image.layers.len(), 2);
        assert_eq!(content, Content(b"amd64".to_vec()));
    }
}

#[test]
fn a_registry_is_not_trusted() {
    let failure = |damage: fn(&mut Vec<u8>)| pull(format!("{}/app:1", serve(pages(damage)))).unwrap_err();
    let text = failure(|bytes| bytes[4] ^= 1);
    assert!(text.contains("igest"), "{text}");
    let text = failure(|bytes| bytes.truncate(bytes.len() - 1));
    assert!(text.contains("cannot be imported"), "{text}");
    let text = failure(|bytes| bytes.push(0));
    assert!(text.contains("cannot be imported"), "{text}");
    // A manifest that is not the one whose digest was asked for.
    let mut pages = pages(|_| {});
    let wrong = Digest::of(b"something else");
    let root = pages["/v2/app/manifests/1"].clone();
    pages.insert(format!("/v2/app/manifests/{wrong}"), root);
    let text = pull(format!("{}/app@{wrong}", serve(pages))).unwrap_err();
    assert!(text.contains("igest"), "{text}");
}

#[test]
fn an_unknown_image_says_what_to_check() {
    let address = serve(pages(|_| {}));
    let text = pull(format!("{address}/app:2")).unwrap_err();
    assert!(text.contains("getting the manifest") && text.contains("check the name"), "{text}");
    assert!(pull("Not A Name".into()).unwrap_err().contains("is not an image reference"));
}
