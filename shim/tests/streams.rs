//! Standard streams of containers: fifos, files, loggers, and readers that do not behave.

#![allow(clippy::unwrap_used)]

#[path = "../../sandbox/tests/support/executable.rs"]
mod executable;
mod support;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use containerd_shim_protos::api;
use serde_json::json;
use support::{Host, Shim, answer, ctx, read, reading, until};

const SIGKILL: u32 = 9;

fn name(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// A container with these streams that runs.
async fn running(host: &Host, args: &[&str], change: impl FnOnce(&mut api::CreateTaskRequest)) -> Shim {
    host.bundle("web", args, &[], &json!({}));
    let shim = host.start("web").await;
    let mut request = shim.request();
    change(&mut request);
    shim.create(&request).await.unwrap();
    shim.start("").await.unwrap();
    shim
}

async fn close_stdin(shim: &Shim, exec_id: &str) {
    let (id, exec_id) = (shim.id.clone(), exec_id.to_owned());
    let request = api::CloseIORequest { id, exec_id, stdin: true, ..Default::default() };
    answer(shim.client.close_io(ctx(), &request).await).unwrap();
}

#[tokio::test]
async fn output_is_whole_when_the_end_is_told() {
    let host = Host::new().await;
    let (out, err) = (host.fifo("out"), host.fifo("err"));
    let (stdout, stderr) = (read(&out), read(&err));
    let script = "head -c 8388608 /dev/zero; echo oops >&2";
    let shim = running(&host, &["/bin/sh", "-c", script], |request| {
        request.stdout = name(&out);
        request.stderr = name(&err);
    })
    .await;
    assert_eq!(shim.wait("").await.unwrap(), 0);
    // Both readers see the end although nothing has been deleted.
    let stdout = stdout.await;
    assert!(stdout.len() == 8 << 20 && stdout.iter().all(|byte| *byte == 0), "{}", stdout.len());
    assert_eq!(stderr.await, b"oops\n");
    shim.finish(&host).await;
}

#[tokio::test]
async fn input_arrives_and_ends_when_it_is_closed() {
    let host = Host::new().await;
    let (stdin, out) = (host.fifo("in"), host.fifo("out"));
    let stdout = read(&out);
    let shim = running(&host, &["/bin/cat"], |request| {
        request.stdin = name(&stdin);
        request.stdout = name(&out);
    })
    .await;
    // ctr calls before it closes its end.
    let mut writer = File::options().write(true).open(&stdin).unwrap();
    writer.write_all(b"some words").unwrap();
    close_stdin(&shim, "").await;
    drop(writer);
    assert_eq!(shim.wait("").await.unwrap(), 0);
    assert_eq!(stdout.await, b"some words");
    shim.finish(&host).await;
}

#[tokio::test]
async fn input_that_is_closed_before_the_start_is_empty() {
    let host = Host::new().await;
    let stdin = host.fifo("in");
    host.bundle("web", &["/bin/cat"], &[], &json!({}));
    let shim = host.start("web").await;
    let request = api::CreateTaskRequest { stdin: name(&stdin), ..shim.request() };
    shim.create(&request).await.unwrap();
    drop(File::options().write(true).open(&stdin).unwrap());
    close_stdin(&shim, "").await;
    shim.start("").await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 0);
    shim.finish(&host).await;
}

#[tokio::test]
async fn input_goes_on_when_its_writer_has_gone_until_it_is_closed() {
    let host = Host::new().await;
    let (stdin, out) = (host.fifo("in"), host.fifo("out"));
    let stdout = read(&out);
    let shim = running(&host, &["/bin/cat"], |request| {
        request.stdin = name(&stdin);
        request.stdout = name(&out);
    })
    .await;
    // A client that leaves, and one that attaches later.
    for words in [b"first ", b"later "] {
        File::options().write(true).open(&stdin).unwrap().write_all(words).unwrap();
        assert_eq!(shim.status("").await, api::Status::RUNNING);
    }
    close_stdin(&shim, "").await;
    assert_eq!(shim.wait("").await.unwrap(), 0);
    assert_eq!(stdout.await, b"first later ");
    shim.finish(&host).await;
}

