//! Extended attributes, stored inline after their inode.

use super::Error;
use crate::excerpt::excerpt_of_bytes;

/// Prefixes of attribute names with their index on disk (`EROFS_XATTR_INDEX_*`). The two ACL names are whole names: what
/// follows them must be empty.
const PREFIXES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];
/// Longest name that Linux takes, its prefix included.
const XATTR_NAME_MAX: usize = 255;
/// `struct erofs_xattr_ibody_header`: a name filter, which is 0 when unused, and the count of shared attributes.
const HEADER_BYTES: usize = 12;
/// `i_xattr_icount` is 16 bits wide and counts the header as one and then units of four bytes.
const MAX_BYTES: usize = HEADER_BYTES + 4 * (u16::MAX as usize - 1);

/// The extended attributes of one inode, in their on-disk form. Cheap when empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Xattrs(Vec<u8>);

impl Xattrs {
    /// No attributes.
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// Whether EROFS, and so the kernel, can hold an attribute of this name.
    pub fn supports(name: &[u8]) -> bool {
        split(name).is_some()
    }

    /// Adds an attribute. The caller gives each name once; order is kept.
    ///
    /// # Errors
    /// If the name has no namespace known to Linux or is longer than 255 bytes, the value is longer than 65,535 bytes, or
    /// all of them together are longer than 262,148 bytes.
    pub fn add(&mut self, name: &[u8], value: &[u8]) -> Result<(), Error> {
        let refuse = |reason| Error::Xattr { name: excerpt_of_bytes(name), reason };
        let (index, suffix) = split(name).ok_or_else(|| refuse("its namespace is not one that Linux has"))?;
        if name.len() > XATTR_NAME_MAX {
            return Err(refuse("its name is longer than 255 bytes"));
        }
        let name_length = u8::try_from(suffix.len()).expect("shorter than the name");
        let value_length =
            u16::try_from(value.len()).map_err(|_| refuse("its value is longer than 65535 bytes"))?;
        let entry = (4 + suffix.len() + value.len()).next_multiple_of(4);
        let before = self.0.len().max(HEADER_BYTES);
        if before + entry > MAX_BYTES {
            return Err(refuse("the attributes of one file exceed 262148 bytes"));
        }
        self.0.resize(before, 0);
        self.0.extend_from_slice(&[name_length, index]);
        self.0.extend_from_slice(&value_length.to_le_bytes());
        self.0.extend_from_slice(suffix);
        self.0.extend_from_slice(value);
        self.0.resize(before + entry, 0);
        Ok(())
    }

    /// Adds an attribute that a container is to see through the overlay its layers are mounted with. Attributes of
    /// overlayfs, which would steer that overlay, get another level of its prefix, which it takes off (Linux 6.7): they
    /// are meant for an overlay inside the container.
    ///
    /// # Errors
    /// As for [`Xattrs::add`].
    pub fn add_below_overlay(&mut self, name: &[u8], value: &[u8]) -> Result<(), Error> {
        const OVERLAY: &[u8] = b"trusted.overlay.";
        match name.strip_prefix(OVERLAY) {
            Some(inner) => self.add(&[OVERLAY, b"overlay.", inner].concat(), value),
            None => self.add(name, value),
        }
    }

    /// Bytes that they take on disk and in memory.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What follows the inode on disk: nothing, or a header and the entries; a multiple of four bytes.
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Gives back what growing reserved: attributes stay in memory until the image is finished.
    pub(super) fn shrink(mut self) -> Self {
        self.0.shrink_to_fit();
        self
    }
}

fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|&(prefix, index)| {
        let suffix = name.strip_prefix(prefix)?;
        (prefix.ends_with(b".") != suffix.is_empty()).then_some((index, suffix))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_encoded_with_their_prefix_index() {
        let mut xattrs = Xattrs::new();
        xattrs.add(b"user.a", b"xyz").unwrap();
        xattrs.add(b"system.posix_acl_access", b"v").unwrap();
        let mut expected = vec![0; HEADER_BYTES];
        expected.extend_from_slice(&[1, 1, 3, 0, b'a', b'x', b'y', b'z']);
        expected.extend_from_slice(&[0, 2, 1, 0, b'v', 0, 0, 0]);
        assert_eq!(xattrs.as_bytes(), expected);
    }

    #[test]
    fn names_outside_the_namespaces_of_linux_are_refused() {
        for name in
            [&b"com.apple.provenance"[..], b"user.", b"system.posix_acl_accessx", b"system.nfs4_acl", b""]
        {
            assert!(!Xattrs::supports(name));
            assert!(matches!(Xattrs::new().add(name, b""), Err(Error::Xattr { .. })));
        }
    }

    #[test]
    fn sizes_end_where_the_format_ends() {
        let mut xattrs = Xattrs::new();
        let long_name = [b"user.".as_slice(), &[b'n'; 250]].concat();
        xattrs.add(&long_name, b"").unwrap();
        assert!(xattrs.add(&[long_name.as_slice(), b"n"].concat(), b"").is_err());
        assert!(xattrs.add(b"user.big", &vec![0; 65536]).is_err());
        for name in [b"user.1", b"user.2", b"user.3"] {
            xattrs.add(name, &vec![0; 65535]).unwrap();
        }
        assert!(xattrs.add(b"user.4", &vec![0; 65535]).is_err());
    }
}
