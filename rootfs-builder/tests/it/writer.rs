//! The EROFS writer: what goes in comes out, for any tree.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use bulkhead_rootfs_builder::erofs::{
    BLOCK, Builder, Error, Extent, FileType, Metadata, NodeId, Options, Special, Xattrs,
};
use proptest::prelude::*;

use crate::tree::{Content, Facts, Tree, assert_same, read_image};

const OPTIONS: Options = Options { uuid: [7; 16], max_size: 1 << 30 };

/// A directory with an image under construction in it.
pub(crate) struct Workbench {
    directory: tempfile::TempDir,
}

impl Workbench {
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn builder(&self, options: Options) -> Builder {
        let output = File::create(self.image()).unwrap();
        Builder::new(output, tempfile::tempfile_in(self.path()).unwrap(), options).unwrap()
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn image(&self) -> std::path::PathBuf {
        self.path().join("image")
    }
}

#[derive(Clone, Debug)]
enum What {
    File(usize),
    Sparse { size: u64, extents: Vec<(u64, u64)> },
    Directory,
    Symlink(usize),
    Special(Special),
    HardLink(usize),
}

#[derive(Clone, Debug)]
struct Step {
    parent: usize,
    name: String,
    what: What,
    meta: (u16, u32, u32, i64, u32),
    xattrs: BTreeMap<String, Vec<u8>>,
}

/// Sizes at which the layout changes.
fn sizes() -> impl Strategy<Value = usize> {
    prop_oneof![
        Just(0),
        1usize..80,
        (0usize..3, 0usize..130).prop_map(|(blocks, less)| (4096 * (blocks + 1)).saturating_sub(less)),
        (0usize..3, 1usize..40).prop_map(|(blocks, more)| 4096 * (blocks + 1) + more),
        Just(300_000),
    ]
}

fn sparse() -> impl Strategy<Value = What> {
    (prop::collection::vec((0u64..40_000, 0u64..20_000), 0..5), 0u64..50_000).prop_map(|(gaps, rest)| {
        let mut end = 0;
        let extents = gaps.into_iter().map(|(gap, length)| {
            let offset = end + gap;
            end = offset + length;
            (offset, length)
        });
        let extents: Vec<_> = extents.collect();
        What::Sparse { size: extents.last().map_or(0, |(offset, length)| offset + length) + rest, extents }
    })
}

fn whats() -> impl Strategy<Value = What> {
    prop_oneof![
        4 => sizes().prop_map(What::File),
        1 => sparse(),
        3 => Just(What::Directory),
        1 => (1usize..4095).prop_map(What::Symlink),
        1 => (0u32..4096, 0u32..1 << 20).prop_map(|(a, b)| What::Special(Special::CharDevice(a, b))),
        1 => Just(What::Special(Special::BlockDevice(8, 300))),
        1 => Just(What::Special(Special::Fifo)),
        1 => Just(What::Special(Special::Socket)),
        1 => any::<usize>().prop_map(What::HardLink),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    let meta = (0u16..0o10000, any::<u32>(), any::<u32>(), any::<i64>(), 0u32..1_000_000_000);
    let name = prop_oneof![
        "[ -.0-~]{1,12}".prop_filter("not a name", |name| name != "." && name != ".."),
        "[a-z]{255}"
    ];
    let xattr = prop_oneof![
        Just("user.test".to_string()),
        "user\\.[a-z]{1,250}",
        Just("security.capability".into()),
        Just("system.posix_acl_access".into()),
        Just("trusted.overlay.opaque".into()),
    ];
    let value = prop_oneof![3 => prop::collection::vec(any::<u8>(), 0..40), 1 => Just(vec![1; 5000])];
    let xattrs =
        prop_oneof![3 => Just(BTreeMap::new()), 1 => prop::collection::btree_map(xattr, value, 1..4)];
    (any::<usize>(), name, whats(), meta, xattrs).prop_map(|(parent, name, what, meta, xattrs)| Step {
        parent,
        name,
        what,
        meta,
        xattrs,
    })
}

/// Bytes in which a block out of place shows.
fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 4096 + at % 251 + seed).to_le_bytes()[0]).collect()
}

