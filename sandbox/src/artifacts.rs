//! What a sandbox is started from: the VMM's executable, the guest's kernel and the guest's image.
//!
//! They lie in `../libexec/bulkhead` and `../share/bulkhead` seen from the directory of the running executable, unless the
//! configuration's `[paths]` or, before all, the environment's `BULKHEAD_LIBEXEC` and `BULKHEAD_SHARE` name other directories.

use std::env;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::config::Paths;
use crate::image_file::{self, Format, ImageFileError};

/// Environment variable that names the directory of `bulkhead-vmm`.
pub const LIBEXEC_VARIABLE: &str = "BULKHEAD_LIBEXEC";
/// Environment variable that names the directory of `vmlinux` and `guest.erofs`.
pub const SHARE_VARIABLE: &str = "BULKHEAD_SHARE";

/// Where the pieces of a sandbox are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifacts {
    /// The VMM's executable.
    pub vmm: PathBuf,
    /// The file server's executable.
    pub file_server: PathBuf,
    /// The guest's kernel: an uncompressed ELF `vmlinux`.
    pub kernel: PathBuf,
    /// The guest's image: an EROFS with the agent.
    pub guest_image: PathBuf,
}

/// Why a piece cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactsError {
    /// The running executable's place, from which the others are found, is not known.
    #[error("cannot tell where this program lies: set {LIBEXEC_VARIABLE} and {SHARE_VARIABLE}")]
    Executable(#[source] io::Error),
    /// It is not there or cannot be read.
    #[error(
        "cannot read {0}: install Bulkhead completely, or say where it is with {LIBEXEC_VARIABLE} and {SHARE_VARIABLE}"
    )]
    Read(PathBuf, #[source] io::Error),
    /// The kernel is no kernel.
    #[error("{0} is not an uncompressed x86_64 ELF kernel: install Bulkhead's vmlinux")]
    NotAKernel(PathBuf),
    /// The kernel's end is missing.
    #[error("{0} is truncated: install Bulkhead's vmlinux again")]
    TruncatedKernel(PathBuf),
    /// The guest image is damaged.
    #[error("the guest image cannot be used: install Bulkhead's guest.erofs again")]
    GuestImage(#[source] ImageFileError),
    /// The guest image is of another kind.
    #[error("{0} is not an EROFS image: install Bulkhead's guest.erofs")]
    GuestFormat(PathBuf),
}

impl Artifacts {
    /// Finds the pieces without opening them.
    ///
    /// # Errors
    /// [`ArtifactsError::Executable`] when nothing says where they are and the running executable cannot be found either.
    pub fn locate(paths: &Paths) -> Result<Self, ArtifactsError> {
        let directory = |variable, configured: &Option<PathBuf>, below| match env::var_os(variable) {
            Some(set) => Ok(PathBuf::from(set)),
            None => configured.clone().map_or_else(|| beside_executable(below), Ok),
        };
        let libexec = directory(LIBEXEC_VARIABLE, &paths.libexec, "libexec/bulkhead")?;
        let share = directory(SHARE_VARIABLE, &paths.share, "share/bulkhead")?;
        Ok(Self {
            vmm: libexec.join("bulkhead-vmm"),
            file_server: libexec.join("bulkhead-fs"),
            kernel: share.join("vmlinux"),
            guest_image: share.join("guest.erofs"),
        })
    }

    /// Opens the kernel, which must be whole.
    ///
    /// # Errors
    /// [`ArtifactsError`] when it is missing, truncated or something else.
    pub fn open_kernel(&self) -> Result<File, ArtifactsError> {
        let failed = |e| ArtifactsError::Read(self.kernel.clone(), e);
        let file = File::open(&self.kernel).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut header = [0; 64];
        match file.read_exact_at(&mut header, 0) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(ArtifactsError::NotAKernel(self.kernel.clone()));
            }
            Err(e) => return Err(failed(e)),
        }
        let end = elf_end(&header).ok_or_else(|| ArtifactsError::NotAKernel(self.kernel.clone()))?;
        if length < end {
            return Err(ArtifactsError::TruncatedKernel(self.kernel.clone()));
        }
        Ok(file)
    }

    /// The kernel's release as it says itself (`6.12.48`), if it can be found.
    pub fn kernel_version(&self) -> Option<String> {
        const BANNER: &[u8] = b"Linux version ";
        let content = std::fs::read(&self.kernel).ok()?;
        // The format string `Linux version %s (%s)` comes first in some kernels.
        let mut banners = content.windows(BANNER.len()).enumerate().filter(|(_, window)| *window == BANNER);
        banners.find_map(|(at, _)| {
            let release = content[at + BANNER.len()..].split(|byte| *byte == b' ').next()?;
            let good = release.first()?.is_ascii_digit() && release.len() < 64;
            good.then(|| crate::console::escape(release))
        })
    }

    /// Opens the guest's image, which must be whole.
    ///
    /// # Errors
    /// [`ArtifactsError`] when it is missing, truncated or something else.
    pub fn open_guest_image(&self) -> Result<File, ArtifactsError> {
        match image_file::open(&self.guest_image) {
            Ok((file, Format::Erofs)) => Ok(file),
            Ok(_) => Err(ArtifactsError::GuestFormat(self.guest_image.clone())),
            Err(ImageFileError::Read(path, e)) => Err(ArtifactsError::Read(path, e)),
            Err(e) => Err(ArtifactsError::GuestImage(e)),
        }
    }
}

