//! Tar streams as layers: whiteouts, overwriting, ownership, links.

use bulkhead_rootfs_builder::erofs::Options;
use bulkhead_rootfs_builder::tar::{Error, Limits, Report, append_layer};

use crate::archive::{Header, Tar};
use crate::tree::{Content, Facts, Tree, read_image};
use crate::writer::Workbench;

/// Converts an archive, not reading the image back.
pub(crate) fn try_convert(archive: &[u8], limits: &Limits) -> (Workbench, Result<Report, Error>) {
    let bench = Workbench::new();
    let mut builder = bench.builder(Options { uuid: [1; 16], max_size: limits.archive_bytes });
    let report = append_layer(archive, &mut builder, limits);
    if report.is_ok() {
        builder.finish().unwrap();
    }
    (bench, report)
}

/// Converts an archive and reads the image.
pub(crate) fn convert(archive: &[u8]) -> Tree {
    let (bench, report) = try_convert(archive, &Limits::default());
    report.unwrap();
    read_image(&bench.image())
}

fn get<'a>(tree: &'a Tree, path: &str) -> &'a Facts {
    tree.get(path.as_bytes()).unwrap_or_else(|| panic!("no {path:?} in {:?}", names(tree)))
}

fn names(tree: &Tree) -> Vec<String> {
    tree.keys().map(|path| String::from_utf8_lossy(path).into_owned()).collect()
}

const WHITEOUT: (u32, Option<(u32, u32)>) = (0o020_000, Some((0, 0)));

#[test]
fn ownership_modes_times_and_devices_are_kept() {
    let archive = Tar::default()
        .raw(&Header { mode: 0o1777, mtime: 9, ..Header::new(b'5', "./") }, b"")
        .raw(
            &Header {
                mode: 0o4755,
                owner: (1000, 2000),
                mtime: 1_700_000_000,
                size: 2,
                ..Header::new(b'0', "./su")
            },
            b"hi",
        )
        .raw(&Header { device: (1, 3), mode: 0o666, ..Header::new(b'3', "null") }, b"")
        .raw(&Header { device: (259, 70_000), ..Header::new(b'4', "disk") }, b"")
        .raw(&Header::new(b'6', "pipe"), b"")
        .link(b'2', "link", "/etc/../target")
        .pax(&[("uid", b"4294967294"), ("gid", b"3000000000"), ("mtime", b"-1.5")])
        .file("/absolute/name", b"x")
        .end();
    let tree = convert(&archive);
    assert_eq!((get(&tree, "").mode, get(&tree, "").mtime), (0o041_777, (9, 0)));
    let su = get(&tree, "su");
    assert_eq!((su.mode, su.owner, su.mtime), (0o104_755, (1000, 2000), (1_700_000_000, 0)));
    assert_eq!((get(&tree, "null").mode, get(&tree, "null").device), (0o020_666, Some((1, 3))));
    assert_eq!(get(&tree, "disk").device, Some((259, 70_000)));
    assert_eq!(get(&tree, "pipe").mode, 0o010_644);
    assert_eq!(get(&tree, "link").content, Content(b"/etc/../target".to_vec()));
    let made = get(&tree, "absolute");
    assert_eq!((made.mode, made.owner, made.mtime), (0o040_755, (0, 0), (0, 0)));
    let pax = get(&tree, "absolute/name");
    assert_eq!((pax.owner, pax.mtime), ((4_294_967_294, 3_000_000_000), (-2, 500_000_000)));
}

#[test]
fn whiteouts_become_those_of_overlayfs() {
    let archive = Tar::default()
        .directory("etc")
        .file("etc/.wh.passwd", b"")
        .directory("var")
        .file("var/.wh..wh..opq", b"")
        .file("var/new", b"1")
        .file(".wh..wh.plnk", b"")
        .file("made/for/.wh.it", b"")
        .end();
    let tree = convert(&archive);
    let expected = ["", "etc", "etc/passwd", "made", "made/for", "made/for/it", "var", "var/new"];
    assert_eq!(names(&tree), expected);
    for path in ["etc/passwd", "made/for/it"] {
        assert_eq!((get(&tree, path).mode, get(&tree, path).device), WHITEOUT);
    }
    assert_eq!(get(&tree, "var").xattrs, [(b"trusted.overlay.opaque".to_vec(), b"y".to_vec())].into());
    assert!(get(&tree, "etc").xattrs.is_empty());
}

