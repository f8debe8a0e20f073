//! Devices as the owner of a VMM holds them: with open files, which become numbers only when a request is made.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use bulkhead_protocol::limits::SHARES_TAG;
use bulkhead_vmm::control::message::{Block, BlockLayout, Device, FDS_MAX, Fd};

/// A disk and the files behind it.
#[derive(Debug)]
pub struct Disk {
    /// Open for reading, and for writing unless `read_only`.
    pub files: Vec<File>,
    /// How the guest sees them.
    pub layout: BlockLayout,
    /// Refuse writes.
    pub read_only: bool,
}

/// Collects the descriptors that go with one request.
#[derive(Debug, Default)]
pub(crate) struct Descriptors<'a>(Vec<BorrowedFd<'a>>);

impl<'a> Descriptors<'a> {
    /// Adds one; more than a packet can carry get a number that the socket will refuse.
    pub(crate) fn add(&mut self, file: &'a impl AsFd) -> Fd {
        let place = u8::try_from(self.0.len().min(FDS_MAX)).expect("FDS_MAX fits");
        self.0.push(file.as_fd());
        Fd(place)
    }

    pub(crate) fn add_disk(&mut self, disk: &'a Disk) -> Device {
        Device::Block(Block {
            files: disk.files.iter().map(|file| self.add(file)).collect(),
            layout: disk.layout,
            read_only: disk.read_only,
            serial: String::new(),
        })
    }

    pub(crate) fn add_vsock(&mut self, listener: &'a UnixListener, cid: u32) -> Device {
        Device::Vsock { listener: self.add(listener), cid }
    }

    pub(crate) fn add_shares(&mut self, server: &'a OwnedFd) -> Device {
        Device::Fs { server: self.add(server), tag: SHARES_TAG.to_owned() }
    }

    pub(crate) fn as_slice(&self) -> &[BorrowedFd<'a>] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_names_its_files_by_their_place_beside_the_packet() {
        let kernel = tempfile::tempfile().unwrap();
        let disk = Disk {
            files: vec![tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()],
            layout: BlockLayout::Partitions,
            read_only: true,
        };
        let mut descriptors = Descriptors::default();
        assert_eq!(descriptors.add(&kernel), Fd(0));
        let Device::Block(block) = descriptors.add_disk(&disk) else { panic!("not a disk") };
        assert_eq!(block.files, [Fd(1), Fd(2)]);
        assert_eq!(descriptors.as_slice().len(), 3);
    }
}