fn beside_executable(below: &str) -> Result<PathBuf, ArtifactsError> {
    let executable = env::current_exe().map_err(ArtifactsError::Executable)?;
    let prefix = executable.parent().and_then(Path::parent);
    prefix.map(|prefix| prefix.join(below)).ok_or_else(|| {
        ArtifactsError::Executable(io::Error::other(format!("{} has no prefix", executable.display())))
    })
}

/// Where the file of an x86_64 ELF executable must end at the earliest: linkers put the section headers last.
fn elf_end(header: &[u8; 64]) -> Option<u64> {
    // ELF64, little endian, ET_EXEC or ET_DYN, EM_X86_64.
    let is_kernel =
        header[..6] == *b"\x7fELF\x02\x01" && matches!(header[16], 2 | 3) && header[18..20] == [62, 0];
    let u16_at = |at: usize| u64::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let u64_at = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("8 bytes"));
    let table_end = |offset: u64, size: u64, count: u64| offset.checked_add(size * count);
    let programs = table_end(u64_at(32), u16_at(54), u16_at(56))?;
    let sections = table_end(u64_at(40), u16_at(58), u16_at(60))?;
    is_kernel.then_some(programs.max(sections))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn artifacts(kernel: &[u8], guest_image: &[u8]) -> (tempfile::TempDir, Artifacts) {
        let dir = tempfile::tempdir().unwrap();
        let at = |name| dir.path().join(name);
        fs::write(at("vmlinux"), kernel).unwrap();
        fs::write(at("guest.erofs"), guest_image).unwrap();
        let artifacts = Artifacts {
            vmm: at("bulkhead-vmm"),
            file_server: at("bulkhead-fs"),
            kernel: at("vmlinux"),
            guest_image: at("guest.erofs"),
        };
        (dir, artifacts)
    }

    fn elf(sections_at: u64) -> Vec<u8> {
        let mut elf = vec![0; 4096];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[16] = 2;
        elf[18] = 62;
        elf[40..48].copy_from_slice(&sections_at.to_le_bytes());
        elf[58] = 64;
        elf[60] = 2;
        elf
    }

    #[test]
    fn a_whole_kernel_is_opened_and_a_truncated_one_refused() {
        assert!(artifacts(&elf(4096 - 128), b"").1.open_kernel().is_ok());
        let cut = artifacts(&elf(4096 - 127), b"").1.open_kernel();
        assert!(matches!(cut, Err(ArtifactsError::TruncatedKernel(_))));
        let overflow = artifacts(&elf(u64::MAX), b"").1.open_kernel();
        assert!(matches!(overflow, Err(ArtifactsError::NotAKernel(_))));
    }

    #[test]
    fn the_kernels_release_is_that_of_its_banner() {
        let kernel = b"..Linux version %s (%s)\0..Linux version 6.12.48 (builder@host)..";
        assert_eq!(artifacts(kernel, b"").1.kernel_version().as_deref(), Some("6.12.48"));
        assert_eq!(artifacts(b"nothing", b"").1.kernel_version(), None);
    }

    #[test]
    fn what_is_no_kernel_and_no_guest_image_is_named() {
        let (dir, artifacts) = artifacts(b"MZ", b"text");
        assert!(matches!(artifacts.open_kernel(), Err(ArtifactsError::NotAKernel(_))));
        let error = artifacts.open_guest_image().unwrap_err();
        assert!(matches!(error, ArtifactsError::GuestImage(ImageFileError::Unknown(_))), "{error}");
        drop(dir);
        let error = artifacts.open_kernel().unwrap_err();
        assert!(error.to_string().contains("vmlinux"), "{error}");
        assert!(matches!(artifacts.open_guest_image(), Err(ArtifactsError::Read(..))));
    }

    #[test]
    fn the_configuration_says_where_the_pieces_are() {
        let paths = Paths { libexec: Some("/a".into()), share: Some("/b".into()), ..Default::default() };
        let artifacts = Artifacts::locate(&paths).unwrap();
        assert_eq!(artifacts.vmm, Path::new("/a/bulkhead-vmm"));
        assert_eq!(artifacts.guest_image, Path::new("/b/guest.erofs"));
    }
}
