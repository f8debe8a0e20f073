//! Tells a user at a terminal what takes longer than a second.

use std::future::Future;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use tokio::time::{MissedTickBehavior, interval};

/// What takes less is not worth a word.
const PATIENCE: Duration = Duration::from_secs(1);
/// Time between two changes.
const PERIOD: Duration = Duration::from_millis(250);

/// One line on standard error, which disappears in the end.
#[derive(Debug)]
pub(crate) struct Progress {
    started: Instant,
    last: Option<Instant>,
    terminal: bool,
}

impl Progress {
    /// Begins now.
    pub(crate) fn start() -> Self {
        Self { started: Instant::now(), last: None, terminal: io::stderr().is_terminal() }
    }

    /// Shows what is going on, if it is time to.
    pub(crate) fn show(&mut self, what: impl FnOnce() -> String) {
        let now = Instant::now();
        let due = match self.last {
            Some(last) => now.duration_since(last) >= PERIOD,
            None => now.duration_since(self.started) >= PATIENCE,
        };
        if self.terminal && due {
            self.last = Some(now);
            let _ =
                write!(io::stderr(), "\r\x1b[K{} ({} s)", what(), now.duration_since(self.started).as_secs());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.last.is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

/// Waits for something and shows for how long already.
pub(crate) async fn during<T>(what: &str, work: impl Future<Output = T>) -> T {
    let mut progress = Progress::start();
    if !progress.terminal {
        return work.await;
    }
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tokio::pin!(work);
    loop {
        tokio::select! {
            biased;
            done = &mut work => return done,
            _ = ticks.tick() => progress.show(|| what.to_owned()),
        }
    }
}
