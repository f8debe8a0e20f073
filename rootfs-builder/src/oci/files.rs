//! The files of a source by name: in a directory, or in a tar file that is not unpacked.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::JSON_MAX;
use crate::tar;

/// More files than any archive of images has.
const MAX_FILES: usize = 100_000;

/// Why a file of a source cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is none of that name.
    #[error("it is missing; the image is incomplete")]
    Missing,
    /// Reading failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is a directory or worse.
    #[error("it is not a regular file")]
    NotAFile,
    /// It is somewhere else on this machine.
    #[error("it is not within the image's directory, where alone files of the image are looked for")]
    Outside,
    /// A document that is larger than any.
    #[error("it has {size} bytes, more than the limit of {limit}")]
    TooLarge {
        /// Its size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The size differs from the announced one.
    #[error("it has {actual} bytes, not {expected}; the image is damaged")]
    Size {
        /// As announced.
        expected: u64,
        /// As found.
        actual: u64,
    },
    /// The content differs from the announced one.
    #[error("its digest is {actual}, not {expected}; the image is damaged")]
    Digest {
        /// As announced.
        expected: super::Digest,
        /// As found.
        actual: super::Digest,
    },
    /// The tar file is damaged.
    #[error("the tar file cannot be read")]
    Tar(#[from] tar::Error),
    /// The tar file has too many entries.
    #[error("the tar file has more than {limit} files")]
    TooManyFiles {
        /// The limit.
        limit: usize,
    },
}

/// Files by name. Names come from the image and are not to be trusted.
pub(super) trait Files {
    fn open(&self, name: &str) -> Result<(Box<dyn Read>, u64), FileError>;

    fn has(&self, name: &str) -> bool {
        self.open(name).is_ok()
    }

    /// A whole document.
    fn document(&self, name: &str) -> Result<Vec<u8>, FileError> {
        let (reader, size) = self.open(name)?;
        if size > JSON_MAX {
            return Err(FileError::TooLarge { size, limit: JSON_MAX });
        }
        let mut document = Vec::new();
        reader.take(JSON_MAX).read_to_end(&mut document)?;
        Ok(document)
    }
}

/// A directory. Its names and symbolic links are as little to be trusted as those in an archive.
pub(super) struct Directory(OwnedFd);

impl Directory {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?))
    }
}

impl Files for Directory {
    fn open(&self, name: &str) -> Result<(Box<dyn Read>, u64), FileError> {
        // Not waiting for the other end of a pipe.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let file = rustix::fs::openat2(&self.0, name, flags, Mode::empty(), resolve);
        let file = File::from(file.map_err(|error| match error {
            Errno::NOENT => FileError::Missing,
            Errno::XDEV => FileError::Outside,
            // As a socket answers.
            Errno::NXIO => FileError::NotAFile,
            _ => FileError::Io(error.into()),
        })?);
        let found = file.metadata()?;
        if found.is_file() { Ok((Box::new(file), found.len())) } else { Err(FileError::NotAFile) }
    }
}

/// A tar file with the places of its files.
pub(super) struct TarFile {
    file: Arc<File>,
    places: HashMap<String, Place>,
}

enum Place {
    Content {
        offset: u64,
        size: u64,
    },
    /// `docker save` stores a layer once and links to it.
    Link(String),
}

impl TarFile {
    pub(super) fn new(file: File) -> Result<Self, FileError> {
        let mut places = HashMap::new();
        for entry in tar::list(&file, &tar::Limits { archive_bytes: u64::MAX, ..tar::Limits::default() }) {
            let (name, found) = entry?;
            let place = match found {
                tar::Listed::File { offset, size } => Place::Content { offset, size },
                tar::Listed::Link(target) => Place::Link(target),
            };
            places.insert(name, place);
            if places.len() > MAX_FILES {
                return Err(FileError::TooManyFiles { limit: MAX_FILES });
            }
        }
        Ok(Self { file: Arc::new(file), places })
    }
}

impl Files for TarFile {
    fn open(&self, name: &str) -> Result<(Box<dyn Read>, u64), FileError> {
        let mut place = self.places.get(name);
        if let Some(Place::Link(target)) = place {
            place = self.places.get(target);
        }
        match place {
            Some(&Place::Content { offset, size }) => {
                Ok((Box::new(Slice { file: self.file.clone(), at: offset, left: size }), size))
            }
            Some(Place::Link(_)) => Err(FileError::NotAFile),
            None => Err(FileError::Missing),
        }
    }
}

struct Slice {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Read for Slice {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let count = self.file.read_at(&mut buffer[..wanted], self.at)?;
        self.at += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_regular_files_within_the_directory_are_opened() {
        let bench = tempfile::tempdir().unwrap();
        let outside = bench.path().join("secret");
        std::fs::write(&outside, "x").unwrap();
        let root = bench.path().join("image");
        std::fs::create_dir_all(root.join("blobs")).unwrap();
        std::fs::write(root.join("blobs/file"), "content").unwrap();
        symlink("blobs/file", root.join("inside")).unwrap();
        symlink("../secret", root.join("relative")).unwrap();
        symlink(&outside, root.join("absolute")).unwrap();
        symlink("..", root.join("blobs/up")).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();
        symlink("/proc/self/exe", root.join("magic")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, root.join("pipe"), rustix::fs::FileType::Fifo, Mode::RUSR, 0)
            .unwrap();
        let _socket = UnixListener::bind(root.join("socket")).unwrap();
        let directory = Directory::open(&root).unwrap();

        for good in ["blobs/file", "inside", "blobs/../inside", "blobs/up/inside"] {
            assert_eq!(directory.document(good).unwrap(), b"content", "{good}");
        }
        let absolute = outside.to_str().unwrap();
        for name in [
            absolute,
            "../secret",
            "blobs/../../secret",
            "relative",
            "absolute",
            "blobs/up/../secret",
            "magic",
        ] {
            assert!(matches!(directory.document(name), Err(FileError::Outside)), "{name}");
        }
        for name in ["pipe", "socket", "blobs", "."] {
            assert!(matches!(directory.document(name), Err(FileError::NotAFile)), "{name}");
        }
        for name in ["missing", "dangling", ""] {
            assert!(matches!(directory.document(name), Err(FileError::Missing)), "{name}");
        }
    }
}