#[tokio::test]
async fn input_whose_writer_had_gone_before_the_start_is_over() {
    let host = Host::new().await;
    let (stdin, out) = (host.fifo("in"), host.fifo("out"));
    let stdout = read(&out);
    host.bundle("web", &["/bin/cat"], &[], &json!({}));
    let shim = host.start("web").await;
    let request = api::CreateTaskRequest { stdin: name(&stdin), stdout: name(&out), ..shim.request() };
    shim.create(&request).await.unwrap();
    File::options().write(true).open(&stdin).unwrap().write_all(b"all of it").unwrap();
    shim.start("").await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 0);
    assert_eq!(stdout.await, b"all of it");
    shim.finish(&host).await;
}

#[tokio::test]
async fn input_of_an_exec_that_is_closed_before_the_start_is_empty() {
    let host = Host::new().await;
    let stdin = host.fifo("in");
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    let request = api::ExecProcessRequest { stdin: name(&stdin), ..shim.exec_request("e", &["/bin/cat"]) };
    shim.exec(&request).await.unwrap();
    close_stdin(&shim, "e").await;
    shim.start("e").await.unwrap();
    assert_eq!(shim.wait("e").await.unwrap(), 0);
    shim.kill("", SIGKILL).await.unwrap();
    shim.wait("").await.unwrap();
    shim.finish(&host).await;
}

#[tokio::test]
async fn a_reader_may_come_late_go_and_come_back() {
    let host = Host::new().await;
    let out = host.fifo("out");
    let script = "echo one; read -r line; echo two; read -r line; echo three";
    let stdin = host.fifo("in");
    // Nobody reads or writes yet, and nobody waits for that.
    let shim = running(&host, &["/bin/sh", "-c", script], |request| {
        request.stdout = name(&out);
        request.stdin = name(&stdin);
    })
    .await;
    let mut writer = File::options().write(true).open(&stdin).unwrap();
    for expected in ["one\n", "two\n", "three\n"] {
        // The writer is the shim, which is there, so this does not wait.
        let mut reader = File::open(&out).unwrap();
        if expected != "one\n" {
            writer.write_all(b"go on\n").unwrap();
        }
        let mut line = vec![0; expected.len()];
        let line = reading(move || reader.read_exact(&mut line).map(|()| line)).await.unwrap();
        assert_eq!(String::from_utf8(line).unwrap(), expected);
    }
    assert_eq!(shim.wait("").await.unwrap(), 0);
    shim.finish(&host).await;
}

#[tokio::test]
async fn a_reader_that_never_reads_does_not_hold_back_the_end() {
    let host = Host::new().await;
    let out = host.fifo("out");
    let shim =
        running(&host, &["/bin/sh", "-c", "exec cat /dev/zero"], |request| request.stdout = name(&out)).await;
    let pid = shim.connected().await.shim_pid;
    shim.kill("", SIGKILL).await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 137);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    // What is not read is not kept: a container that writes zeros for ever has written far more.
    assert!(kib < 64 << 10, "{kib} KiB");
    shim.finish(&host).await;
}

#[tokio::test]
async fn an_orphan_that_keeps_the_output_open_does_not_hold_back_the_end() {
    let host = Host::new().await;
    let out = host.fifo("out");
    let stdout = read(&out);
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    let mut request = shim.exec_request("parent", &["/bin/sh", "-c", "sleep 600 & echo gone"]);
    request.stdout = name(&out);
    shim.exec(&request).await.unwrap();
    shim.start("parent").await.unwrap();
    assert_eq!(shim.wait("parent").await.unwrap(), 0);
    shim.delete("parent").await.unwrap();
    assert_eq!(stdout.await, b"gone\n");
    shim.kill("", SIGKILL).await.unwrap();
    shim.wait("").await.unwrap();
    shim.finish(&host).await;
}

