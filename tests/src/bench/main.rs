//! The benchmarks: each row of the table that can be measured, with its peers in the same run. They mean something in the lab's
//! benchmark boot, where a nanosecond is an instruction; elsewhere they are noise. The table goes to standard error, the JSON to
//! standard output.

mod boot;
mod containerd;
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

use std::cell::OnceCell;
use std::path::Path;

use bulkhead_tests::bulkhead;
use bulkhead_tests::ctr;
use bulkhead_tests::vm::Result;

use crun::Bundle;
use report::Row;

fn main() -> Result {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [verb, path, rest @ ..] = arguments.as_slice()
        && verb == read::VERB
    {
        return read::read_twice(Path::new(path), rest);
    }
    if let [verb, path] = arguments.as_slice()
        && verb == containerd::FIND
    {
        return containerd::find_twice(Path::new(path));
    }
    let measured = measure(&arguments);
    bulkhead::clean_up();
    ctr::stop();
    measured
}

/// Measures what is named, or everything, and says the rows as they come.
fn measure(subjects: &[String]) -> Result {
    let mut rows = Vec::new();
    let directory = tempfile::tempdir()?;
    let bundle = OnceCell::new();
    let bundle = || -> Result<&Bundle> {
        if bundle.get().is_none() {
            bulkhead::image("busybox")?;
            let _ = bundle.set(Bundle::new(&image::make(directory.path())?)?);
        }
        Ok(bundle.get().expect("it was set"))
    };
    let mut say = |subject: &str, measure: &dyn Fn() -> Result<Vec<Row>>| -> Result {
        if subjects.is_empty() || subjects.iter().any(|named| named == subject) {
            let measured = measure()?;
            eprint!("{}", report::lines(&measured));
            rows.extend(measured);
        }
        Ok(())
    };
    eprint!("{}", report::head());
    say("size", &size::measure)?;
    say("boot", &boot::measure)?;
    say("density", &density::measure)?;
    say("run", &|| run::measure(bundle()?))?;
    say("exec", &|| exec::measure(bundle()?))?;
    say("read", &|| read::measure(bundle()?))?;
    say("containerd", &containerd::measure)?;
    // Not part of everything: it needs another containerd.
    if subjects.iter().any(|named| named == "erofs") {
        say("erofs", &containerd::erofs)?;
    }
    eprint!("{}", report::verdict(&rows));
    println!("{:#}", report::document(&environment::describe()?, &rows));
    Ok(())
}
