//! The benchmarks: each row of the table that can be measured, with its peers in the same run. They mean something in the lab's
//! benchmark boot, where a nanosecond is an instruction; elsewhere they are noise. The table goes to standard error, the JSON to
//! standard output.

mod boot;
mod crun;
mod density;
mod environment;
mod exec;
mod image;
mod memory;
mod microvm;
mod read;
mod repeat;
mod report;
mod run;
mod size;
mod watchdog;

use std::path::Path;

use bulkhead_tests::bulkhead;
use bulkhead_tests::vm::Result;

use crun::Bundle;
use report::Row;

fn main() -> Result {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [verb, path] = arguments.as_slice()
        && verb == read::VERB
    {
        return read::read_twice(Path::new(path));
    }
    let measured = measure();
    bulkhead::clean_up();
    measured
}

/// Measures everything and says it, the rows as they come.
fn measure() -> Result {
    let mut rows = Vec::new();
    let mut say = |measured: Vec<Row>| {
        eprint!("{}", report::lines(&measured));
        rows.extend(measured);
    };
    eprint!("{}", report::head());
    say(size::measure()?);
    say(boot::measure()?);
    bulkhead::image("busybox")?;
    say(density::measure()?);
    let directory = tempfile::tempdir()?;
    let bundle = Bundle::new(&image::make(directory.path())?)?;
    say(run::measure(&bundle)?);
    say(exec::measure(&bundle)?);
    say(read::measure(&bundle)?);
    eprint!("{}", report::verdict(&rows));
    println!("{:#}", report::document(&environment::describe()?, &rows));
    Ok(())
}
