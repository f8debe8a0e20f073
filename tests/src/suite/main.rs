//! The suite that needs real KVM. It runs as root where Bulkhead is installed: in the lab, or on a machine with KVM.

mod boot;
mod faults;
mod jail;
mod plug;
mod run;
mod snapshot;

use bulkhead_tests::vm;
use libtest_mimic::{Arguments, Trial};

fn main() {
    let arguments = Arguments::from_args();
    let tests =
        [boot::tests(), jail::tests(), plug::tests(), snapshot::tests(), run::tests(), faults::tests()]
            .into_iter()
            .flatten()
            .collect();
    let conclusion = libtest_mimic::run(&arguments, tests);
    bulkhead_tests::bulkhead::clean_up();
    conclusion.exit();
}

/// A test under the name of the behaviour that it checks.
fn trial(name: &str, test: fn() -> vm::Result) -> Trial {
    Trial::test(name, move || test().map_err(|error| error.to_string().into()))
}
