//! `bulkhead exec` in a running container, beside `crun exec`.

use std::process::Stdio;

use bulkhead_tests::bulkhead::bulkhead;
use bulkhead_tests::vm::Result;

use crate::crun::{self, Bundle};
use crate::repeat::{attempt, repeat, timed};
use crate::report::Row;

const NAME: &str = "bench-exec";
const SLEEP: [&str; 2] = ["sleep", "1000000"];

pub(crate) fn measure(bundle: &Bundle) -> Result<Vec<Row>> {
    // The container keeps what it gets for standard output and error.
    timed(bundle.run(&["--detach"], &SLEEP)?.stdout(Stdio::null()).stderr(Stdio::null()))?;
    let crun = repeat(|| Ok(timed(&mut crun::exec(&["true"]))?.0));
    crun::delete()?;
    let run = [&["run", "--detach", "--name", NAME, "busybox:1", "--"], &SLEEP[..]].concat();
    attempt(|| timed(&mut bulkhead(&run)))?;
    let own = repeat(|| Ok(timed(&mut bulkhead(["exec", NAME, "true"]))?.0));
    timed(&mut bulkhead(["rm", "--force", NAME]))?;
    Ok(vec![Row::ms("bulkhead exec of true in a running container", &own?).beside("crun exec", &crun?)])
}
