//! What a sandbox that does nothing costs its host, everything counted: what is not available any more.

use std::ops::Range;
use std::thread::sleep;
use std::time::Duration;

use bulkhead_tests::bulkhead::{bulkhead, image};
use bulkhead_tests::vm::Result;

use crate::repeat::{attempt, timed};
use crate::report::{Bar, Row};

/// The first ones pay for what all share.
const FIRST: Range<u64> = 0..10;
const FURTHER: Range<u64> = 10..20;
/// How long the last one may take to come to rest, its free pages reported. An idle lab's clock jumps: nobody waits for it.
pub(crate) const SETTLE: Duration = Duration::from_secs(10);

pub(crate) fn measure() -> Result<Vec<Row>> {
    image("busybox")?;
    start(FIRST)?;
    let before = available()?;
    start(FURTHER)?;
    let after = available()?;
    let each = before.saturating_sub(after) / (FURTHER.end - FURTHER.start);
    let names: Vec<String> = (FIRST.start..FURTHER.end).map(name).collect();
    timed(bulkhead(["rm", "--force"]).args(names))?;
    Ok(vec![Row::mib("host memory of an idle sandbox, 11th to 20th", &[each]).bar(Bar::AtMost(45.0))])
}

fn start(numbers: Range<u64>) -> Result {
    for number in numbers {
        let name = name(number);
        let words = ["run", "--detach", "--name", &name, "busybox:1", "--", "sleep", "1000000"];
        attempt(|| timed(&mut bulkhead(words)))?;
    }
    sleep(SETTLE);
    Ok(())
}

fn name(number: u64) -> String {
    format!("bench-idle-{number}")
}

/// `MemAvailable` of the host, in bytes.
pub(crate) fn available() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).ok_or("no MemAvailable")?;
    Ok(kib.parse::<u64>()? * 1024)
}