/// An entry of root's, of 1970, with nothing in it.
fn facts(mode: u32, first: Vec<u8>) -> Facts {
    Facts {
        mode,
        owner: (0, 0),
        mtime: (0, 0),
        links: 1,
        device: None,
        content: Content::default(),
        xattrs: BTreeMap::new(),
        first,
    }
}

/// Builds an image from steps and, beside it, the tree that it should be.
fn build(bench: &Workbench, steps: &[Step]) -> Tree {
    let mut builder = bench.builder(OPTIONS);
    let mut directories: Vec<(Vec<u8>, NodeId)> = vec![(Vec::new(), builder.root())];
    let mut files: Vec<(Vec<u8>, NodeId)> = Vec::new();
    let root = facts(0o040_755, Vec::new());
    let root = Facts { links: 2, ..root };
    let mut tree = Tree::from([(Vec::new(), root)]);
    for (seed, step) in steps.iter().enumerate() {
        let (parent_path, parent) = directories[step.parent % directories.len()].clone();
        let path = if parent_path.is_empty() {
            step.name.clone().into_bytes()
        } else {
            [&parent_path[..], b"/", step.name.as_bytes()].concat()
        };
        if tree.contains_key(&path) {
            continue;
        }
        let place = (parent, step.name.as_bytes());
        let mut xattrs = Xattrs::new();
        for (name, value) in &step.xattrs {
            xattrs.add(name.as_bytes(), value).unwrap();
        }
        let (mode, uid, gid, seconds, nanoseconds) = step.meta;
        let meta = Metadata { mode, uid, gid, seconds, nanoseconds, xattrs };
        let mut facts = Facts {
            owner: (uid, gid),
            mtime: (seconds, nanoseconds),
            xattrs: step
                .xattrs
                .iter()
                .map(|(name, value)| (name.clone().into_bytes(), value.clone()))
                .collect(),
            ..facts(u32::from(mode), path.clone())
        };
        match &step.what {
            What::File(size) => {
                facts.mode |= 0o100_000;
                facts.content = Content(pattern(*size, seed));
                let added = builder.add_file(place, meta, *size as u64, &mut &facts.content.0[..]);
                files.push((path.clone(), added.unwrap()));
            }
            What::Sparse { size, extents } => {
                facts.mode |= 0o100_000;
                let mut content = vec![0; usize::try_from(*size).unwrap()];
                let mut data = Vec::new();
                for &(offset, length) in extents {
                    let bytes = pattern(usize::try_from(length).unwrap(), seed);
                    content[usize::try_from(offset).unwrap()..][..bytes.len()].copy_from_slice(&bytes);
                    data.extend(bytes);
                }
                facts.content = Content(content);
                let extents: Vec<_> =
                    extents.iter().map(|&(offset, length)| Extent { offset, length }).collect();
                let added = builder.add_sparse_file(place, meta, *size, &extents, &mut &data[..]);
                files.push((path.clone(), added.unwrap()));
            }
            What::Directory => {
                facts.mode |= 0o040_000;
                facts.links = 2;
                directories.push((path.clone(), builder.add_directory(place, meta).unwrap()));
                tree.get_mut(&parent_path).unwrap().links += 1;
            }
            What::Symlink(length) => {
                facts.mode |= 0o120_000;
                facts.content = Content(vec![b'x'; *length]);
                builder.add_symlink(place, meta, &facts.content.0).unwrap();
            }
            What::Special(special) => {
                facts.mode |= match special {
                    Special::CharDevice(..) => 0o020_000,
                    Special::BlockDevice(..) => 0o060_000,
                    Special::Fifo => 0o010_000,
                    Special::Socket => 0o140_000,
                };
                if let Special::CharDevice(major, minor) | Special::BlockDevice(major, minor) = *special {
                    facts.device = Some((major, minor));
                }
                builder.add_special(place, meta, *special).unwrap();
            }
            What::HardLink(_) if files.is_empty() => continue,
            What::HardLink(target) => {
                let (target, id) = files[target % files.len()].clone();
                builder.add_hard_link(place, id).unwrap();
                facts = tree[&target].clone();
                files.push((path.clone(), id));
            }
        }
        tree.insert(path, facts);
    }
    join_hard_links(&mut tree);
    builder.finish().unwrap();
    tree
}

