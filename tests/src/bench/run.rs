//! `bulkhead run` of a program that does nothing, beside `crun run` of it.

use std::time::Duration;

use bulkhead_tests::bulkhead::bulkhead;
use bulkhead_tests::vm::Result;
use serde::Deserialize;

use crate::crun::Bundle;
use crate::repeat::{repeat, timed};
use crate::report::{Bar, Row};

/// A run and the stations that the launcher told of it, each with its time since the launcher's start.
struct Run {
    total: Duration,
    stations: Vec<(String, Duration)>,
}

pub(crate) fn measure(bundle: &Bundle) -> Result<Vec<Row>> {
    let crun = repeat(|| Ok(timed(&mut bundle.run(&[], &["true"])?)?.0))?;
    let default = repeat(|| run(&[]))?;
    let small = repeat(|| run(&["--cpus", "1", "--memory", "256M"]))?;
    let mut rows = vec![
        Row::ms("bulkhead run --rm busybox true", &totals(&default))
            .beside("crun run", &crun)
            .bar(Bar::TimesPeer(10.0)),
    ];
    rows.extend(waterfall(&default));
    rows.push(Row::ms("the same with --cpus 1 --memory 256M", &totals(&small)).beside("crun run", &crun));
    rows.extend(waterfall(&small));
    Ok(rows)
}

fn totals(runs: &[Run]) -> Vec<Duration> {
    runs.iter().map(|run| run.total).collect()
}

fn run(options: &[&str]) -> Result<Run> {
    #[derive(Deserialize)]
    struct Station {
        name: String,
        at_ns: u64,
    }
    let words = [&["run", "--rm", "--timings=json"], options, &["busybox:1", "--", "true"]].concat();
    let (total, output) = timed(&mut bulkhead(words))?;
    // The last line: a lab with one CPU is warned of the second one.
    let stderr = String::from_utf8(output.stderr)?;
    let stations: Vec<Station> = serde_json::from_str(stderr.lines().last().unwrap_or_default())?;
    let stations =
        stations.into_iter().map(|station| (station.name, Duration::from_nanos(station.at_ns))).collect();
    Ok(Run { total, stations })
}

/// One row for each stretch that ends at a station, and one for what lies outside of the launcher's `main`.
fn waterfall(runs: &[Run]) -> Vec<Row> {
    let names = runs[0].stations.iter().map(|(name, _)| name.as_str());
    let mut rows: Vec<Row> = names
        .enumerate()
        .map(|(i, name)| {
            let took = |run: &Run| {
                let before = i.checked_sub(1).map_or(Duration::ZERO, |i| run.stations[i].1);
                run.stations[i].1.saturating_sub(before)
            };
            Row::ms(format!("  until {name}"), &runs.iter().map(took).collect::<Vec<_>>())
        })
        .collect();
    let outside =
        |run: &Run| run.total.saturating_sub(run.stations.last().map_or(Duration::ZERO, |(_, at)| *at));
    rows.push(Row::ms("  the launcher's own start and end", &runs.iter().map(outside).collect::<Vec<_>>()));
    rows
}
