//! What a VMM's process weighs.

use bulkhead_tests::vm::{Result, ensure, proc_file};

/// Resident memory of a VMM, in bytes, but for that of its guest, which is the mapping of just that size.
pub(crate) fn beyond_guest(pid: u32, guest_mib: u32) -> Result<u64> {
    let guest_kib = u64::from(guest_mib) * 1024;
    let (mut sum_kib, mut in_guest, mut guests) = (0, false, 0);
    for line in proc_file(pid, "smaps")?.lines() {
        match line.split_whitespace().collect::<Vec<_>>().as_slice() {
            ["Size:", size, _] => {
                in_guest = size.parse::<u64>()? == guest_kib;
                guests += usize::from(in_guest);
            }
            ["Rss:", size, _] if !in_guest => sum_kib += size.parse::<u64>()?,
            _ => {}
        }
    }
    ensure(guests == 1, || format!("process {pid} has {guests} mappings of {guest_mib} MiB instead of one"))?;
    Ok(sum_kib * 1024)
}
