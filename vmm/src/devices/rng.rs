//! Entropy device, section 5.4: fills buffers with the host kernel's random bytes.

use std::io::{self, Read};

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::DeviceState;
use crate::virtio::device::{DeviceError, VirtioDevice};
use crate::virtio::io::DeviceIo;

const QUEUE_SIZES: [u16; 1] = [16];

/// Bytes that one buffer is filled with at most. The standard allows less than was asked for, and Linux asks for 64 at a
/// time; a guest must not make the host generate gigabytes with one descriptor.
const FILL_MAX: usize = 256;

/// The device.
#[derive(Debug, Default)]
pub struct Rng;

/// Reads from the kernel's generator.
struct HostRandom;

impl Read for HostRandom {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the pointer and the length are those of `buffer`.
        let got = unsafe { libc::getrandom(buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn process_queue(&mut self, queue: usize, io: &mut DeviceIo<'_>) -> Result<(), DeviceError> {
        io.take_turn(queue, |memory, chain| {
            let mut writer = chain.writer(memory)?;
            let mut bytes = [0; FILL_MAX];
            let wanted = writer.available_bytes().min(FILL_MAX);
            HostRandom.read_exact(&mut bytes[..wanted])?;
            io::Write::write_all(&mut writer, &bytes[..wanted])?;
            Ok(u32::try_from(wanted).expect("at most FILL_MAX"))
        })
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), &'static str> {
        if *state == DeviceState::Rng { Ok(()) } else { Err("not the state of an entropy device") }
    }
}
