//! The guest as a machine: its clock, its entropy, its name, its processors and its late-bound devices.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use bulkhead_protocol::agent::GuestDetails;
use bulkhead_protocol::limits::PROTOCOL_VERSION;
use rustix::fd::AsRawFd as _;
use rustix::fs::{Mode, OFlags, open, sync};
use rustix::io::Errno;
use rustix::system::{RebootCommand, reboot, sethostname, sysinfo, uname};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::container::shares;
use crate::{rcu, status};

/// The clock is left alone when it is off by no more than this.
const CLOCK_TOLERANCE_NS: u64 = 100_000_000;
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
const DEVICES: &str = "/sys/bus/platform/devices";
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// What could not be done to the guest.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("set the clock to {0} ns after 1970")]
    Clock(u64, #[source] Errno),
    #[error("add entropy: {0}")]
    Entropy(&'static str, #[source] io::Error),
    #[error("set the hostname to {0:?}")]
    Hostname(String, #[source] Errno),
    #[error("the guest has no slot {0}: its command line declares no virtio-mmio device of that number")]
    NoSlot(u32),
    #[error("slot {0} holds no device that a driver wants")]
    NoDevice(u32),
    #[error("slot {0} has no partition {1}")]
    NoPartition(u32, u32),
    #[error("slot {0}'s device is in use")]
    SlotInUse(u32),
    #[error("write {what} to {file}")]
    Write { what: String, file: String, source: io::Error },
    #[error("read {0}")]
    Read(PathBuf, #[source] io::Error),
    #[error("the guest can have {0} CPUs, not {1}")]
    NoCpu(u32, u32),
    #[error("expedite RCU grace periods")]
    Expedite(#[source] io::Error),
    #[error("reset the machine")]
    Reset(#[source] io::Error),
}

/// Nanoseconds of a clock since its zero.
pub(crate) fn nanoseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// What runs here; `ready_after_boot_ns` is `CLOCK_BOOTTIME` of the ready status.
///
/// # Errors
/// [`Error::Read`] when the number of CPUs cannot be read.
pub(crate) fn details(ready_after_boot_ns: u64) -> Result<GuestDetails, Error> {
    let info = sysinfo();
    Ok(GuestDetails {
        protocol_version: PROTOCOL_VERSION,
        agent_version: env!("CARGO_PKG_VERSION").into(),
        kernel_release: uname().release().to_string_lossy().into_owned(),
        cpus_online: cpus_online()?,
        memory_total_bytes: info.totalram.saturating_mul(u64::from(info.mem_unit)),
        ready_after_boot_ns,
        ..GuestDetails::default()
    })
}

/// Steps `CLOCK_REALTIME` to `host` (nanoseconds since 1970) when it is off by more than 100 ms. Returns by how much the
/// host is ahead, and whether the clock was stepped.
///
/// # Errors
/// [`Error::Clock`] when the kernel refuses the time.
pub(crate) fn set_clock(host: u64) -> Result<(i64, bool), Error> {
    let (offset, step) = clock_offset(host, nanoseconds(ClockId::Realtime));
    if step {
        let (seconds, rest) = (host / 1_000_000_000, host % 1_000_000_000);
        let time = Timespec {
            tv_sec: i64::try_from(seconds).unwrap_or(i64::MAX),
            tv_nsec: i64::try_from(rest).unwrap_or(0),
        };
        clock_settime(ClockId::Realtime, time).map_err(|error| Error::Clock(host, error))?;
    }
    Ok((offset, step))
}

/// How far the host's clock is ahead, and whether that is too far. Centuries show as far away as can be said.
fn clock_offset(host: u64, guest: u64) -> (i64, bool) {
    let offset = i128::from(host) - i128::from(guest);
    let clamped = offset.clamp(i64::MIN.into(), i64::MAX.into());
    (i64::try_from(clamped).unwrap_or(0), offset.unsigned_abs() > u128::from(CLOCK_TOLERANCE_NS))
}

/// Credits `seed` (at most 512 bytes) in full and reseeds the kernel's generator with it.
///
/// # Errors
/// [`Error::Entropy`] with the step that the kernel refused.
pub(crate) fn add_entropy(seed: &[u8]) -> Result<(), Error> {
    // linux/random.h: _IOW('R', 0x03, int[2]) and _IO('R', 0x07).
    const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
    const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

    let device = File::options()
        .write(true)
        .open("/dev/urandom")
        .map_err(|error| Error::Entropy("open /dev/urandom", error))?;
    // struct rand_pool_info: bits of entropy, bytes of data, the data.
    let length = u32::try_from(seed.len()).unwrap_or(0);
    let mut info = Vec::with_capacity(8 + seed.len());
    info.extend((length * 8).to_ne_bytes());
    info.extend(length.to_ne_bytes());
    info.extend(seed);
    // SAFETY: `info` is a rand_pool_info, whose second number is the count of bytes that follow it.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, info.as_ptr()) } < 0 {
        return Err(Error::Entropy("RNDADDENTROPY", io::Error::last_os_error()));
    }
    // SAFETY: RNDRESEEDCRNG takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) } < 0 {
        return Err(Error::Entropy("RNDRESEEDCRNG", io::Error::last_os_error()));
    }
    Ok(())
}

/// Names the guest.
///
/// # Errors
/// [`Error::Hostname`] when the kernel refuses.
pub(crate) fn set_hostname(name: &str) -> Result<(), Error> {
    sethostname(name.as_bytes()).map_err(|error| Error::Hostname(name.into(), error))
}

/// Has the kernel probe a slot that the VMM has filled. Probing is synchronous, so a block device is there when this
/// returns; its name is the answer. A slot that is bound already is fine.
///
/// # Errors
/// [`Error::NoSlot`], or [`Error::NoDevice`] when no driver takes what the slot holds.
pub(crate) fn bind_slot(slot: u32) -> Result<Option<String>, Error> {
    let device = platform_device(slot)?;
    // An empty slot's device is not bound after boot: its probe ended in ENODEV.
    if !device.join("driver").exists() {
        match control(slot, "bind") {
            // Another call was faster.
            Err(Error::Write { source, .. }) if source.kind() == io::ErrorKind::ResourceBusy => {}
            other => other?,
        }
    }
    if virtio_device(slot)?.is_none() {
        return Err(Error::NoDevice(slot));
    }
    block_name(slot)
}

/// Has the kernel let go of a slot before the VMM empties it. A slot that is not bound is fine.
///
/// # Errors
/// [`Error::SlotInUse`] when a file system of its block device is mounted, or the shares of its fs device are.
pub(crate) fn unbind_slot(slot: u32) -> Result<(), Error> {
    if !platform_device(slot)?.join("driver").exists() {
        return Ok(());
    }
    if let Some(name) = block_name(slot)? {
        // O_EXCL on a block device without O_CREAT: EBUSY when the device or a partition of it is claimed, by a mount.
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        if let Err(Errno::BUSY) = open(Path::new("/dev").join(name), flags, Mode::empty()) {
            return Err(Error::SlotInUse(slot));
        }
    }
    // What was once mounted stays in use: containers have parts of it.
    let driver = virtio_device(slot)?.and_then(|device| fs::read_link(device.join("driver")).ok());
    if driver.is_some_and(|driver| driver.ends_with("virtiofs")) && shares::is_mounted().unwrap_or(false) {
        return Err(Error::SlotInUse(slot));
    }
    control(slot, "unbind")
}

/// The block device, or the partition of it, that a slot holds, below `/dev`.
///
/// # Errors
/// [`Error::NoSlot`], [`Error::NoDevice`] or [`Error::NoPartition`].
pub(crate) fn block_device(slot: u32, partition: u32) -> Result<PathBuf, Error> {
    let disk = match block_name(slot)? {
        Some(name) => name,
        None => bind_slot(slot)?.ok_or(Error::NoDevice(slot))?,
    };
    let name = match partition {
        0 => disk,
        // Disks are named vda, vdb, ...: their partitions have no `p` before the number.
        n => format!("{disk}{n}"),
    };
    let path = Path::new("/dev").join(name);
    if path.exists() { Ok(path) } else { Err(Error::NoPartition(slot, partition)) }
}

/// Brings processors online until `count` are; the VMM has made their vCPUs. Fewer than are online is no request.
///
/// # Errors
/// [`Error::NoCpu`] when the machine has not so many, [`Error::Write`] when one does not come up.
pub(crate) fn online_cpus(count: u32) -> Result<u32, Error> {
    rcu::expedited(|| bring_online(count)).map_err(Error::Expedite)??;
    cpus_online()
}

fn bring_online(count: u32) -> Result<(), Error> {
    for cpu in 0..count {
        let file = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        // The first processor has no such file when it cannot be taken offline.
        match fs::read_to_string(&file) {
            Ok(state) if state.trim() == "1" => {}
            Ok(_) => write(&file, "1")?,
            Err(_) if cpu == 0 => {}
            Err(_) => return Err(Error::NoCpu(cpu, count)),
        }
    }
    Ok(())
}

/// Writes what disks are to hold, says so on the status port, and resets the machine.
///
/// # Errors
/// [`Error::Reset`] when there is no status port or the kernel refuses.
pub(crate) fn shutdown() -> Result<(), Error> {
    sync();
    status::report(bulkhead_protocol::status::STOPPED).map_err(Error::Reset)?;
    reboot(RebootCommand::Restart).map_err(|error| Error::Reset(error.into()))
}

fn cpus_online() -> Result<u32, Error> {
    let list = fs::read_to_string(ONLINE).map_err(|error| Error::Read(ONLINE.into(), error))?;
    Ok(count_cpus(&list))
}

/// Counts a list like `0-2,5`.
fn count_cpus(list: &str) -> u32 {
    let ranges = list.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        Some((first.parse::<u32>().ok()?, last.parse::<u32>().ok()?))
    });
    ranges.map(|(first, last)| last.saturating_sub(first).saturating_add(1)).sum()
}

fn platform_device(slot: u32) -> Result<PathBuf, Error> {
    let path = Path::new(DEVICES).join(name(slot));
    if path.exists() { Ok(path) } else { Err(Error::NoSlot(slot)) }
}

/// What the kernel calls the device that the command line's nth `virtio_mmio.device=` declares.
fn name(slot: u32) -> String {
    format!("virtio-mmio.{slot}")
}

/// The directory of the virtio device that a bound slot holds.
fn virtio_device(slot: u32) -> Result<Option<PathBuf>, Error> {
    entry(&platform_device(slot)?, |name| name.starts_with("virtio"))
}

fn block_name(slot: u32) -> Result<Option<String>, Error> {
    let Some(device) = virtio_device(slot)? else { return Ok(None) };
    let directory = device.join("block");
    if !directory.exists() {
        return Ok(None);
    }
    let disk = entry(&directory, |_| true)?;
    Ok(disk.and_then(|path| path.file_name().map(|name| name.to_string_lossy().into_owned())))
}

/// The first entry of a directory whose name is wanted.
fn entry(directory: &Path, wanted: impl Fn(&str) -> bool) -> Result<Option<PathBuf>, Error> {
    let read = |error| Error::Read(directory.to_owned(), error);
    for entry in fs::read_dir(directory).map_err(read)? {
        let entry = entry.map_err(read)?;
        if entry.file_name().to_str().is_some_and(&wanted) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

fn control(slot: u32, what: &str) -> Result<(), Error> {
    match write(&format!("{DRIVER}/{what}"), &name(slot)) {
        // bind_store() in the kernel's drivers/base/bus.c: the probe found nothing for it.
        Err(Error::Write { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Err(Error::NoDevice(slot))
        }
        Err(Error::Write { source, .. }) if source.raw_os_error() == Some(libc::ENODEV) => {
            Err(Error::NoDevice(slot))
        }
        other => other,
    }
}

fn write(file: &str, what: &str) -> Result<(), Error> {
    let written = File::options().write(true).open(file).and_then(|mut open| open.write_all(what.as_bytes()));
    written.map_err(|source| Error::Write { what: what.into(), file: file.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_counted() {
        assert_eq!(count_cpus("0\n"), 1);
        assert_eq!(count_cpus("0-2,5,8-9\n"), 6);
        assert_eq!(count_cpus("\n"), 0);
    }

    #[test]
    fn a_clock_is_stepped_when_it_is_off_by_more_than_the_tolerance() {
        let now = 1_800_000_000_000_000_000;
        assert_eq!(clock_offset(now + CLOCK_TOLERANCE_NS, now), (100_000_000, false));
        assert_eq!(clock_offset(now - 1 - CLOCK_TOLERANCE_NS, now), (-100_000_001, true));
        assert_eq!(clock_offset(u64::MAX, 0), (i64::MAX, true));
    }

    #[test]
    fn a_slot_that_was_never_declared_is_named() {
        assert!(matches!(bind_slot(4711), Err(Error::NoSlot(4711))));
        assert!(matches!(unbind_slot(4711), Err(Error::NoSlot(4711))));
    }
}
