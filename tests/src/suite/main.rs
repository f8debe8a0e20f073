//! The suite that needs real KVM. It runs as root where Bulkhead is installed: in the lab, or on a machine with KVM.

mod background;
mod boot;
mod cgroups;
mod faults;
mod images;
mod jail;
mod plug;
mod refused;
mod roots;
mod run;
mod snapshot;
mod streams;
mod terminal;
mod volumes;

use bulkhead_tests::residue::{self, Before};
use bulkhead_tests::{retry, vm};
use libtest_mimic::{Arguments, Trial};

fn main() {
    let mut arguments = Arguments::from_args();
    // Each test looks for what it has left on the whole machine.
    arguments.test_threads = Some(1);
    let tests = [
        boot::tests(),
        jail::tests(),
        plug::tests(),
        snapshot::tests(),
        refused::tests(),
        images::tests(),
        roots::tests(),
        volumes::tests(),
        run::tests(),
        cgroups::tests(),
        streams::tests(),
        terminal::tests(),
        background::tests(),
        faults::tests(),
    ];
    let conclusion = libtest_mimic::run(&arguments, tests.into_iter().flatten().collect());
    bulkhead_tests::bulkhead::clean_up();
    conclusion.exit();
}

/// A test under the name of the behaviour that it checks. It fails, too, when it leaves something behind.
fn trial(name: &str, test: fn() -> vm::Result) -> Trial {
    let again = name.to_owned();
    Trial::test(name, move || retry::unless_lost(&again, || checked(test)).map_err(Into::into))
}

/// The same for a test that takes minutes: `make soak` runs it.
fn soak(name: &str, test: fn() -> vm::Result) -> Trial {
    trial(name, test).with_ignored_flag(true)
}

fn checked(test: fn() -> vm::Result) -> vm::Result {
    let before = Before::look()?;
    let result = test().and_then(|()| before.expect_nothing_more());
    if result.is_err() {
        residue::remove_containers()?;
    }
    result
}
