//! RCU grace periods: some changes to the kernel wait for one, which takes up to ten milliseconds.

use std::{fs, io};

/// Has the kernel hurry with the grace periods that `work` waits for. That disturbs the other processors, so it is for what happens
/// once in a guest's life.
///
/// # Errors
/// When the kernel does not take the setting.
pub(crate) fn expedited<T>(work: impl FnOnce() -> T) -> io::Result<T> {
    set("1")?;
    let result = work();
    set("0")?;
    Ok(result)
}

fn set(on: &str) -> io::Result<()> {
    match fs::write("/sys/kernel/rcu_expedited", on) {
        // A kernel for one processor has nothing to wait for.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
