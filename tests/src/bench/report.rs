//! What the benchmarks say: a table for people, JSON for programs.

use std::time::Duration;

use serde_json::{Value, json};

/// What a row's value should not exceed.
#[derive(Clone, Copy)]
pub(crate) enum Bar {
    /// A value in the row's unit.
    AtMost(f64),
    /// So many times the peer's value.
    TimesPeer(f64),
}

/// The same measured of something else, in the same run.
struct Peer {
    name: &'static str,
    samples: Vec<f64>,
}

/// One measured row. Its value is the median of its samples.
pub(crate) struct Row {
    name: String,
    unit: &'static str,
    samples: Vec<f64>,
    peer: Option<Peer>,
    bar: Option<Bar>,
}

impl Row {
    /// Times, in milliseconds. A name that begins with blanks is a part of the row above.
    pub(crate) fn ms(name: impl Into<String>, samples: &[Duration]) -> Self {
        Self::new(name, "ms", milliseconds(samples))
    }

    /// Sizes, in MiB.
    pub(crate) fn mib(name: impl Into<String>, bytes: &[u64]) -> Self {
        Self::new(name, "MiB", mib(bytes))
    }

    /// What should have been measured and could not be: its bar is missed.
    pub(crate) fn unmeasured(name: impl Into<String>) -> Self {
        Self::new(name, "", Vec::new()).bar(Bar::AtMost(0.0))
    }

    fn new(name: impl Into<String>, unit: &'static str, samples: Vec<f64>) -> Self {
        Self { name: name.into(), unit, samples, peer: None, bar: None }
    }

    /// The row with what a peer took.
    pub(crate) fn beside(self, name: &'static str, samples: &[Duration]) -> Self {
        Self { peer: Some(Peer { name, samples: milliseconds(samples) }), ..self }
    }

    /// The row with the size of a peer.
    pub(crate) fn beside_mib(self, name: &'static str, bytes: &[u64]) -> Self {
        Self { peer: Some(Peer { name, samples: mib(bytes) }), ..self }
    }

    /// The row with a bar.
    pub(crate) fn bar(self, bar: Bar) -> Self {
        Self { bar: Some(bar), ..self }
    }

    /// None when nothing was measured.
    fn value(&self) -> Option<f64> {
        median(&self.samples)
    }

    /// How many times the peer's value this row's is.
    fn factor(&self) -> Option<f64> {
        Some(self.value()? / median(&self.peer.as_ref()?.samples)?)
    }

    /// Whether the bar is met, if there is one. A bar that cannot be judged is missed.
    fn met(&self) -> Option<bool> {
        self.bar.map(|bar| match bar {
            Bar::AtMost(most) => self.value().is_some_and(|value| value <= most),
            Bar::TimesPeer(times) => self.factor().is_some_and(|factor| factor <= times),
        })
    }

    fn line(&self) -> String {
        let Some(value) = self.value() else {
            return format_line([&self.name, "not measured", "", "", "", "missed"]);
        };
        let value = format!("{value:.2} {}", self.unit);
        let peer = self.peer.as_ref().and_then(|peer| Some((peer.name, median(&peer.samples)?)));
        let peer = peer.map_or_else(String::new, |(name, value)| format!("{name} {value:.2}"));
        let factor = self.factor().map_or_else(String::new, |factor| format!("{factor:.2}x"));
        let bar = match self.bar {
            None => String::new(),
            Some(Bar::AtMost(most)) => format!("{most} {}", self.unit),
            Some(Bar::TimesPeer(times)) => format!("{times}x"),
        };
        let verdict = self.met().map_or("", |met| if met { "met" } else { "missed" });
        format_line([&self.name, &value, &peer, &factor, &bar, verdict])
    }

    fn json(&self) -> Value {
        let mut row = json!({
            "name": self.name.trim_start(),
            "part": self.name.starts_with(' '),
            "value": self.value(),
            "unit": self.unit,
            "samples": self.samples,
        });
        if let Some(peer) = &self.peer {
            row["peer"] =
                json!({ "name": peer.name, "value": median(&peer.samples), "samples": peer.samples });
        }
        if let Some(bar) = self.bar {
            row["bar"] = match bar {
                Bar::AtMost(most) => json!({ "value": most, "unit": self.unit }),
                Bar::TimesPeer(times) => json!({ "value": times, "unit": "times the peer" }),
            };
            row["met"] = json!(self.met());
        }
        row
    }
}

