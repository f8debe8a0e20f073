//! Many containers, at once and one after the other.

use bulkhead_tests::bulkhead::{expect_code, stdout};
use bulkhead_tests::ctr::{
    Before, Container, ctr, daemon_pid, descriptors, in_background, run, run_command, tasks,
};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;

use crate::{soak, trial};

/// How many at once.
const TOGETHER: usize = 20;
/// How many one after the other.
const CYCLES: usize = 200;
/// How many more descriptors containerd may have after all of them: connections of its own that come and go.
const SLACK: usize = 4;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("many: twenty containers are created and deleted at once", together),
        trial("many: twenty containers live at once, and each answers for itself", alive_together),
        soak("many: after two hundred containers everything is as before", cycles),
    ]
}

fn together() -> Result {
    let threads: Vec<_> = (0..TOGETHER)
        .map(|number| {
            std::thread::spawn(move || -> std::result::Result<(), String> {
                let (id, said) = (format!("many-{number}"), format!("said {number}\n"));
                let options = ["--rm"];
                let output = run_command(&id, &options, &["echo", said.trim_end()])
                    .and_then(|mut command| Ok(command.output()?))
                    .map_err(|error| error.to_string())?;
                let right = output.status.success() && stdout(&output) == said;
                if right { Ok(()) } else { Err(format!("{id}: {output:?}")) }
            })
        })
        .collect();
    let failures: Vec<String> = threads
        .into_iter()
        .filter_map(|thread| thread.join().unwrap_or_else(|_| Err("a thread panicked".to_owned())).err())
        .collect();
    ensure(failures.is_empty(), || format!("{} of {TOGETHER} failed: {failures:?}", failures.len()))
}

fn alive_together() -> Result {
    let containers = (0..TOGETHER)
        .map(|number| {
            in_background(
                &format!("alive-{number}"),
                &["--env", &format!("NUMBER={number}")],
                &["sleep", "1000"],
            )
        })
        .collect::<Result<Vec<_>>>()?;
    let known = tasks()?;
    let running = known.values().filter(|(_, state)| state == "RUNNING").count();
    ensure(running == TOGETHER && known.len() == TOGETHER, || format!("{known:?}"))?;
    for (number, container) in containers.iter().enumerate() {
        let output = container.exec(&["sh", "-c", "echo $NUMBER; pidof sleep"])?;
        ensure(stdout(&output) == format!("{number}\n1\n"), || format!("{}: {output:?}", container.id()))?;
    }
    containers.iter().try_for_each(Container::end)
}

fn cycles() -> Result {
    // Whatever is made once is made.
    expect_code(&run(&[], &["true"])?, 0)?;
    let (before, open) = (Before::look()?, descriptors(daemon_pid()?)?);
    for number in 0..CYCLES {
        if number % 2 == 0 {
            expect_code(&run(&[], &["sh", "-c", "exit 7"])?, 7)?;
        } else {
            let container = in_background("cycle", &[], &["sleep", "1000"])?;
            expect_code(&container.exec(&["true"])?, 0)?;
            container.end()?;
        }
    }
    before.expect_nothing_more()?;
    let after = descriptors(daemon_pid()?)?;
    ensure(after <= open + SLACK, || format!("containerd had {open} descriptors and has {after}"))?;
    let left = stdout(&ctr(["snapshots", "list"]).output()?);
    ensure(left.lines().skip(1).all(|line| line.contains("Committed")), || left)
}