#[tokio::test]
async fn a_terminal_has_its_size_and_one_stream() {
    let host = Host::new().await;
    let (stdin, out) = (host.fifo("in"), host.fifo("out"));
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    let mut request = shim.exec_request("tty", &["/bin/sh", "-c", "stty size; read -r line; stty size"]);
    (request.terminal, request.stdin, request.stdout) = (true, name(&stdin), name(&out));
    shim.exec(&request).await.unwrap();
    // Told before there is a terminal, it holds from its beginning.
    let first = api::ResizePtyRequest {
        id: shim.id.clone(),
        exec_id: "tty".into(),
        width: 100,
        height: 30,
        ..Default::default()
    };
    answer(shim.client.resize_pty(ctx(), &first).await).unwrap();
    shim.start("tty").await.unwrap();
    let path = out.clone();
    let (output, line) = reading(move || {
        let mut output = BufReader::new(File::open(path).unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        (output, line)
    })
    .await;
    assert_eq!(line, "30 100\r\n");
    let second = api::ResizePtyRequest { width: 80, height: 24, ..first };
    let mut writer = File::options().write(true).open(&stdin).unwrap();
    answer(shim.client.resize_pty(ctx(), &second).await).unwrap();
    writer.write_all(b"go on\n").unwrap();
    assert_eq!(shim.wait("tty").await.unwrap(), 0);
    shim.delete("tty").await.unwrap();
    let lines = reading(|| output.lines().map(Result::unwrap).collect::<Vec<_>>()).await;
    assert_eq!(lines, ["go on", "24 80"]);
    shim.kill("", SIGKILL).await.unwrap();
    shim.wait("").await.unwrap();
    shim.finish(&host).await;
}

#[tokio::test]
async fn files_and_loggers_take_both_streams() {
    let host = Host::new().await;
    let script = "echo out; echo err >&2";
    let log = host.path("logs/web.log");
    let shim = running(&host, &["/bin/sh", "-c", script], |request| {
        request.stdout = format!("file://{}", log.display());
    })
    .await;
    assert_eq!(shim.wait("").await.unwrap(), 0);
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("out\n") && text.contains("err\n"), "{text:?}");
    shim.finish(&host).await;
    fs::remove_dir_all(host.path("bundles/web")).unwrap();

    let logger = host.path("logger");
    let kept = host.path("kept");
    let script_of_logger = "exec 5>&-\ntrap '' TERM\n{ echo $CONTAINER_NAMESPACE $CONTAINER_ID; cat <&3; cat <&4; } >$2.new\nmv $2.new $2";
    executable::script(&logger, script_of_logger);
    let uri = format!("binary://{}?to={}", logger.display(), kept.display());
    let shim = running(&host, &["/bin/sh", "-c", script], |request| request.stdout = uri).await;
    assert_eq!(shim.wait("").await.unwrap(), 0);
    until("the logger has everything", || kept.exists()).await;
    assert_eq!(fs::read_to_string(&kept).unwrap(), "testing web\nout\nerr\n");
    shim.finish(&host).await;
}

#[tokio::test]
async fn streams_that_cannot_be_opened_end_the_creation_and_leave_nothing() {
    let host = Host::new().await;
    host.bundle("web", &["/bin/true"], &[], &json!({}));
    let shim = host.start("web").await;
    for (stdout, code) in [
        ("http://host/path", ttrpc::Code::INVALID_ARGUMENT),
        ("/nonexistent/fifo", ttrpc::Code::UNKNOWN),
        ("binary:///nonexistent/logger", ttrpc::Code::UNKNOWN),
    ] {
        let request = api::CreateTaskRequest { stdout: stdout.into(), ..shim.request() };
        assert_eq!(shim.create(&request).await.unwrap_err().0, code, "{stdout}");
    }
    assert_eq!(shim.state("").await.unwrap_err().0, ttrpc::Code::NOT_FOUND);
    shim.shutdown().await;
    host.delete("web");
    assert_eq!(host.residue(), Vec::<PathBuf>::new());
}