/// The head of the table.
pub(crate) fn head() -> String {
    format_line(["what", "value", "peer", "factor", "bar", ""])
}

/// Rows of the table.
pub(crate) fn lines(rows: &[Row]) -> String {
    rows.iter().map(Row::line).collect()
}

/// The end of the table: how many bars are met.
pub(crate) fn verdict(rows: &[Row]) -> String {
    let verdicts: Vec<bool> = rows.iter().filter_map(Row::met).collect();
    let met = verdicts.iter().filter(|met| **met).count();
    format!("{met} of {} bars met\n", verdicts.len())
}

/// All of it in one document.
pub(crate) fn document(environment: &Value, rows: &[Row]) -> Value {
    json!({ "environment": environment, "rows": rows.iter().map(Row::json).collect::<Vec<_>>() })
}

fn format_line([name, value, peer, factor, bar, verdict]: [&str; 6]) -> String {
    let line = format!("{name:<46}{value:>12}  {peer:<20}{factor:>8}{bar:>9}  {verdict}");
    format!("{}\n", line.trim_end())
}

fn milliseconds(samples: &[Duration]) -> Vec<f64> {
    samples.iter().map(|sample| sample.as_secs_f64() * 1e3).collect()
}

#[allow(clippy::cast_precision_loss, reason = "sizes are far below 2^52")]
fn mib(bytes: &[u64]) -> Vec<f64> {
    bytes.iter().map(|bytes| *bytes as f64 / f64::from(1 << 20)).collect()
}

fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(milliseconds: &[u64]) -> Vec<Duration> {
        milliseconds.iter().copied().map(Duration::from_millis).collect()
    }

    #[test]
    fn the_median_is_judged_by_the_bar() {
        let row = Row::ms("row", &times(&[90, 500, 100])).bar(Bar::AtMost(100.0));
        assert_eq!(row.met(), Some(true));
        let row = Row::ms("row", &times(&[101])).bar(Bar::AtMost(100.0));
        assert_eq!(row.met(), Some(false));
        assert_eq!(Row::ms("row", &times(&[1])).met(), None);
    }

    #[test]
    fn a_bar_in_times_the_peer_is_judged_by_the_peer() {
        let row = |own| Row::ms("row", &times(&[own])).beside("peer", &times(&[10])).bar(Bar::TimesPeer(2.0));
        assert_eq!((row(20).met(), row(21).met()), (Some(true), Some(false)));
        assert_eq!(Row::ms("row", &times(&[1])).bar(Bar::TimesPeer(2.0)).met(), Some(false));
        assert_eq!(Row::unmeasured("row").met(), Some(false));
    }

    #[test]
    fn the_table_ends_with_the_number_of_bars_that_are_met() {
        let rows = [
            Row::ms("time", &times(&[20])).beside("peer", &times(&[10])).bar(Bar::TimesPeer(1.5)),
            Row::ms("  part", &times(&[5])),
            Row::mib("size", &[1 << 20]).bar(Bar::AtMost(5.0)),
            Row::unmeasured("more"),
        ];
        let table = lines(&rows) + &verdict(&rows);
        let lines: Vec<String> =
            table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(lines[0], "time 20.00 ms peer 10.00 2.00x 1.5x missed");
        assert_eq!(
            lines[1..],
            ["part 5.00 ms", "size 1.00 MiB 5 MiB met", "more not measured missed", "1 of 3 bars met"]
        );
    }

    #[test]
    fn programs_get_samples_peer_and_verdict() {
        let row = Row::ms("  part", &times(&[20])).beside("peer", &times(&[10])).bar(Bar::TimesPeer(1.5));
        let expected = json!({
            "name": "part", "part": true, "value": 20.0, "unit": "ms", "samples": [20.0],
            "peer": { "name": "peer", "value": 10.0, "samples": [10.0] },
            "bar": { "value": 1.5, "unit": "times the peer" }, "met": false,
        });
        assert_eq!(document(&json!({}), &[row])["rows"][0], expected);
    }
}
