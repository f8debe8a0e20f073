//! Trees of files, file systems and configurations that tests are made of.

use std::fs::{create_dir, write};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bulkhead::eventually;
use crate::vm::{Result, artifact, ensure};

/// Runs a program of the host that must succeed.
pub fn tool(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    ensure(output.status.success(), || format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)))?;
    Ok(output.stdout)
}

/// Unpacks the busybox image into the new directory `tree`.
pub fn busybox_tree(tree: &Path) -> Result {
    let scratch = tempfile::tempdir()?;
    let archive = artifact("share/bulkhead-tests/busybox.tar");
    tool(Command::new("tar").arg("-xf").arg(archive).arg("-C").arg(scratch.path()))?;
    let blobs = scratch.path().join("blobs/sha256");
    // The image has one layer, and of its blobs only that is compressed.
    let layer =
        std::fs::read_dir(blobs)?.filter_map(|blob| Some(blob.ok()?.path())).find(|blob| is_gzip(blob));
    create_dir(tree)?;
    let layer = layer.ok_or("the busybox image has no layer")?;
    tool(Command::new("tar").arg("-xzpf").arg(layer).arg("-C").arg(tree)).map(drop)
}

fn is_gzip(path: &Path) -> bool {
    std::fs::read(path).is_ok_and(|bytes| bytes.starts_with(&[0x1f, 0x8b]))
}

/// A tmpfs, without devices, unmounted in the end.
pub struct Tmpfs {
    path: PathBuf,
    /// Where it is mounted, if that is a place of its own.
    _own: Option<tempfile::TempDir>,
}

impl Tmpfs {
    /// Mounts one of so many bytes.
    pub fn new(bytes: u32) -> Result<Self> {
        let own = tempfile::tempdir()?;
        let path = own.path().to_owned();
        Self::mount(path, Some(own), &format!("size={bytes},mode=700"))
    }

    /// Mounts one over a directory, with these options.
    pub fn over(path: &Path, options: &str) -> Result<Self> {
        Self::mount(path.to_owned(), None, options)
    }

    fn mount(path: PathBuf, own: Option<tempfile::TempDir>, options: &str) -> Result<Self> {
        let options = format!("nodev,{options}");
        tool(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&path))?;
        Ok(Self { path, _own: own })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Who used it may be about to end. What is still mounted then is found by the check for residue.
        let unmount = || Ok(Command::new("umount").arg("-q").arg(&self.path).status()?.success());
        let _ = eventually("it is unmounted", unmount);
    }
}

/// A configuration file with this text, in the directory.
pub fn config(directory: &Path, text: &str) -> Result<PathBuf> {
    let path = directory.join("config.toml");
    write(&path, text)?;
    Ok(path)
}

/// A copy of the directory with the guest's kernel and image, in which files can be replaced.
pub fn share() -> Result<tempfile::TempDir> {
    let directory = tempfile::tempdir()?;
    for name in ["vmlinux", "guest.erofs"] {
        std::os::unix::fs::symlink(artifact("share/bulkhead").join(name), directory.path().join(name))?;
    }
    Ok(directory)
}

/// An agent that can be told to fail.
#[must_use]
pub fn faulty_agent() -> PathBuf {
    artifact("libexec/bulkhead-tests/bulkhead-agent-faulty")
}

/// Puts the first half of what a link leads to in the place of the link.
pub fn truncate(path: &Path) -> Result {
    let whole = std::fs::read(path)?;
    std::fs::remove_file(path)?;
    Ok(write(path, &whole[..whole.len() / 2])?)
}
