//! The benchmarks: each row of the table that can be measured, with its peers in the same run. They mean something in the lab's
//! benchmark boot, where a nanosecond is an instruction; elsewhere they are noise.

mod boot;

use std::time::Duration;

use bulkhead_tests::vm::Result;

/// One measured row.
pub(crate) struct Row {
    what: String,
    value: f64,
    unit: &'static str,
}

impl Row {
    pub(crate) fn ms(what: &str, mut samples: Vec<Duration>) -> Self {
        samples.sort_unstable();
        let median = samples[samples.len() / 2];
        Self { what: what.to_owned(), value: median.as_secs_f64() * 1e3, unit: "ms" }
    }

    pub(crate) fn new(what: &str, value: f64, unit: &'static str) -> Self {
        Self { what: what.to_owned(), value, unit }
    }
}

fn main() -> Result {
    let mut rows = boot::measure()?;
    for Row { what, value, unit } in &mut rows {
        println!("{what:<70} {value:>10.3} {unit}");
    }
    Ok(())
}
