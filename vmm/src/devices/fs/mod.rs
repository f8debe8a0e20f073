//! File system device, section 5.11: the guest's FUSE requests for a file server outside of the VMM.

use std::os::fd::{OwnedFd, RawFd};

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use super::DeviceState;
use crate::virtio::device::{DeviceError, VirtioDevice};
use crate::virtio::io::DeviceIo;

/// Bytes of a tag, 5.11.4.
pub const TAG_LEN: usize = 36;

/// Requests that must not wait, then all others. The kernel's driver makes requests of at most as many pages as the second has entries.
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The guest could not mount it.
    #[error("file system tag {0:?}: give 1 to {TAG_LEN} bytes, none of them NUL")]
    Tag(String),
}

/// The device.
#[derive(Debug)]
pub struct Fs {
    tag: String,
    server: OwnedFd,
}

impl Fs {
    /// A device that the guest mounts by `tag`. `server` is a connected SEQPACKET socket.
    ///
    /// # Errors
    /// When the tag does not fit.
    pub fn new(server: OwnedFd, tag: &str) -> Result<Self, FsError> {
        if tag.is_empty() || tag.len() > TAG_LEN || tag.contains('\0') {
            return Err(FsError::Tag(tag.to_owned()));
        }
        Ok(Self { tag: tag.to_owned(), server })
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.tag.as_bytes().to_vec();
        config.resize(TAG_LEN, 0);
        config.extend(1u32.to_le_bytes());
        config
    }

    fn process_queue(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        io.take_turn(queue, |_, _| Ok(0))
    }

    fn host_fd(&self) -> Option<RawFd> {
        None
    }

    fn save(&self) -> DeviceState {
        DeviceState::Fs { tag: self.tag.clone(), in_use: false }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), &'static str> {
        if *state == self.save() { Ok(()) } else { Err("the saved file system had another tag") }
    }
}