/// What hard links have in common: their count, and the first of their names.
fn join_hard_links(tree: &mut Tree) {
    let mut names: BTreeMap<Vec<u8>, Vec<Vec<u8>>> = BTreeMap::new();
    for (path, facts) in &*tree {
        names.entry(facts.first.clone()).or_default().push(path.clone());
    }
    for paths in names.into_values().filter(|paths| paths.len() > 1) {
        for path in &paths {
            let facts = tree.get_mut(path).unwrap();
            (facts.links, facts.first) = (paths.len() as u64, paths[0].clone());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_tree_survives(steps in prop::collection::vec(steps(), 0..60)) {
        let bench = Workbench::new();
        let expected = build(&bench, &steps);
        assert_same(&read_image(&bench.image()), &expected);
    }

    #[test]
    fn same_calls_make_the_same_bytes(steps in prop::collection::vec(steps(), 0..20)) {
        let images = [(); 2].map(|()| {
            let bench = Workbench::new();
            build(&bench, &steps);
            std::fs::read(bench.image()).unwrap()
        });
        prop_assert!(images[0] == images[1]);
        prop_assert_eq!(images[0].len() as u64 % BLOCK, 0);
    }
}

#[test]
fn the_last_inode_may_end_anywhere_in_its_block() {
    for count in 0..BLOCK / 64 {
        let bench = Workbench::new();
        let mut builder = bench.builder(OPTIONS);
        for number in 0..count {
            let name = number.to_string();
            let place = (builder.root(), name.as_bytes());
            builder.add_special(place, Metadata::default(), Special::Fifo).unwrap();
        }
        builder.finish().unwrap();
        assert_eq!(read_image(&bench.image()).len() as u64, count + 1);
    }
}

#[test]
fn a_directory_of_many_long_names_is_found_by_lookup() {
    let bench = Workbench::new();
    let mut builder = bench.builder(OPTIONS);
    let names: Vec<String> = (0..3000).map(|i| format!("{:->width$}", i, width = 20 + i % 200)).collect();
    for name in &names {
        let place = (builder.root(), name.as_bytes());
        builder.add_file(place, Metadata::default(), 0, &mut std::io::empty()).unwrap();
    }
    builder.finish().unwrap();
    let bytes = std::fs::read(bench.image()).unwrap();
    let image = erofs_rs::EroFS::new(erofs_rs::backend::SliceImage::new(&bytes)).unwrap();
    for name in &names {
        image.open(format!("/{name}")).unwrap();
    }
    assert!(image.open("/missing").is_err());
    assert_eq!(read_image(&bench.image()).len(), names.len() + 1);
}

#[test]
fn a_large_sparse_file_stays_small() {
    let bench = Workbench::new();
    let mut builder = bench.builder(OPTIONS);
    let size = 5 << 40;
    let extents = [Extent { offset: 1 << 40, length: 3 }, Extent { offset: size - 4, length: 4 }];
    let place = (builder.root(), &b"sparse"[..]);
    builder.add_sparse_file(place, Metadata::default(), size, &extents, &mut &b"abcdefg"[..]).unwrap();
    let (_, summary) = builder.finish().unwrap();
    assert!(summary.size < 80 << 20, "{} bytes", summary.size);
    let bytes = std::fs::read(bench.image()).unwrap();
    let image = erofs_rs::EroFS::new(erofs_rs::backend::SliceImage::new(&bytes)).unwrap();
    let file = image.open("/sparse").unwrap();
    let read = |offset| {
        let mut buffer = [0xff; 4];
        for (at, byte) in (offset..).zip(&mut buffer) {
            assert_eq!(file.read_at(std::slice::from_mut(byte), at).unwrap(), 1);
        }
        buffer
    };
    assert_eq!(file.size(), size);
    assert_eq!(read(0), [0; 4]);
    assert_eq!(read(1 << 40), *b"abc\0");
    assert_eq!(read((1 << 40) - 2), *b"\0\0ab");
    assert_eq!(read(size - 4), *b"defg");
}

#[test]
fn a_replaced_entry_is_gone_with_everything_below() {
    let bench = Workbench::new();
    let mut builder = bench.builder(OPTIONS);
    let root = builder.root();
    let directory = builder.add_directory((root, b"a"), Metadata::default()).unwrap();
    builder.add_file((directory, b"below"), Metadata::default(), 5, &mut &b"below"[..]).unwrap();
    builder.add_file((root, b"a"), Metadata::default(), 3, &mut &b"new"[..]).unwrap();
    let (_, summary) = builder.finish().unwrap();
    assert_eq!(summary.inodes, 2);
    let tree = read_image(&bench.image());
    assert_eq!(tree.len(), 2);
    assert_eq!(tree[&b"a"[..]].content, Content(b"new".to_vec()));
}

#[test]
fn what_cannot_be_stored_is_refused() {
    let bench = Workbench::new();
    let mut builder = bench.builder(OPTIONS);
    let root = builder.root();
    let meta = Metadata::default;
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
        assert!(matches!(builder.add_directory((root, name), meta()), Err(Error::Name { .. })));
    }
    let directory = builder.add_directory((root, b"d"), meta()).unwrap();
    assert!(matches!(builder.add_hard_link((root, b"e"), directory), Err(Error::DirectoryLink)));
    let file = builder.add_file((root, b"f"), meta(), 0, &mut std::io::empty()).unwrap();
    assert_eq!(builder.file_type(file), FileType::File);
    assert!(matches!(builder.add_directory((file, b"x"), meta()), Err(Error::ParentNotDirectory)));
    assert!(matches!(builder.add_file((root, b"s"), meta(), 9, &mut &b"short"[..]), Err(Error::ContentEnds)));
    let big = builder.add_file((root, b"b"), meta(), 1 << 44, &mut std::io::empty());
    assert!(matches!(big, Err(Error::FileTooLarge { .. })));
    for target in [&b""[..], &[b'x'; 4096], b"a\0"] {
        assert!(matches!(
            builder.add_symlink((root, b"l"), meta(), target),
            Err(Error::SymlinkTarget { .. })
        ));
    }
    let device = builder.add_special((root, b"c"), meta(), Special::CharDevice(4096, 0));
    assert!(matches!(device, Err(Error::Device { .. })));
    for extents in [[(5, 5), (9, 1)], [(0, 1), (9, 2)], [(u64::MAX, 1), (0, 0)], [(4, 1), (2, 1)]] {
        let extents = extents.map(|(offset, length)| Extent { offset, length });
        let sparse = builder.add_sparse_file((root, b"m"), meta(), 10, &extents, &mut &[0; 20][..]);
        assert!(matches!(sparse, Err(Error::SparseMap { .. })), "{extents:?}");
    }
}

#[test]
fn an_image_ends_at_its_limit() {
    let bench = Workbench::new();
    let mut builder = bench.builder(Options { max_size: 64 << 10, ..OPTIONS });
    let root = builder.root();
    let endless = &mut std::io::repeat(1);
    builder.add_file((root, b"a"), Metadata::default(), 50 << 10, endless).unwrap();
    let more = builder.add_file((root, b"b"), Metadata::default(), 1 << 40, endless);
    assert!(matches!(more, Err(Error::TooLarge { limit: 65_536 })));
    let extents = [Extent { offset: 0, length: 1 }, Extent { offset: 1 << 42, length: 1 }];
    let sparse = builder.add_sparse_file((root, b"c"), Metadata::default(), 1 << 43, &extents, endless);
    assert!(matches!(sparse, Err(Error::TooLarge { .. })));
}
