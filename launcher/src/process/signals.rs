//! Signals that reach the launcher and are meant for the process in the container.

use std::io;
use std::task::Poll;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that users and service managers send. Everything else keeps its effect on the launcher.
const FORWARDED: [SignalKind; 6] = [
    SignalKind::hangup(),
    SignalKind::interrupt(),
    SignalKind::quit(),
    SignalKind::terminate(),
    SignalKind::user_defined1(),
    SignalKind::user_defined2(),
];

/// Catches signals from now on.
#[derive(Debug)]
pub(crate) struct Signals(Vec<(SignalKind, Signal)>);

impl Signals {
    /// Catches the signals that are forwarded.
    pub(crate) fn forwarded() -> io::Result<Self> {
        Self::of(&FORWARDED)
    }

    /// Catches the signal that tells of a terminal's new size.
    pub(crate) fn resize() -> io::Result<Self> {
        Self::of(&[SignalKind::window_change()])
    }

    fn of(kinds: &[SignalKind]) -> io::Result<Self> {
        let caught: io::Result<Vec<_>> = kinds.iter().map(|kind| Ok((*kind, signal(*kind)?))).collect();
        Ok(Self(caught?))
    }

    /// The next signal's number.
    pub(crate) async fn next(&mut self) -> u32 {
        std::future::poll_fn(|context| {
            for (kind, signal) in &mut self.0 {
                if signal.poll_recv(context).is_ready() {
                    return Poll::Ready(u32::try_from(kind.as_raw_value()).expect("signals are positive"));
                }
            }
            Poll::Pending
        })
        .await
    }
}
