//! Files that output is appended to. A disk may be slow, so it is not this program's only thread that waits for it.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use super::IoError;

/// A file that is appended to.
#[derive(Debug)]
pub(super) struct Appended(Arc<File>);

impl Appended {
    /// Opens a file, which is made with its directories if it is not there.
    pub(super) fn create(path: &Path) -> Result<Self, IoError> {
        let failed = |error| IoError::Open(path.to_owned(), error);
        if let Some(directory) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o755).create(directory).map_err(failed)?;
        }
        let file = OpenOptions::new().append(true).create(true).mode(0o644).open(path).map_err(failed)?;
        Ok(Self(Arc::new(file)))
    }

    /// Opens what is there.
    pub(super) fn open(path: &Path) -> Result<Self, IoError> {
        let file = OpenOptions::new().append(true).open(path);
        file.map(|file| Self(Arc::new(file))).map_err(|error| IoError::Open(path.to_owned(), error))
    }

    /// Appends everything.
    pub(super) async fn write_all(&self, bytes: Vec<u8>) -> io::Result<()> {
        let file = Arc::clone(&self.0);
        let writing = tokio::task::spawn_blocking(move || (&*file).write_all(&bytes));
        writing.await.map_err(io::Error::other)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_there_stays_and_directories_are_made() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        Appended::create(&path).unwrap().write_all(b"one ".to_vec()).await.unwrap();
        let again = Appended::open(&path).unwrap();
        again.write_all(b"two".to_vec()).await.unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one two");
    }

    #[tokio::test]
    async fn a_full_disk_is_an_error() {
        let full = Appended::open(Path::new("/dev/full")).unwrap();
        assert_eq!(full.write_all(b"x".to_vec()).await.unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
