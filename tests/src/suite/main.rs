//! The suite that needs real KVM. It runs as root where Bulkhead is installed: in the lab, or on a machine with KVM.

mod background;
mod boot;
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

use bulkhead_tests::residue::{self, Before};
use bulkhead_tests::vm;
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
        run::tests(),
        streams::tests(),
        terminal::tests(),
        background::tests(),
        faults::tests(),
    ];
    let conclusion = libtest_mimic::run(&arguments, tests.into_iter().flatten().collect());
    bulkhead_tests::bulkhead::clean_up();
    conclusion.exit();
}

/// What the lab's QEMU does to a guest now and then, which is no fault of the guest's (docs/lab.md), in the words of those who notice.
const LOST_IN_THE_LAB: [&str; 4] = ["triple fault", "TripleFault", "does not answer within", vm::SILENT];

/// A test under the name of the behaviour that it checks. It fails, too, when it leaves something behind.
fn trial(name: &str, test: fn() -> vm::Result) -> Trial {
    let again = format!("once more, because the lab lost the guest: {name}");
    Trial::test(name, move || match checked(test).map_err(|error| error.to_string()) {
        Err(error) if in_lab() && LOST_IN_THE_LAB.iter().any(|lost| error.contains(lost)) => {
            eprintln!("\n{again}: {error}");
            checked(test).map_err(|error| error.to_string().into())
        }
        result => result.map_err(Into::into),
    })
}

/// True in the lab, whose kernel is told so. On any other machine a test has one try.
fn in_lab() -> bool {
    std::fs::read_to_string("/proc/cmdline").is_ok_and(|cmdline| cmdline.contains("lab.boot="))
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
