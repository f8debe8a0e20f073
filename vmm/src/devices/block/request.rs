//! One request of the driver, section 5.2.6: a header, data, and a status byte at the end.

use std::collections::VecDeque;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::{GuestMemory, Permissions, VolatileSlice};

use super::disk::Disk;
use super::{SECTOR, SEG_MAX, SERIAL_LEN};
use crate::complaint::complain;
use crate::devices::transfer::take_front;
use crate::memory::Memory;
use crate::virtio::device::DeviceError;
use crate::virtio::io::Chain;

const HEADER_LEN: usize = 16;
/// Descriptors of one request: the data, the header, the status.
const DESCRIPTORS_MAX: usize = SEG_MAX as usize + 2;

/// Does what a request asks and says how many bytes were written to the driver's buffers.
///
/// # Errors
/// When the chain is not a request at all. What is wrong within a request is told by its status.
pub fn handle(
    disk: &Disk,
    serial: [u8; SERIAL_LEN],
    memory: &Memory,
    chain: Chain<'_>,
) -> Result<u32, DeviceError> {
    let (mut from_driver, mut to_driver) = (VecDeque::new(), VecDeque::new());
    for (count, descriptor) in chain.enumerate() {
        if count >= DESCRIPTORS_MAX {
            return Err(DeviceError::Driver("a request of more segments than allowed"));
        }
        let (access, list) = if descriptor.is_write_only() {
            (Permissions::Write, &mut to_driver)
        } else {
            (Permissions::Read, &mut from_driver)
        };
        for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize, access)? {
            list.push_back(slice?);
        }
    }
    let writable = length(&to_driver);
    let data_length = writable.checked_sub(1).ok_or(DeviceError::Driver("a request without a status"))?;
    let data = take(&mut to_driver, data_length)?;
    let header = read_header(&mut from_driver)?;
    let from_driver = Vec::from(from_driver);

    let (status, written) = match execute(disk, serial, &header, &from_driver, &data) {
        Ok(written) => (VIRTIO_BLK_S_OK, written),
        Err(status) => (status, 0),
    };
    let status = u8::try_from(status).expect("a status is a byte");
    to_driver.front().ok_or(DeviceError::Driver("a request without a status"))?.copy_from(&[status]);
    // The status lies behind the data, whether that was written or not.
    u32::try_from(if written > 0 { writable } else { 1 })
        .map_err(|_| DeviceError::Driver("a request of over 4 GiB"))
}

struct Header {
    kind: u32,
    sector: u64,
}

fn read_header(from_driver: &mut VecDeque<VolatileSlice<'_>>) -> Result<Header, DeviceError> {
    let slices = take(from_driver, HEADER_LEN as u64)?;
    let mut bytes = [0; HEADER_LEN];
    let mut at = 0;
    for slice in slices {
        at += slice.copy_to(&mut bytes[at..]);
    }
    if at < bytes.len() {
        return Err(DeviceError::Driver("a request without a header"));
    }
    let (kind, rest) = bytes.split_first_chunk::<4>().expect("16 bytes");
    let (_reserved, sector) = rest.split_first_chunk::<4>().expect("12 bytes");
    Ok(Header {
        kind: u32::from_le_bytes(*kind),
        sector: u64::from_le_bytes(sector.try_into().expect("8 bytes")),
    })
}

/// Returns the bytes written to `to_driver`, or a status other than OK.
fn execute(
    disk: &Disk,
    serial: [u8; SERIAL_LEN],
    header: &Header,
    from_driver: &[VolatileSlice<'_>],
    to_driver: &[VolatileSlice<'_>],
) -> Result<u64, u32> {
    let io_error = |error: std::io::Error| {
        complain(format_args!("disk: {error}"));
        VIRTIO_BLK_S_IOERR
    };
    match header.kind {
        VIRTIO_BLK_T_IN => {
            let length = slices_length(to_driver);
            let at = range(disk, header.sector, length)?;
            disk.read(at, to_driver).map_err(io_error)?;
            Ok(length)
        }
        VIRTIO_BLK_T_OUT if disk.is_read_only() => Err(VIRTIO_BLK_S_IOERR),
        VIRTIO_BLK_T_OUT => {
            let at = range(disk, header.sector, slices_length(from_driver))?;
            disk.write(at, from_driver).map_err(io_error)?;
            Ok(0)
        }
        VIRTIO_BLK_T_FLUSH => {
            disk.flush().map_err(io_error)?;
            Ok(0)
        }
        VIRTIO_BLK_T_GET_ID => {
            let mut rest = &serial[..];
            for slice in to_driver {
                let (now, later) = rest.split_at(rest.len().min(slice.len()));
                slice.copy_from(now);
                rest = later;
            }
            Ok((SERIAL_LEN - rest.len()) as u64)
        }
        _ => Err(VIRTIO_BLK_S_UNSUPP),
    }
}

/// The byte offset of a transfer, which must be whole sectors inside the disk.
fn range(disk: &Disk, sector: u64, length: u64) -> Result<u64, u32> {
    let end = sector.checked_add(length / SECTOR);
    if length.is_multiple_of(SECTOR) && end.is_some_and(|end| end <= disk.sectors()) {
        Ok(sector * SECTOR)
    } else {
        Err(VIRTIO_BLK_S_IOERR)
    }
}

fn take<'a>(
    list: &mut VecDeque<VolatileSlice<'a>>,
    length: u64,
) -> Result<Vec<VolatileSlice<'a>>, DeviceError> {
    take_front(list, length).map_err(|_| DeviceError::Driver("a request that cannot be cut"))
}

fn length(list: &VecDeque<VolatileSlice<'_>>) -> u64 {
    list.iter().map(|slice| slice.len() as u64).sum()
}

fn slices_length(list: &[VolatileSlice<'_>]) -> u64 {
    list.iter().map(|slice| slice.len() as u64).sum()
}
