//! Containers in the background and the commands that deal with them.

#![allow(clippy::unwrap_used)]

mod support;

use std::process::Stdio;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use support::{Host, code, stderr, stdout, until, wait};

fn row(host: &Host, id: &str) -> serde_json::Value {
    let rows: serde_json::Value = serde_json::from_str(&host.output(&["ps", "-a", "--json"])).unwrap();
    let mut rows = rows.as_array().unwrap().iter();
    rows.find(|row| row["id"] == id).cloned().unwrap_or_default()
}

#[test]
fn a_detached_container_is_listed_and_its_log_is_replayed() {
    let host = Host::new();
    let script = "echo one; echo two >&2; printf three; exit 3";
    let id = host.detached(&["--name", "web"], &["/bin/sh", "-c", script]);
    until("it has ended", || row(&host, &id)["status"] == "exited");
    assert_eq!(row(&host, &id)["outcome"]["exit_code"], 3);
    let logs = host.bulkhead(&["logs", "web"]).output().unwrap();
    assert_eq!((stdout(&logs).as_str(), stderr(&logs).as_str()), ("one\nthree", "two\n"));
    assert!(!host.output(&["ps"]).contains("web"));
    assert_eq!(host.output(&["rm", &id[..4]]), id[..4]);
    assert!(host.residue().is_empty(), "{:?}", host.residue());
}

#[test]
fn logs_follow_until_the_container_ends() {
    let host = Host::new();
    let gate = host.path("gate");
    let script = format!("echo first; while [ ! -e {} ]; do sleep 0.05; done; echo last", gate.display());
    let id = host.detached(&[], &["/bin/sh", "-c", &script]);
    let child = host.bulkhead(&["logs", "-f", &id]).stdout(Stdio::piped()).spawn().unwrap();
    std::fs::write(&gate, "").unwrap();
    let output = wait(child);
    assert_eq!((code(&output), stdout(&output).as_str()), (0, "first\nlast\n"));
}

#[test]
fn an_error_in_the_background_is_told_in_the_foreground() {
    let host = Host::new();
    let output = host.run(&["-d"], &["/nonexistent"]).output().unwrap();
    assert_eq!((code(&output), stdout(&output).as_str()), (127, ""));
    assert!(stderr(&output).contains("not found"), "{}", stderr(&output));
    assert!(host.residue().is_empty());
}

#[test]
fn exec_runs_beside_the_container_and_returns_its_own_code() {
    let host = Host::new();
    let id = host.detached(&["-e", "A=container"], &["/bin/sleep", "60"]);
    let output =
        host.bulkhead(&["exec", "-e", "B=2", &id, "/bin/sh", "-c", "echo $A $B; exit 9"]).output().unwrap();
    assert_eq!((code(&output), stdout(&output).as_str()), (9, "container 2\n"), "{}", stderr(&output));
    let mut cat = host.bulkhead(&["exec", "-i", &id, "--", "/bin/cat"]);
    let mut child = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"through").unwrap();
    assert_eq!(stdout(&wait(child)), "through");
    assert_eq!(code(&host.bulkhead(&["exec", &id, "/nonexistent"]).output().unwrap()), 127);
    // What an orphan holds open is not waited for.
    let output = host.bulkhead(&["exec", &id, "/bin/sh", "-c", "sleep 60 & echo x"]).output().unwrap();
    assert_eq!((code(&output), stdout(&output).as_str()), (0, "x\n"));
    assert_eq!(row(&host, &id)["status"], "running");
    host.output(&["kill", &id]);
    let output = host.bulkhead(&["exec", &id, "/bin/true"]).output().unwrap();
    assert!(stderr(&output).contains("has ended"), "{}", stderr(&output));
}

#[test]
fn stop_asks_first_and_kills_those_that_do_not_listen() {
    let host = Host::new();
    let polite = host
        .detached(&[], &["/bin/sh", "-c", "trap 'exit 4' TERM; echo ready; while :; do sleep 0.05; done"]);
    let stubborn =
        host.detached(&[], &["/bin/sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"]);
    for id in [&polite, &stubborn] {
        until("its trap is set", || host.output(&["logs", id]) == "ready");
    }
    host.output(&["stop", &polite]);
    assert_eq!(row(&host, &polite)["outcome"]["exit_code"], 4);
    host.output(&["stop", "-t", "0", &stubborn]);
    assert_eq!(row(&host, &stubborn)["outcome"]["exit_code"], 137);
    // A container that has ended is stopped.
    host.output(&["stop", &polite]);
    let again = host.bulkhead(&["kill", &polite]).output().unwrap();
    assert!(stderr(&again).contains("does not run"));
}

#[test]
fn kill_sends_any_signal() {
    let host = Host::new();
    let id = host.detached(
        &[],
        &["/bin/sh", "-c", "trap 'echo usr; exit 6' USR1; echo ready; while :; do sleep 0.05; done"],
    );
    until("its trap is set", || host.output(&["logs", &id]) == "ready");
    host.output(&["kill", "-s", "USR1", &id]);
    until("it has ended", || row(&host, &id)["status"] == "exited");
    assert_eq!(row(&host, &id)["outcome"]["exit_code"], 6);
    assert_eq!(host.output(&["logs", &id]), "ready\nusr");
}

