//! Block device, section 5.2: a disk made of one file or of several, raw, read-only or not.
//!
//! - [`disk`]: the files as one range of sectors
//! - [`gpt`]: the partition table that makes several files one disk
//! - [`request`]: one request of the driver, parsed and done

pub mod disk;
pub mod gpt;
pub mod request;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::disk::Disk;
use super::DeviceState;
use crate::virtio::device::{DeviceError, VirtioDevice};
use crate::virtio::io::DeviceIo;

/// Bytes of a sector, in every virtio disk.
pub const SECTOR: u64 = 512;
/// Bytes of a disk's serial number.
pub const SERIAL_LEN: usize = 20;
const QUEUE_SIZES: [u16; 1] = [128];
/// Segments of one request: a queue's worth but for the header and the status, in an indirect table. Together with
/// the kernel's segments of at most 64 KiB it allows requests of megabytes.
const SEG_MAX: u32 = 126;
/// The size of a request that pays, in sectors. Linux reads twice as much ahead: 512 KiB instead of 128, since a request costs
/// two exits and two wake-ups, and what it reads is mostly in the host's page cache.
const OPT_IO_SIZE: u32 = 512;

/// The device.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    serial: [u8; SERIAL_LEN],
}

impl Block {
    /// A device for a disk, with at most [`SERIAL_LEN`] bytes of serial number.
    pub fn new(disk: Disk, serial: &str) -> Self {
        let mut bytes = [0; SERIAL_LEN];
        let length = serial.len().min(SERIAL_LEN);
        bytes[..length].copy_from_slice(&serial.as_bytes()[..length]);
        Self { disk, serial: bytes }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let access = if self.disk.is_read_only() { VIRTIO_BLK_F_RO } else { VIRTIO_BLK_F_FLUSH };
        1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_TOPOLOGY | 1 << access
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        let capacity = self.disk.sectors().to_le_bytes();
        // size_max, then seg_max, then geometry, blk_size, physical_block_exp, alignment_offset and min_io_size, then opt_io_size
        [&capacity[..], &[0; 4], &SEG_MAX.to_le_bytes(), &[0; 12], &OPT_IO_SIZE.to_le_bytes()].concat()
    }

    fn process_queue(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        io.take_turn(queue, |memory, chain| request::handle(&self.disk, self.serial, memory, chain))
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block { sectors: self.disk.sectors(), read_only: self.disk.is_read_only() }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), &'static str> {
        if *state == self.save() {
            Ok(())
        } else {
            Err("the saved disk had another size or other access rights")
        }
    }
}
