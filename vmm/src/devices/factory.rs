//! Devices from what the owner said and the descriptors that came with it.

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_ioctls::Kvm;

use super::balloon::Balloon;
use super::block::Block;
use super::block::disk::{Disk, DiskError};
use super::console::{Console, SharedRing};
use super::fs::{Fs, FsError};
use super::rng::Rng;
use super::vsock::{Vsock, VsockError};
use crate::control::message::{self, BlockLayout, Device, Fd};
use crate::virtio::device::VirtioDevice;

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum FactoryError {
    /// The request names a descriptor that did not come with it, or one twice.
    #[error("the request names descriptor {0}, which did not come with it")]
    NoFd(u8),
    /// A disk with several files but one place for them.
    #[error("a disk with layout Whole needs one file, not {0}")]
    Files(usize),
    /// Partitions can only be read.
    #[error("a disk with layout Partitions must be read-only")]
    ReadWrite,
    /// See [`DiskError`].
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// See [`VsockError`].
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// See [`FsError`].
    #[error(transparent)]
    Fs(#[from] FsError),
}

/// The descriptors of one request, each to be taken once.
#[derive(Debug)]
pub struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    /// What came with a request.
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// Takes one.
    ///
    /// # Errors
    /// [`FactoryError::NoFd`] when it is not there.
    pub fn take(&mut self, fd: Fd) -> Result<OwnedFd, FactoryError> {
        self.0.get_mut(usize::from(fd.0)).and_then(Option::take).ok_or(FactoryError::NoFd(fd.0))
    }

    /// Takes the one that is `/dev/kvm`.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub fn take_kvm(&mut self, fd: Fd) -> Result<Kvm, FactoryError> {
        let fd = self.take(fd)?.into_raw_fd();
        // SAFETY: the descriptor was ours alone until a moment ago. If it is not /dev/kvm, its ioctls fail.
        Ok(unsafe { Kvm::from_raw_fd(fd) })
    }
}

/// Makes a device.
///
/// # Errors
/// [`FactoryError`] when its host side is not usable.
pub fn make(
    device: &Device,
    fds: &mut Fds,
    console: &SharedRing,
) -> Result<Box<dyn VirtioDevice>, FactoryError> {
    Ok(match device {
        Device::Block(block) => Box::new(make_block(block, fds)?),
        Device::Vsock { listener, cid } => Box::new(Vsock::new(fds.take(*listener)?, u64::from(*cid))?),
        Device::Rng => Box::new(Rng),
        Device::Console => Box::new(Console::new(console.clone())),
        Device::Balloon => Box::new(Balloon::default()),
        Device::Fs { server, tag } => Box::new(Fs::new(fds.take(*server)?, tag)?),
    })
}

fn make_block(block: &message::Block, fds: &mut Fds) -> Result<Block, FactoryError> {
    let mut files = Vec::with_capacity(block.files.len());
    for fd in &block.files {
        files.push(File::from(fds.take(*fd)?));
    }
    let disk = match block.layout {
        BlockLayout::Partitions if !block.read_only => return Err(FactoryError::ReadWrite),
        BlockLayout::Partitions => Disk::partitions(files)?,
        BlockLayout::Whole => match <[File; 1]>::try_from(files) {
            Ok([file]) => Disk::whole(file, block.read_only)?,
            Err(files) => return Err(FactoryError::Files(files.len())),
        },
    };
    Ok(Block::new(disk, &block.serial))
}
