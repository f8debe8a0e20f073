//! The suite of the containerd runtime: `ctr` and the shim's own calls, against the runtime that `BULKHEAD_RUNTIME` names. It runs as
//! root where containerd and Bulkhead are installed. Every test holds for runc, too: clients must not tell the difference.

mod bootstrap;
mod erofs;
mod events;
mod faults;
mod full;
mod hangs;
mod many;
mod mounts;
mod options;
mod pods;
mod refused;
mod roots;
mod streams;
mod tasks;
mod update;

use bulkhead_tests::ctr::{self, Before};
use bulkhead_tests::retry;
use bulkhead_tests::vm::Result;
use libtest_mimic::{Arguments, Trial};

fn main() {
    let mut arguments = Arguments::from_args();
    // Each test looks for what it has left on the whole machine.
    arguments.test_threads = Some(1);
    let mut tests = tests().unwrap_or_else(|error| {
        ctr::stop();
        eprintln!("containerd: {error}");
        std::process::exit(101);
    });
    // Several parts of names, with | between them.
    if !arguments.exact
        && let Some(filter) = arguments.filter.take()
    {
        tests.retain(|test| filter.split('|').any(|part| test.name().contains(part)));
    }
    let conclusion = libtest_mimic::run(&arguments, tests);
    ctr::stop();
    conclusion.exit();
}

/// The simple ones first. Which there are depends on the snapshotters of this containerd.
fn tests() -> Result<Vec<Trial>> {
    ctr::start()?;
    let snapshotters = ctr::snapshotters()?;
    let mut tests = roots::tests(&snapshotters);
    for more in [
        erofs::tests(&snapshotters),
        bootstrap::tests()?,
        options::tests(),
        mounts::tests(),
        tasks::tests(),
        update::tests(),
        events::tests(),
        streams::tests(),
        refused::tests(),
        pods::tests(),
        faults::tests(),
        hangs::tests(),
        full::tests(),
        many::tests(),
    ] {
        tests.extend(more);
    }
    Ok(tests)
}

/// A test under the name of the behaviour that it checks. It fails, too, when it leaves something behind.
fn trial(name: impl Into<String>, test: impl Fn() -> Result + Send + 'static) -> Trial {
    let name = name.into();
    let again = name.clone();
    Trial::test(name, move || retry::unless_lost(&again, || checked(&test)).map_err(Into::into))
}

/// The same for a test that takes minutes: `make soak` runs it.
fn soak(name: &str, test: impl Fn() -> Result + Send + 'static) -> Trial {
    trial(name, test).with_ignored_flag(true)
}

fn checked(test: &dyn Fn() -> Result) -> Result {
    ctr::image()?;
    let before = Before::look()?;
    let (_, logged) = ctr::log_since(0);
    let result = test().and_then(|()| before.expect_nothing_more());
    result.map_err(|error| {
        // It may be the daemon that is gone.
        let cleaned = ctr::start().and_then(|()| ctr::remove_everything());
        let cleaned = cleaned.err().map_or_else(String::new, |error| format!("\nwhile cleaning up: {error}"));
        format!("{error}{cleaned}\ncontainerd's log:\n{}", ctr::log_since(logged).0).into()
    })
}