#[test]
fn a_whiteout_hides_lower_layers_only() {
    // In either order, as the specification has it.
    for whiteout_first in [true, false] {
        let whiteouts = |tar: Tar| tar.file(".wh.file", b"").file(".wh.dir", b"");
        let entries = |tar: Tar| tar.file("file", b"new").directory("dir").file("dir/x", b"");
        let tar = Tar::default();
        let tar = if whiteout_first { entries(whiteouts(tar)) } else { whiteouts(entries(tar)) };
        let tree = convert(&tar.end());
        assert_eq!(names(&tree), ["", "dir", "dir/x", "file"]);
        assert_eq!(get(&tree, "file").content, Content(b"new".to_vec()));
        assert_eq!(get(&tree, "dir").xattrs.len(), 1);
    }
}

#[test]
fn attributes_of_overlayfs_in_a_layer_do_not_steer_the_overlay() {
    let archive = Tar::default()
        .pax(&[
            ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
            ("SCHILY.xattr.user.note", b"old"),
            ("SCHILY.xattr.user.note", b"new\0bytes\n"),
            ("SCHILY.xattr.com.apple.provenance", b"x"),
            ("SCHILY.xattr.security.capability", &[1, 0, 0, 2, 0, 4, 0, 0]),
        ])
        .directory("d")
        .end();
    let (bench, report) = try_convert(&archive, &Limits::default());
    assert_eq!(report.unwrap(), Report { entries: 1, foreign_xattrs: 1 });
    let tree = read_image(&bench.image());
    let expected = [
        (b"security.capability".to_vec(), vec![1, 0, 0, 2, 0, 4, 0, 0]),
        (b"trusted.overlay.overlay.opaque".to_vec(), b"y".to_vec()),
        (b"user.note".to_vec(), b"new\0bytes\n".to_vec()),
    ];
    assert_eq!(get(&tree, "d").xattrs, expected.into());
}

#[test]
fn later_entries_replace_earlier_ones() {
    let archive = Tar::default()
        .file("a", b"first")
        .link(b'1', "kept", "a")
        .file("a", b"second")
        .directory("d")
        .file("d/inside", b"")
        .raw(&Header { mode: 0o700, ..Header::new(b'5', "d/") }, b"")
        .directory("gone")
        .file("gone/too", b"")
        .link(b'2', "gone", "elsewhere")
        .link(b'2', "was-link", "a")
        .directory("was-link")
        .end();
    let tree = convert(&archive);
    assert_eq!(names(&tree), ["", "a", "d", "d/inside", "gone", "kept", "was-link"]);
    assert_eq!(get(&tree, "a").content, Content(b"second".to_vec()));
    assert_eq!(
        (get(&tree, "kept").content.clone(), get(&tree, "kept").links),
        (Content(b"first".to_vec()), 1)
    );
    assert_eq!(get(&tree, "d").mode, 0o040_700);
    assert_eq!(get(&tree, "gone").mode, 0o120_644);
    assert_eq!(get(&tree, "was-link").mode, 0o040_755);
}

#[test]
fn hard_links_are_one_file() {
    let archive = Tar::default()
        .file("bin/a", b"content")
        .link(b'1', "bin/b", "./bin/a")
        .link(b'1', "/c", "/bin/b")
        .link(b'2', "symlink", "nowhere")
        .link(b'1', "symlink2", "symlink")
        // Some writers put the size of the target here, and nothing behind it.
        .raw(&Header { size: 7, link: b"c".to_vec(), ..Header::new(b'1', "d") }, b"")
        .end();
    let tree = convert(&archive);
    for path in ["bin/a", "bin/b", "c", "d"] {
        let facts = get(&tree, path);
        assert_eq!((facts.links, facts.first.as_slice()), (4, &b"bin/a"[..]), "{path}");
        assert_eq!(facts.content, Content(b"content".to_vec()));
    }
    assert_eq!(get(&tree, "symlink2").links, 2);
}

#[test]
fn archives_may_lack_the_end_or_have_more_behind_it() {
    let with_end = Tar::default().file("a", b"x").end();
    let expected = convert(&with_end);
    assert_eq!(convert(&with_end[..1024]), expected);
    assert_eq!(convert(&with_end[..1536]), expected);
    assert_eq!(convert(&[&with_end[..], &[0; 9000], b"trailing"].concat()), expected);
    assert_eq!(names(&convert(&[0; 1024])), [""]);
}
