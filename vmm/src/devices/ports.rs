//! The I/O ports of the machine: status, reset, and a serial port for boots that fail early. Reads of other ports give all
//! ones, writes to them are lost, as on a machine with nothing there.

use std::io::{self, Write};
use std::sync::PoisonError;

use vm_superio::{Serial, Trigger};

use super::console::SharedRing;
use crate::arch::layout::{RESET_COMMAND, RESET_PORT, SERIAL_PORT};

const SERIAL_PORTS: u16 = 8;

/// What a write to a port asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortWrite {
    /// Nothing more.
    Done,
    /// The guest says this to the machine's owner.
    Status(u8),
    /// The guest wants a reset.
    Reset,
}

/// The ports.
#[derive(Debug)]
pub struct Ports {
    status_port: u16,
    serial: Option<Serial<NoInterrupt, vm_superio::serial::NoEvents, RingWriter>>,
}

/// `earlyprintk` polls: no interrupt is needed.
#[derive(Debug)]
struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct RingWriter(SharedRing);

impl Write for RingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Ports {
    /// The ports of one machine; with `serial`, a 16550 that prints to the console ring.
    pub fn new(status_port: u16, serial: Option<SharedRing>) -> Self {
        Self { status_port, serial: serial.map(|ring| Serial::new(NoInterrupt, RingWriter(ring))) }
    }

    /// The guest reads from a port.
    pub fn read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, data) {
            // "Input buffer empty", or the kernel would wait 130 ms before it asks for a reset.
            (RESET_PORT, [byte]) => *byte = 0,
            (port, [byte]) => {
                if let (Some(serial), Some(offset)) = (self.serial.as_mut(), serial_offset(port)) {
                    *byte = serial.read(offset);
                }
            }
            _ => {}
        }
    }

    /// The guest writes to a port.
    pub fn write(&mut self, port: u16, data: &[u8]) -> PortWrite {
        match (port, data) {
            (RESET_PORT, [RESET_COMMAND]) => PortWrite::Reset,
            (port, [byte]) if port == self.status_port => PortWrite::Status(*byte),
            (port, [byte]) => {
                if let (Some(serial), Some(offset)) = (self.serial.as_mut(), serial_offset(port)) {
                    // The ring takes everything, and nothing else of a write can fail.
                    let _ = serial.write(offset, *byte);
                }
                PortWrite::Done
            }
            _ => PortWrite::Done,
        }
    }
}

fn serial_offset(port: u16) -> Option<u8> {
    let offset = port.checked_sub(SERIAL_PORT).filter(|&offset| offset < SERIAL_PORTS)?;
    u8::try_from(offset).ok()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::console_ring::{self, ConsoleRing};

    #[test]
    fn status_and_reset_are_told_apart_from_noise() {
        let mut ports = Ports::new(0x600, None);
        assert_eq!(ports.write(0x600, &[1]), PortWrite::Status(1));
        assert_eq!(ports.write(0x600, &[1, 2]), PortWrite::Done);
        assert_eq!(ports.write(RESET_PORT, &[RESET_COMMAND]), PortWrite::Reset);
        assert_eq!(ports.write(RESET_PORT, &[0xd1]), PortWrite::Done);
        assert_eq!(ports.write(0x80, &[1]), PortWrite::Done);
        let mut byte = [7];
        ports.read(RESET_PORT, &mut byte);
        assert_eq!(byte, [0]);
        ports.read(SERIAL_PORT, &mut byte);
        assert_eq!(byte, [0xff]);
    }

    #[test]
    fn the_serial_port_prints_to_the_console() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(console_ring::FILE_SIZE as u64).unwrap();
        let ring = Arc::new(Mutex::new(ConsoleRing::new(&file).unwrap()));
        let mut ports = Ports::new(0x600, Some(ring));
        for byte in b"early" {
            let mut status = [0];
            ports.read(SERIAL_PORT + 5, &mut status);
            assert_eq!(status[0] & 0x20, 0x20, "the transmitter is ready");
            ports.write(SERIAL_PORT, &[*byte]);
        }
        assert_eq!(console_ring::read(&file).unwrap(), b"early");
    }
}