#[test]
fn rm_refuses_what_runs_unless_forced() {
    let host = Host::new();
    let id = host.detached(&[], &["/bin/sleep", "60"]);
    let output = host.bulkhead(&["rm", &id]).output().unwrap();
    assert_eq!(code(&output), 1);
    assert!(stderr(&output).contains("rm -f"), "{}", stderr(&output));
    host.output(&["rm", "-f", &id]);
    assert!(host.residue().is_empty(), "{:?}", host.residue());
}

#[test]
fn a_vmm_that_would_survive_its_launcher_is_killed_with_it() {
    let host = Host::new();
    host.boots_like("survive");
    let id = host.detached(&[], &["/bin/sleep", "60"]);
    let vmm = i32::try_from(row(&host, &id)["vmm_pid"].as_i64().unwrap()).unwrap();
    let handle = pidfd_open(Pid::from_raw(vmm).unwrap(), PidfdFlags::empty()).unwrap();
    // Nobody passes the signal on.
    std::fs::remove_file(host.path("run").join(&id).join("vsock")).unwrap();
    host.output(&["kill", &id]);
    let a_minute = Timespec { tv_sec: 60, tv_nsec: 0 };
    assert_eq!(poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&a_minute)).unwrap(), 1, "it lives");
    assert_eq!(row(&host, &id)["outcome"]["exit_code"], 137);
}

#[test]
fn what_a_killed_launcher_leaves_is_cleaned_up() {
    let host = Host::new();
    let mut child = host.run(&["--name", "orphan"], &["/bin/sleep", "60"]).spawn().unwrap();
    until("it runs", || host.output(&["ps"]).contains("running"));
    kill_process(Pid::from_child(&child), Signal::KILL).unwrap();
    child.wait().unwrap();
    assert!(host.output(&["ps", "-a"]).contains("launcher that ran this container was killed"));
    host.output(&["rm", "orphan"]);
    assert!(host.residue().is_empty(), "{:?}", host.residue());
}

#[test]
fn a_name_belongs_to_one_container() {
    let host = Host::new();
    let id = host.detached(&["--name", "web"], &["/bin/sleep", "60"]);
    let output = host.run(&["--name", "web"], &["/bin/true"]).output().unwrap();
    assert_eq!(code(&output), 125);
    assert!(stderr(&output).contains(&id), "{}", stderr(&output));
}

#[test]
fn scratch_disks_go_with_their_containers() {
    let host = Host::new();
    let id = host.detached(&["--storage", "64M"], &["/bin/sleep", "60"]);
    let scratch = host.path("data/containers").join(&id).join("scratch.ext4");
    assert!(scratch.exists());
    host.output(&["stop", "-t", "0", &id]);
    assert!(!scratch.exists());
}

#[test]
fn containers_without_a_log_say_so() {
    let host = Host::new();
    let mut child = host.run(&["--rm", "--name", "quiet"], &["/bin/sleep", "60"]).spawn().unwrap();
    until("it runs", || host.output(&["ps"]).contains("running"));
    let output = host.bulkhead(&["logs", "quiet"]).output().unwrap();
    assert!(stderr(&output).contains("has no log"), "{}", stderr(&output));
    host.output(&["kill", "quiet"]);
    assert_eq!(child.wait().unwrap().code(), Some(137));
    assert!(host.residue().is_empty());
}

#[test]
fn an_empty_store_has_no_images() {
    let host = Host::new();
    assert_eq!(host.output(&["image", "ls"]).lines().count(), 1);
    assert_eq!(host.output(&["image", "ls", "--json"]), "[]");
    for args in [&["image", "rm", "debian"][..], &["image", "import", "/nonexistent"]] {
        let output = host.bulkhead(args).output().unwrap();
        assert_eq!(code(&output), 125);
        assert!(stderr(&output).contains(args[2]), "{}", stderr(&output));
    }
}

#[test]
fn check_names_what_is_missing_and_fails() {
    let host = Host::new();
    let output = host.bulkhead(&["check", "--json"]).output().unwrap();
    assert_eq!(code(&output), 1);
    let lines: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let status = |what: &str| {
        let mut lines = lines.as_array().unwrap().iter();
        lines.find(|line| line["what"] == what).map(|line| line["status"].clone()).unwrap_or_default()
    };
    // /dev/null opens, but it is no KVM; the artifacts are whole.
    assert_eq!((status("/dev/kvm"), status("KVM API")), ("ok".into(), "failure".into()));
    assert_eq!((status("VMM"), status("guest kernel")), ("ok".into(), "ok".into()));
    let vmm = format!("libexec/bulkhead-vmm (bulkhead-vmm {})", env!("CARGO_PKG_VERSION"));
    assert!(host.output(&["version"]).contains(&vmm), "{}", host.output(&["version"]));
    std::fs::remove_file(host.path("libexec/bulkhead-vmm")).unwrap();
    assert!(host.output(&["version"]).contains("libexec/bulkhead-vmm (cannot be run)"));
}
