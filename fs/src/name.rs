//! Names that a guest may give: one component of a path, which cannot lead anywhere but into the directory that it is looked up in.

use std::ffi::CStr;

use rustix::io::Errno;

/// Bytes of a name, as on every file system of Linux.
pub const NAME_MAX: usize = 255;

/// A name of something in a directory: not empty, not `.` or `..`, without `/`, at most [`NAME_MAX`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Takes a name that is one.
    ///
    /// # Errors
    /// ENAMETOOLONG, and EINVAL for all else.
    pub fn new(name: &'a CStr) -> Result<Self, Errno> {
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.len() > NAME_MAX => Err(Errno::NAMETOOLONG),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            _ => Ok(Self(name)),
        }
    }

    /// For the kernel.
    pub fn as_c_str(self) -> &'a CStr {
        self.0
    }

    /// Without the NUL.
    pub fn as_bytes(self) -> &'a [u8] {
        self.0.to_bytes()
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use proptest::prelude::*;

    use super::*;

    fn new(name: &str) -> Result<(), Errno> {
        Name::new(&CString::new(name).unwrap()).map(drop)
    }

    #[test]
    fn names_of_one_component_are_taken() {
        for name in ["a", "...", ".a", "..a", " ", "\u{7f}\n", &"x".repeat(255)] {
            assert_eq!(new(name), Ok(()), "{name:?}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["", ".", "..", "/", "a/b", "/etc/passwd", "../x", "a/"] {
            assert_eq!(new(name), Err(Errno::INVAL), "{name:?}");
        }
        assert_eq!(new(&"x".repeat(256)), Err(Errno::NAMETOOLONG));
    }

    proptest! {
        #[test]
        fn what_is_taken_is_one_component(name in "[./a]{0,6}") {
            let one = std::path::Path::new(&name).components().collect::<Vec<_>>();
            let plain = matches!(one[..], [std::path::Component::Normal(only)] if only == name.as_str());
            prop_assert_eq!(new(&name).is_ok(), plain);
        }
    }
}
