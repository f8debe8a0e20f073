//! `run` in the foreground: exit codes, streams, and what is left behind, which is nothing.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::process::Stdio;

use support::{Host, code, stderr, stdout, until, wait};

#[test]
fn output_and_exit_code_are_those_of_the_command() {
    let host = Host::new();
    let output = host.run(&["--rm"], &["/bin/sh", "-c", "echo out; echo err >&2; exit 42"]).output().unwrap();
    assert_eq!((code(&output), stdout(&output).as_str(), stderr(&output).as_str()), (42, "out\n", "err\n"));
    assert!(host.residue().is_empty(), "{:?}", host.residue());
}

#[test]
fn a_signals_death_a_missing_and_an_unexecutable_command_have_dockers_codes() {
    let host = Host::new();
    assert_eq!(code(&host.run(&[], &["/bin/sh", "-c", "kill -TERM $$"]).output().unwrap()), 143);
    let missing = host.run(&[], &["/nonexistent"]).output().unwrap();
    assert_eq!(code(&missing), 127);
    // The guest's words are escaped.
    assert_eq!(stderr(&missing), "bulkhead: \"/nonexistent\" not found\\x1b\n");
    assert_eq!(code(&host.run(&[], &["/etc/passwd"]).output().unwrap()), 126);
    let user = host.run(&["-u", "nobody-here"], &["/bin/true"]).output().unwrap();
    assert_eq!(code(&user), 125);
    assert!(stderr(&user).contains("unable to find user nobody-here"), "{}", stderr(&user));
    // Only the first has ever started and is kept.
    assert_eq!(host.residue().len(), 1, "{:?}", host.residue());
}

#[test]
fn environment_directory_and_hostname_reach_the_command() {
    let host = Host::new();
    let options = ["--rm", "-e", "A=1", "-e", "PASSED", "-w", "/usr", "--hostname", "box"];
    let mut run = host.run(&options, &["--", "/bin/sh", "-c", "echo $A $PASSED $HOSTNAME; pwd"]);
    let output = run.env("PASSED", "on").output().unwrap();
    assert_eq!(stdout(&output), "1 on box\n/usr\n", "{}", stderr(&output));
}

#[test]
fn input_ends_for_the_command_when_it_ends_for_the_launcher() {
    let host = Host::new();
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    let mut run = host.run(&["--rm", "-i"], &["/bin/cat"]);
    let mut child = run.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let to_send = sent.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&to_send).unwrap());
    let output = wait(child);
    writer.join().unwrap();
    assert_eq!(code(&output), 0);
    assert!(output.stdout == sent, "{} of {} bytes, or others", output.stdout.len(), sent.len());
}

#[test]
fn without_i_the_command_has_no_input() {
    let host = Host::new();
    let output = host.run(&["--rm"], &["/bin/cat"]).stdin(Stdio::piped()).output().unwrap();
    assert_eq!((code(&output), output.stdout.len()), (0, 0));
}

#[test]
fn a_slow_reader_gets_every_byte() {
    const MEGABYTES: usize = 8;
    let host = Host::new();
    let script = format!("head -c {MEGABYTES}M /dev/zero | tr '\\0' x; echo end");
    let mut child = host.run(&["--rm"], &["/bin/sh", "-c", &script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut received = 0;
    let mut last = Vec::new();
    let mut piece = [0; 1000];
    loop {
        let count = stdout.read(&mut piece).unwrap();
        if count == 0 {
            break;
        }
        received += count;
        last = piece[..count].to_vec();
    }
    assert_eq!(received, (MEGABYTES << 20) + 4);
    assert!(last.ends_with(b"xend\n") || last.ends_with(b"end\n"));
    assert_eq!(code(&wait(child)), 0);
}

#[test]
fn a_closed_pipe_ends_the_command_as_it_would_without_a_container() {
    let host = Host::new();
    let script = "while echo line; do :; done 2>/dev/null; exit 5";
    let mut run = host.run(&["--rm"], &["/bin/sh", "-c", &format!("trap '' PIPE; {script}")]);
    let mut child = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 5];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"line\n");
    let output = wait(child);
    assert_eq!((code(&output), stderr(&output).as_str()), (5, ""));

    let mut run = host.run(&["--rm"], &["/usr/bin/yes"]);
    let mut child = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut first[..2]).unwrap();
    let output = wait(child);
    // `yes` tells of the broken pipe if SIGPIPE is ignored.
    assert!([1, 141].contains(&code(&output)), "{}: {}", code(&output), stderr(&output));
    assert!(host.residue().is_empty());
}

