//! Where the time of a start went: points on `CLOCK_MONOTONIC`, which host processes share.

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stamp(pub u64);

impl Stamp {
    /// This moment.
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
        Self(seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default())
    }

    /// Nanoseconds from `earlier` to this.
    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// When a machine passed the stations of its boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootTimes {
    /// The owner began to start the VMM.
    pub spawn: Stamp,
    /// The VMM's `main` began.
    pub vmm_started: Stamp,
    /// The VMM had read what it should boot.
    pub configured: Stamp,
    /// The first vCPU was about to enter the guest.
    pub entered: Stamp,
    /// The agent's ready arrived at the owner.
    pub ready: Stamp,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_does_not_run_backwards() {
        let first = Stamp::now();
        let second = Stamp::now();
        assert!(second >= first);
        assert_eq!(first.since(Stamp(first.0 + 5)), 0);
        assert_eq!(Stamp(first.0 + 5).since(first), 5);
    }
}
