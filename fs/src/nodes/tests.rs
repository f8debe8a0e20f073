//! The table of nodes, on files of a temporary directory.

use std::ffi::CString;
use std::fs::{create_dir, hard_link, write};
use std::path::Path;

use proptest::prelude::*;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

use super::*;

fn look(path: &Path) -> Attributes {
    Attributes::at(rustix::fs::CWD, &CString::new(path.as_os_str().as_encoded_bytes()).unwrap()).unwrap()
}

#[test]
fn a_file_is_one_node_until_it_is_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a");
    write(&file, "").unwrap();
    hard_link(&file, directory.path().join("b")).unwrap();
    let mut nodes = Nodes::new(8);
    let root = nodes.enter(1, ROOT, c"share", &look(directory.path())).unwrap();
    let a = nodes.enter(1, root, c"a", &look(&file)).unwrap();
    assert_eq!(nodes.enter(1, root, c"b", &look(&file)), Ok(a), "another name of the same file");
    assert_eq!(&*nodes.get(a).unwrap().name, c"b");
    assert_ne!(nodes.enter(2, root, c"a", &look(&file)), Ok(a), "another share");
    nodes.forget(a, 1);
    assert!(nodes.get(a).is_ok());
    nodes.forget(a, 1);
    assert_eq!(nodes.get(a).err(), Some(Errno::STALE));
    assert_ne!(nodes.enter(1, root, c"a", &look(&file)), Ok(a), "ids are not used again");
}

#[test]
fn a_link_that_was_made_again_is_another_node_even_with_the_same_inode() {
    let directory = tempfile::tempdir().unwrap();
    let link = directory.path().join("l");
    std::os::unix::fs::symlink("old", &link).unwrap();
    let mut nodes = Nodes::new(8);
    let root = nodes.enter(1, ROOT, c"share", &look(directory.path())).unwrap();
    let old = nodes.enter(1, root, c"l", &look(&link)).unwrap();
    assert_eq!(nodes.enter(1, root, c"l", &look(&link)), Ok(old));
    // A file system gives a new file the number of one that was removed just before: all that is new then is the time.
    let time = Timespec { tv_sec: 77, tv_nsec: 0 };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, &link, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    let new = nodes.enter(1, root, c"l", &look(&link)).unwrap();
    assert_ne!(new, old);
    assert_eq!(nodes.find(1, look(&link).identity()), Some(new));
    nodes.forget(old, 2);
    nodes.forget(new, 1);
    nodes.forget(root, 1);
    assert!(nodes.is_empty() && nodes.index.is_empty());
}

#[test]
fn a_directory_stays_as_long_as_what_is_in_it() {
    let directory = tempfile::tempdir().unwrap();
    let inner = directory.path().join("d");
    create_dir(&inner).unwrap();
    write(inner.join("f"), "").unwrap();
    let mut nodes = Nodes::new(8);
    let root = nodes.enter(1, ROOT, c"share", &look(directory.path())).unwrap();
    let d = nodes.enter(1, root, c"d", &look(&inner)).unwrap();
    let f = nodes.enter(1, d, c"f", &look(&inner.join("f"))).unwrap();
    nodes.forget(root, 1);
    nodes.forget(d, u64::MAX);
    assert_eq!(nodes.len(), 3);
    nodes.forget(f, 1);
    assert!(nodes.is_empty());
    assert!(nodes.index.is_empty());
}

#[test]
fn a_directory_that_seems_to_be_in_itself_becomes_another_node() {
    let directory = tempfile::tempdir().unwrap();
    let (outer, inner) = (directory.path().join("o"), directory.path().join("o/i"));
    std::fs::create_dir_all(&inner).unwrap();
    let mut nodes = Nodes::new(8);
    let root = nodes.enter(1, ROOT, c"share", &look(directory.path())).unwrap();
    let o = nodes.enter(1, root, c"o", &look(&outer)).unwrap();
    let i = nodes.enter(1, o, c"i", &look(&inner)).unwrap();
    // As if they had been swapped behind the guest's back.
    assert!(!nodes.moved(o, i, c"o"));
    let again = nodes.enter(1, i, c"o", &look(&outer)).unwrap();
    assert_ne!(again, o);
    assert_eq!(nodes.find(1, look(&outer).identity()), Some(again));
    for id in [again, i, o, root] {
        nodes.forget(id, 1);
    }
    assert!(nodes.is_empty() && nodes.index.is_empty(), "no circle keeps itself");
}

proptest! {
    #[test]
    fn whatever_is_looked_up_and_forgotten_nothing_remains(
        steps in prop::collection::vec((0..6_usize, 0..6_usize, 0..3_u64), 0..60),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (0..6).map(|name| directory.path().join(format!("{name}"))).collect();
        for path in &paths {
            create_dir(path).unwrap();
        }
        let mut nodes = Nodes::new(8);
        let mut known = vec![nodes.enter(1, ROOT, c"share", &look(directory.path())).unwrap()];
        for (parent, child, forgotten) in steps {
            // Directories turn up anywhere, as if somebody moved them about.
            let parent = known[parent % known.len()];
            if nodes.get(parent).is_ok() {
                known.push(nodes.enter(1, parent, c"x", &look(&paths[child])).unwrap());
            }
            nodes.forget(known[child % known.len()], forgotten);
        }
        for id in known {
            nodes.forget(id, u64::MAX);
        }
        prop_assert_eq!((nodes.len(), nodes.index.len()), (0, 0));
    }
}