#[test]
fn a_command_that_does_not_mind_a_closed_pipe_is_ended() {
    let host = Host::new();
    let script = "trap '' PIPE; while :; do echo line; done 2>/dev/null";
    let mut child = host.run(&["--rm"], &["/bin/sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(code(&wait(child)), 141);
    assert!(host.residue().is_empty());
}

#[test]
fn a_machine_whose_guest_does_not_say_that_its_command_was_killed_is_ended() {
    let host = Host::new();
    // Ends by itself at some time because here nothing else ends it.
    let script =
        "trap '' PIPE; n=0; while [ $n -lt 600 ]; do echo line; sleep 0.1; n=$((n+1)); done 2>/dev/null";
    let mut run = host.run(&["--rm", "-e", "FAKE_IMMORTAL=1"], &["/bin/sh", "-c", script]);
    let mut child = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = wait(child);
    assert_eq!(code(&output), 125);
    assert!(stderr(&output).contains("did not say that it ended"), "{}", stderr(&output));
    assert!(host.residue().is_empty());
}

#[test]
fn output_that_comes_late_is_waited_for_unless_a_signal_comes() {
    let host = Host::new();
    let output =
        host.run(&["--rm"], &["/bin/sh", "-c", "(sleep 4; echo late) & echo early"]).output().unwrap();
    assert_eq!((code(&output), stdout(&output).as_str()), (0, "early\nlate\n"));

    let script = "trap '' TERM; echo ready; sleep 60 & exit 3";
    let mut child = host.run(&["--rm"], &["/bin/sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    until("a signal ends it", || {
        // Not yet reaped: the process of this number is still the launcher.
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        child.try_wait().unwrap().is_some()
    });
    assert_eq!(code(&wait(child)), 3);
    assert!(host.residue().is_empty());
}

#[test]
fn signals_reach_the_command() {
    let host = Host::new();
    let script = "trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 0.1; done";
    let mut child = host.run(&["--rm"], &["/bin/sh", "-c", script]).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut ready = [0; 6];
    stdout.read_exact(&mut ready).unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!((code(&wait(child)), rest.as_str()), (7, "caught\n"));
}

#[test]
fn an_end_by_want_of_memory_is_told() {
    let host = Host::new();
    let output =
        host.run(&["--rm", "-e", "FAKE_OOM=1"], &["/bin/sh", "-c", "kill -KILL $$"]).output().unwrap();
    assert_eq!(code(&output), 137);
    assert!(stderr(&output).contains("out of memory"), "{}", stderr(&output));
}

#[test]
fn the_end_of_a_machine_is_told_with_its_console() {
    let host = Host::new();
    let output = host.run(&["--rm"], &["fake:panic"]).output().unwrap();
    assert_eq!(code(&output), 125);
    let text = stderr(&output);
    assert!(text.contains("the guest's kernel panicked") && text.contains("\\x1b[2JKernel panic"), "{text}");
    let output = host.run(&["--rm"], &["fake:agent-failed"]).output().unwrap();
    assert!(stderr(&output).contains("the agent in the guest failed"), "{}", stderr(&output));
    assert!(host.residue().is_empty());
}

#[test]
fn a_vmm_that_is_killed_ends_the_container_at_once() {
    let host = Host::new();
    let mut run = host.run(&["--name", "victim"], &["/bin/sleep", "60"]);
    let child = run.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut vmm = None;
    until("the VMM runs", || {
        let rows: serde_json::Value = serde_json::from_str(&host.output(&["ps", "--json"])).unwrap();
        vmm = rows[0]["vmm_pid"].as_i64();
        vmm.is_some()
    });
    let pid = rustix::process::Pid::from_raw(i32::try_from(vmm.unwrap()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let output = wait(child);
    assert_eq!(code(&output), 125);
    assert!(stderr(&output).contains("the VMM was killed by signal 9"), "{}", stderr(&output));
    assert!(host.output(&["ps", "-a"]).contains("killed by signal 9"));
    host.output(&["rm", "victim"]);
    assert!(host.residue().is_empty());
}

#[test]
fn a_boot_that_fails_without_a_word_is_repeated_with_one() {
    let host = Host::new();
    host.boots_like("panic-early");
    let output = host.run(&["--rm"], &["/bin/true"]).output().unwrap();
    assert_eq!(code(&output), 125);
    assert!(stderr(&output).contains("no init found\n    Kernel panic"), "{}", stderr(&output));
    for (directive, words) in [
        ("triple-fault", "lost control (triple fault); the end of its console:\n    something"),
        ("refuse", "the VMM cannot boot the machine: no such luck"),
        ("die", "the VMM ended: bulkhead-vmm: lost heart"),
    ] {
        host.boots_like(directive);
        let output = host.run(&["--rm"], &["/bin/true"]).output().unwrap();
        assert_eq!(code(&output), 125, "{directive}");
        assert!(stderr(&output).contains(words), "{directive}: {}", stderr(&output));
    }
    assert!(host.residue().is_empty());
}

#[test]
fn a_signal_during_the_boot_ends_it() {
    let host = Host::new();
    host.boots_like("hang");
    let child = host.run(&[], &["/bin/true"]).stderr(Stdio::piped()).spawn().unwrap();
    until("the VMM listens", || !host.residue().is_empty() && host.output(&["ps"]).contains("creating"));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = wait(child);
    assert_eq!(code(&output), 130);
    assert!(host.residue().is_empty(), "{:?}", host.residue());
}

#[test]
fn bad_input_ends_in_one_line_that_says_what_to_do() {
    let host = Host::new();
    std::fs::write(host.path("noise"), "noise").unwrap();
    let noise = host.path("noise");
    let noise = noise.to_str().unwrap();
    for (args, words) in [
        (&["run", "--cpus", "0", "--rootfs", "/etc", "x"][..], "1 to 32"),
        (&["run", "--memory", "1M", "--rootfs", "/etc", "x"], "64 to"),
        (&["run", "--memory", "9999G", "--rootfs", "/etc", "x"], "give less"),
        (&["run", "--memory", "much", "x"], "is not a size"),
        (&["run", "--storage", "1K", "x"], "give at least 16 MiB"),
        (&["run"], "Give an image"),
        (&["run", "no-such-image"], "no-such-image"),
        (&["run", "--rootfs", noise, "x"], "neither an EROFS nor an ext4"),
        (&["run", "--rootfs", "/nonexistent", "x"], "/nonexistent"),
        (&["run", "--rootfs", "/etc"], "no command"),
        (&["run", "--bundle", "/nonexistent"], "config.json"),
        (&["run", "-v", "data:/data", "x"], "no named volumes"),
        (&["run", "--mount", "type=tmpfs,target=/data", "x"], "type=bind"),
        (&["run", "--bundle", "/nonexistent", "-v", "/etc:/data"], "cannot be used with"),
        (&["run", "--name", "a/b", "x"], "cannot be a name"),
        (&["run", "-t", "-i", "x"], "needs a terminal"),
        (&["exec", "nobody", "ls"], "no container"),
        (&["frobnicate"], "frobnicate"),
    ] {
        let output = host.bulkhead(args).output().unwrap();
        assert_eq!(code(&output), 125, "{args:?}");
        let text = stderr(&output);
        assert!(text.contains(words) && !text.contains("panicked"), "{args:?}: {text}");
    }
    assert!(host.residue().is_empty());
}

#[test]
fn missing_and_truncated_artifacts_are_named() {
    let host = Host::new();
    std::fs::write(host.path("share/vmlinux"), "\x7fELF").unwrap();
    let output = host.run(&[], &["x"]).output().unwrap();
    assert!(stderr(&output).contains("vmlinux"), "{}", stderr(&output));
    std::fs::remove_file(host.path("share/guest.erofs")).unwrap();
    let host = Host::new();
    std::fs::remove_file(host.path("libexec/bulkhead-vmm")).unwrap();
    let output = host.run(&[], &["x"]).output().unwrap();
    assert!(stderr(&output).contains("libexec/bulkhead-vmm"), "{}", stderr(&output));
    let config = support::CONFIG.replace("/dev/null", "/nonexistent/kvm");
    std::fs::write(host.path("config.toml"), config).unwrap();
    let output = host.run(&[], &["x"]).output().unwrap();
    assert!(stderr(&output).contains("/nonexistent/kvm"), "{}", stderr(&output));
    assert!(host.residue().is_empty());
}

#[test]
fn timings_tell_the_stations_of_a_run() {
    let host = Host::new();
    let output = host.run(&["--rm", "--timings=json"], &["/bin/echo", "x"]).output().unwrap();
    let stations: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    let names: Vec<&str> =
        stations.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
    for name in ["prepared", "guest ready", "container started", "first output", "exit", "done"] {
        assert!(names.contains(&name), "{names:?}");
    }
    let text = host.run(&["--rm", "--timings"], &["/bin/true"]).output().unwrap();
    assert!(stderr(&text).contains("guest kernel 6.12.0"), "{}", stderr(&text));
}
