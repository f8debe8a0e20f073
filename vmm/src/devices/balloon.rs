//! Balloon device, section 5.5, for free page reporting: the guest names memory that it does not use, and the host takes it
//! back until the guest touches it again.
//!
//! The balloon itself stays empty: nobody asks the guest to give up memory that it uses.

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::DeviceState;
use crate::memory::Memory;
use crate::virtio::device::{DeviceError, VirtioDevice};
use crate::virtio::io::DeviceIo;

/// Inflate, deflate, reporting: queues of features that are not offered do not exist, so reporting is the third (5.5.2).
const QUEUE_SIZES: [u16; 3] = [16, 16, 32];
const REPORTING: usize = 2;
/// Feature bits, 5.5.3.
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;
const PAGE: u64 = 4096;

/// The device.
#[derive(Debug, Default)]
pub struct Balloon {
    _private: (),
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_REPORTING | 1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Vec<u8> {
        // num_pages and actual: nothing is asked for.
        vec![0; 8]
    }

    fn process_queue(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        io.take_turn(queue, |memory, chain| {
            if queue == REPORTING {
                for descriptor in chain.writable() {
                    give_back(memory, descriptor)?;
                }
            }
            Ok(0)
        })
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), &'static str> {
        if *state == DeviceState::Balloon { Ok(()) } else { Err("not the state of a balloon") }
    }
}

/// Drops the pages of one report. They read as zeros afterwards: a fresh anonymous mapping takes the place of the old one, because
/// dropping pages of a private file mapping would bring the file's bytes back, which the guest does not expect.
fn give_back(memory: &Memory, report: Descriptor) -> Result<(), DeviceError> {
    let (address, length) = (report.addr(), u64::from(report.len()));
    if address.0 % PAGE != 0 || length % PAGE != 0 {
        return Err(DeviceError::Driver("reported memory that is not whole pages"));
    }
    let region =
        memory.find_region(address).ok_or(DeviceError::Driver("reported memory that it does not have"))?;
    let offset = address.0 - region.start_addr().0;
    if offset + length > region.len() {
        return Err(DeviceError::Driver("reported memory that it does not have"));
    }
    if length == 0 {
        return Ok(());
    }
    let host = region.get_host_address(MemoryRegionAddress(offset)).map_err(DeviceError::Memory)?;
    let length = usize::try_from(length).expect("a u32");
    // SAFETY: the range is inside one region of guest memory, which the VMM reads and writes only through volatile accesses.
    let result = unsafe {
        if region.file_offset().is_none() {
            libc::madvise(host.cast(), length, libc::MADV_DONTNEED)
        } else {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
            let mapped = libc::mmap(host.cast(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if mapped == libc::MAP_FAILED { -1 } else { 0 }
        }
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error().into()) }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory;

    fn report(address: u64, length: u32) -> Descriptor {
        Descriptor::new(address, length, 2, 0)
    }

    #[test]
    fn reported_pages_read_as_zeros_even_where_a_file_was_mapped() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 << 20).unwrap();
        std::os::unix::fs::FileExt::write_at(&file, b"template", 0x2000).unwrap();
        let memory = memory::from_file(64, &Arc::new(file), 0).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x2000)).unwrap(), u64::from_ne_bytes(*b"template"));
        give_back(&memory, report(0x2000, 0x1000)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x2000)).unwrap(), 0);

        let memory = memory::anonymous(64).unwrap();
        memory.write_obj(1u64, GuestAddress(0x5008)).unwrap();
        give_back(&memory, report(0x5000, 0x2000)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0x5008)).unwrap(), 0);
    }

    #[test]
    fn reports_of_memory_that_is_not_the_guests_are_refused() {
        let memory = memory::anonymous(64).unwrap();
        for (address, length) in [
            (0x10, 0x1000),
            (0, 0x10),
            (64 << 20, 0x1000),
            ((64 << 20) - 0x1000, 0x2000),
            (u64::MAX - 0xfff, 0x1000),
        ] {
            assert!(give_back(&memory, report(address, length)).is_err(), "{address:#x} {length:#x}");
        }
    }
}
