//! Names in an archive: untrusted, relative to the root of the layer.

/// The components of a name: `/` in front, empty ones and `.` vanish; `..` goes up, lexically. None if it leaves the root.
///
/// Leading slashes vanish because Docker drops them; Go's tools, which make most layers, resolve `..` this way.
pub(super) fn components(name: &[u8]) -> Option<Vec<&[u8]>> {
    let mut components = Vec::new();
    for component in name.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => drop(components.pop()?),
            _ => components.push(component),
        }
    }
    Some(components)
}

/// What the last component of a name says about lower layers (OCI image specification, "Whiteouts").
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Whiteout<'a> {
    /// `.wh.x`: `x` of the lower layers is gone.
    File(&'a [u8]),
    /// `.wh..wh..opq`: the directory hides everything below it.
    Opaque,
    /// `.wh..wh.*`: bookkeeping of AUFS.
    Bookkeeping,
    /// An ordinary entry.
    None,
}

/// Classifies an entry by its components.
pub(super) fn whiteout<'a>(components: &[&'a [u8]]) -> Whiteout<'a> {
    let Some((last, parents)) = components.split_last() else { return Whiteout::None };
    if parents.iter().any(|parent| parent.starts_with(b".wh..wh.")) {
        return Whiteout::Bookkeeping;
    }
    match last.strip_prefix(b".wh.") {
        Some(b".wh..opq") => Whiteout::Opaque,
        Some(rest) if rest.starts_with(b".wh.") => Whiteout::Bookkeeping,
        Some(rest) => Whiteout::File(rest),
        None => Whiteout::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(name: &[u8]) -> Option<Vec<u8>> {
        components(name).map(|components| components.join(&b'|'))
    }

    #[test]
    fn names_are_relative_to_the_root() {
        for (name, expected) in [
            (&b"usr/bin/env"[..], Some(&b"usr|bin|env"[..])),
            (b"/etc//passwd", Some(b"etc|passwd")),
            (b"./a/./b/", Some(b"a|b")),
            (b"a/b/../../c", Some(b"c")),
            (b"./", Some(b"")),
            (b"a/..", Some(b"")),
            (b"..", None),
            (b"../etc/passwd", None),
            (b"a/../../etc", None),
            (b"/../etc", None),
        ] {
            assert_eq!(joined(name).as_deref(), expected, "{}", String::from_utf8_lossy(name));
        }
    }

    #[test]
    fn whiteouts_are_told_apart() {
        let of = |name: &'static [u8]| whiteout(&components(name).unwrap());
        assert_eq!(of(b"a/.wh.b"), Whiteout::File(b"b"));
        assert_eq!(of(b"a/.wh..wh..opq"), Whiteout::Opaque);
        assert_eq!(of(b".wh..wh.plnk"), Whiteout::Bookkeeping);
        assert_eq!(of(b".wh..wh.plnk/1.2"), Whiteout::Bookkeeping);
        assert_eq!(of(b"a/.wh"), Whiteout::None);
        assert_eq!(of(b""), Whiteout::None);
    }
}
