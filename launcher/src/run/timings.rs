//! Where the time of a run went, as a waterfall.

use std::fmt::Write;

use bulkhead_sandbox::agent::messages::GuestDetails;
use bulkhead_sandbox::timing::{BootTimes, Stamp};

use crate::cli::TimingsFormat;

/// Columns of the waterfall.
const WIDTH: u64 = 48;

/// The station at which the guest's kernel and its agent have started.
const GUEST_READY: &str = "guest ready";

/// The stations of a run, each the end of a stretch of time.
#[derive(Debug)]
pub(crate) struct Timings {
    start: Stamp,
    stations: Vec<(&'static str, Stamp)>,
    guest: Option<Guest>,
}

/// What the guest says of its own start.
#[derive(Debug)]
struct Guest {
    kernel_release: String,
    /// Its own clock when its agent was ready: without the way to the guest and back, with what its kernel did before.
    ready_after_boot_ns: u64,
}

impl Timings {
    /// A run that began at `start`.
    pub(crate) fn new(start: Stamp) -> Self {
        Self { start, stations: Vec::new(), guest: None }
    }

    /// A station that is reached now.
    pub(crate) fn mark(&mut self, name: &'static str) {
        self.stations.push((name, Stamp::now()));
    }

    /// The stations of the machine.
    pub(crate) fn booted(&mut self, times: BootTimes) {
        self.stations.extend([
            ("prepared", times.spawn),
            ("VMM process", times.vmm_started),
            ("VMM configured", times.configured),
            ("KVM set up", times.entered),
            (GUEST_READY, times.ready),
        ]);
    }

    /// The agent has answered.
    pub(crate) fn connected(&mut self, at: Stamp, details: &GuestDetails) {
        self.stations.push(("agent connected", at));
        self.guest = Some(Guest {
            kernel_release: bulkhead_sandbox::console::escape(details.kernel_release.as_bytes()),
            ready_after_boot_ns: details.ready_after_boot_ns,
        });
    }

    /// When the first output came, if there was any.
    pub(crate) fn first_output(&mut self, stamp: Option<Stamp>) {
        self.stations.extend(stamp.map(|stamp| ("first output", stamp)));
    }

    /// All of it.
    pub(crate) fn show(&self, format: TimingsFormat) -> String {
        let mut stations = self.stations.clone();
        stations.sort_by_key(|(_, stamp)| *stamp);
        match format {
            TimingsFormat::Text => self.text(&stations),
            TimingsFormat::Json => {
                let rows = stations.iter().map(|(name, stamp)| self.row(name, *stamp));
                format!("{}\n", rows.collect::<serde_json::Value>())
            }
        }
    }

    fn row(&self, name: &str, stamp: Stamp) -> serde_json::Value {
        let mut row = serde_json::json!({ "name": name, "at_ns": stamp.since(self.start) });
        if let (GUEST_READY, Some(guest)) = (name, &self.guest) {
            row["kernel_release"] = guest.kernel_release.as_str().into();
            row["ready_after_boot_ns"] = guest.ready_after_boot_ns.into();
        }
        row
    }

    fn text(&self, stations: &[(&'static str, Stamp)]) -> String {
        let total = stations.last().map_or(0, |(_, stamp)| stamp.since(self.start)).max(1);
        let column =
            |stamp: Stamp| usize::try_from(stamp.since(self.start) * WIDTH / total).unwrap_or_default();
        let mut text = format!("{:<20}{:>10}{:>10}\n", "until", "took ms", "at ms");
        let mut before = self.start;
        for (name, stamp) in stations {
            let (from, to) = (column(before), column(*stamp));
            let bar = format!("{}{}", " ".repeat(from), "█".repeat((to - from).max(1)));
            let took = thousandths(stamp.since(before));
            let at = thousandths(stamp.since(self.start));
            // Writing to a string does not fail.
            let _ = writeln!(text, "{name:<20}{took:>10}{at:>10}  {bar}");
            before = *stamp;
        }
        if let Some(Guest { kernel_release, ready_after_boot_ns }) = &self.guest {
            let milliseconds = ready_after_boot_ns / 1_000_000;
            let _ =
                writeln!(text, "guest kernel {kernel_release}: ready {milliseconds} ms after its own start");
        }
        text
    }
}

/// Nanoseconds as milliseconds with two decimals.
fn thousandths(nanoseconds: u64) -> String {
    format!("{}.{:02}", nanoseconds / 1_000_000, nanoseconds / 10_000 % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timings() -> Timings {
        let mut timings = Timings::new(Stamp(1_000_000));
        timings.stations = vec![("exit", Stamp(11_000_000)), ("prepared", Stamp(3_500_000))];
        timings
    }

    #[test]
    fn stations_appear_in_the_order_of_time_with_their_durations() {
        let text = timings().show(TimingsFormat::Text);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].starts_with("prepared") && lines[1].contains("2.50      2.50"), "{text}");
        assert!(lines[2].starts_with("exit") && lines[2].contains("7.50     10.00"), "{text}");
        assert_eq!(lines[2].matches('█').count(), 36);
    }

    #[test]
    fn programs_get_one_line_of_json() {
        let json: serde_json::Value = serde_json::from_str(&timings().show(TimingsFormat::Json)).unwrap();
        assert_eq!(json[0], serde_json::json!({ "name": "prepared", "at_ns": 2_500_000 }));
    }

    #[test]
    fn what_the_guests_clock_said_goes_with_its_station() {
        let mut timings = timings();
        timings.stations.push((GUEST_READY, Stamp(5_000_000)));
        let details = GuestDetails {
            kernel_release: "6.12".into(),
            ready_after_boot_ns: 7_000_000,
            ..GuestDetails::default()
        };
        timings.connected(Stamp(6_000_000), &details);
        let json: serde_json::Value = serde_json::from_str(&timings.show(TimingsFormat::Json)).unwrap();
        assert_eq!(
            json[1],
            serde_json::json!({
                "name": GUEST_READY,
                "at_ns": 4_000_000,
                "kernel_release": "6.12",
                "ready_after_boot_ns": 7_000_000,
            })
        );
        assert!(
            timings
                .show(TimingsFormat::Text)
                .ends_with("guest kernel 6.12: ready 7 ms after its own start\n")
        );
    }
}
