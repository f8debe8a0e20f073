//! Containers in the background: listed, joined, told, followed, ended, removed.

use std::process::Stdio;

use bulkhead_tests::bulkhead::{
    bulkhead, detach, eventually, expect_code, expect_refusal, logs, stderr, stdout,
};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("background: run, ps, exec, logs, stop and rm", life),
        trial("background: logs are followed to the container's end, signals arrive", followed),
        trial("exec: what cannot be executed is refused, and the container goes on", refused),
        trial("exec: a memory hog is killed, and the container goes on", memory_hog),
        trial("limits: a fork bomb meets the pids limit, and the container can be ended", fork_bomb),
    ]
}

fn life() -> Result {
    let script = "trap 'echo bye; exit 3' TERM; echo started; while :; do sleep 0.1; done";
    detach("bg", &[], &["sh", "-c", script])?;
    let listed = stdout(&bulkhead(["ps"]).output()?);
    ensure(listed.contains("bg"), || listed)?;
    let inside = bulkhead(["exec", "bg", "sh", "-c", "echo inside; exit 5"]).output()?;
    expect_code(&inside, 5)?;
    ensure(stdout(&inside) == "inside\n", || stdout(&inside))?;
    expect_refusal(&bulkhead(["rm", "bg"]).output()?, 1, &["is running", "stop it first"])?;
    expect_code(&bulkhead(["stop", "bg"]).output()?, 0)?;
    let said = logs("bg")?;
    ensure(said == "started\nbye\n", || format!("logs: {said:?}"))?;
    let ended = stdout(&bulkhead(["ps", "-a"]).output()?);
    ensure(ended.contains("bg") && ended.contains("exited (3)"), || ended)?;
    expect_code(&bulkhead(["rm", "bg"]).output()?, 0)?;
    let gone = stdout(&bulkhead(["ps", "-a"]).output()?);
    ensure(!gone.contains("bg"), || gone)
}

fn followed() -> Result {
    let script =
        "trap 'echo usr1' USR1; trap 'echo term; exit 0' TERM; echo started; while :; do sleep 0.1; done";
    detach("told", &[], &["sh", "-c", script])?;
    eventually("it has started", || Ok(logs("told")? == "started\n"))?;
    let follower = bulkhead(["logs", "-f", "told"]).stdout(Stdio::piped()).spawn()?;
    for (signal, answer) in [("USR1", "usr1\n"), ("SIGTERM", "term\n")] {
        expect_code(&bulkhead(["kill", "-s", signal, "told"]).output()?, 0)?;
        eventually(signal, || Ok(logs("told")?.ends_with(answer)))?;
    }
    let followed = follower.wait_with_output()?;
    expect_code(&followed, 0)?;
    ensure(stdout(&followed) == "started\nusr1\nterm\n", || stdout(&followed))?;
    eventually("it has ended", || Ok(bulkhead(["rm", "told"]).output()?.status.success()))
}

fn refused() -> Result {
    detach("joined", &["--rm"], &["sleep", "1000"])?;
    for (options, command, code, words) in [
        (&[][..], "no-such-program", 127, &["no-such-program", "not found"][..]),
        (&[], "/etc", 126, &["/etc"]),
        (&["-u", "nobody-like-it"], "true", 125, &["nobody-like-it", "passwd"]),
        (&["-w", "/nowhere"], "true", 125, &["/nowhere", "does not exist"]),
        (&["-w", "here"], "true", 125, &["\"here\"", "not absolute"]),
    ] {
        let output = bulkhead(["exec"]).args(options).args(["joined", command]).output()?;
        expect_refusal(&output, code, words)?;
    }
    let alive = bulkhead(["exec", "joined", "echo", "alive"]).output()?;
    ensure(stdout(&alive) == "alive\n", || stderr(&alive))?;
    expect_code(&bulkhead(["rm", "-f", "joined"]).output()?, 0)
}

fn memory_hog() -> Result {
    detach("fed", &["--rm", "--memory", "128M"], &["sleep", "1000"])?;
    let hog = bulkhead(["exec", "fed", "tail", "/dev/zero"]).output()?;
    expect_code(&hog, 137)?;
    ensure(stderr(&hog).contains("out of memory"), || stderr(&hog))?;
    let alive = bulkhead(["exec", "fed", "echo", "alive"]).output()?;
    ensure(stdout(&alive) == "alive\n", || stderr(&alive))?;
    expect_code(&bulkhead(["rm", "-f", "fed"]).output()?, 0)
}

fn fork_bomb() -> Result {
    // Each of them forks two of its kind until the limit is met; then the shells tell of that.
    let bomb = "b() { b | b & }; b; exec sleep 1000";
    detach("bomb", &["--pids-limit", "64"], &["sh", "-c", bomb])?;
    eventually("it meets the limit", || {
        let said = bulkhead(["logs", "bomb"]).output()?;
        Ok(stderr(&said).contains("fork"))
    })?;
    expect_code(&bulkhead(["kill", "bomb"]).output()?, 0)?;
    // The agent ended it, not the end of the whole machine, which would have left an error.
    let listed = stdout(&bulkhead(["ps", "-a", "--json"]).output()?);
    ensure(listed.contains("\"exit_code\": 137") && listed.contains("\"error\": null"), || listed)?;
    expect_code(&bulkhead(["rm", "bomb"]).output()?, 0)
}
