//! What containerd tells everybody of a task, and in which order.

use bulkhead_tests::bulkhead::expect_code;
use bulkhead_tests::ctr::{Events, in_background, run};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial(
            "events: a task that ends at once is created, started, ended and deleted, in this order",
            short,
        ),
        trial("events: a process in a container is added and started, and ends before the container", exec),
        trial("events: a process that still runs ends before the container that is killed", last_exit),
        trial("events: pausing and resuming are told", paused),
    ]
}

/// The codes and names of the processes that have ended.
fn exits(events: &[(String, Value)]) -> Vec<(String, u64)> {
    let exits = events.iter().filter(|(topic, _)| topic == "/tasks/exit");
    exits
        .map(|(_, event)| {
            let name = event["id"].as_str().unwrap_or_default().to_owned();
            (name, event["exit_status"].as_u64().unwrap_or(0))
        })
        .collect()
}

fn expect_exits(events: &[(String, Value)], expected: &[(&str, u64)]) -> Result {
    let exits = exits(events);
    let same = exits.iter().map(|(name, code)| (name.as_str(), *code)).eq(expected.iter().copied());
    ensure(same, || format!("{exits:?}, not {expected:?}"))?;
    // Kubernetes takes a time of zero for one that is not known.
    let timed = events.iter().filter(|(topic, _)| topic == "/tasks/exit");
    let untimed = timed.filter(|(_, event)| event["exited_at"]["seconds"].as_u64().unwrap_or(0) == 0).count();
    ensure(untimed == 0, || format!("{untimed} exits without a time: {events:?}"))
}

fn short() -> Result {
    let events = Events::listen()?;
    expect_code(&run(&[], &["sh", "-c", "exit 7"])?, 7)?;
    let seen = events.until("/tasks/delete")?;
    Events::expect_topics(&seen, &["create", "start", "exit", "delete"])?;
    expect_exits(&seen, &[("once", 7)])?;
    let pids: Vec<_> = seen.iter().map(|(_, event)| event["pid"].as_u64().unwrap_or(0)).collect();
    ensure(pids[0] != 0 && pids.iter().all(|pid| *pid == pids[0]), || format!("processes {pids:?}"))?;
    let code = &seen[3].1["exit_status"];
    ensure(*code == 7, || format!("deleted with {code}"))
}

fn exec() -> Result {
    let events = Events::listen()?;
    let container = in_background("host", &[], &["sleep", "1000"])?;
    expect_code(&container.exec(&["sh", "-c", "exit 3"])?, 3)?;
    container.end()?;
    let seen = events.until("/tasks/delete")?;
    Events::expect_topics(
        &seen,
        &["create", "start", "exec-added", "exec-started", "exit", "exit", "delete"],
    )?;
    expect_exits(&seen, &[("extra", 3), ("host", 137)])
}

fn last_exit() -> Result {
    let events = Events::listen()?;
    let container = in_background("host", &[], &["sleep", "1000"])?;
    container.exec_in_background("extra", &["sleep", "2000"])?;
    container.kill("KILL")?;
    container.wait()?;
    container.delete()?;
    let seen = events.until("/tasks/delete")?;
    expect_exits(&seen, &[("extra", 137), ("host", 137)])
}

fn paused() -> Result {
    let events = Events::listen()?;
    let container = in_background("host", &[], &["sleep", "1000"])?;
    expect_code(&container.task("pause", &[]).output()?, 0)?;
    expect_code(&container.task("resume", &[]).output()?, 0)?;
    container.end()?;
    let seen = events.until("/tasks/delete")?;
    Events::expect_topics(&seen, &["create", "start", "paused", "resumed", "exit", "delete"])
}
