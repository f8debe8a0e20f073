//! Standard streams of tasks: bursts, readers and writers that come and go, an orphan that keeps them.

use std::fs::{File, read_to_string};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Output, Stdio};
use std::thread;

use bulkhead_tests::bulkhead::{eventually, expect_code, stderr, stdout};
use bulkhead_tests::checksum::md5_hex;
use bulkhead_tests::ctr::{
    self, Bundle, Container, CreateTaskRequest, Reader, Shim, ctr, in_background, is_runc, pipes, run,
    run_command, status,
};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;

use crate::{soak, trial};

/// More than pipes and buffers on the way take together.
const BURST: usize = 8 << 20;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("streams: standard output and error are apart", apart),
        trial("streams: eight megabytes written in a burst before the end arrive whole", burst),
        trial("streams: input that ended before the command started is an end of file", closed_early),
        trial("streams: a command gets all of its input, little or much, and then its end", || {
            whole_input(1)
        }),
        soak("streams: a command gets all of its input, little or much, twenty times", || whole_input(20)),
        trial(
            "streams: input outlives the client in the background, and one that attaches goes on",
            detached_input,
        ),
        trial(
            "streams: input outlives a client that is killed, and one that attaches goes on",
            orphaned_input,
        ),
        trial(
            "streams: input outlives containerd, and a client that attaches to the next one goes on",
            lasting_input,
        ),
        trial("streams: output without a reader is thrown away when there is to be none", nowhere),
        trial("streams: output goes to a file that is named, after what is there", log_file),
        trial("streams: output goes to a program that is named", log_program),
        trial("streams: an orphan that keeps standard output does not keep an exec from ending", orphan),
        trial("streams: a reader that never reads keeps nobody from ending the container", never_read),
        trial("streams: a reader that goes away and comes back misses nothing", comes_back),
    ]
}

fn apart() -> Result {
    let output = run(&[], &["sh", "-c", "echo out; echo err >&2"])?;
    ensure(stdout(&output) == "out\n" && stderr(&output) == "err\n", || format!("{output:?}"))
}

fn burst() -> Result {
    let script = format!("head -c {BURST} /dev/zero; head -c {BURST} /dev/zero >&2; exit 4");
    let output = run(&[], &["sh", "-c", &script])?;
    ensure(output.stdout.len() == BURST && output.status.code() == Some(4), || {
        format!("{} bytes, {}", output.stdout.len(), output.status)
    })?;
    ensure(output.stderr.len() == BURST, || format!("{} bytes of standard error", output.stderr.len()))
}

/// When `ctr` is done with its input must not matter.
fn whole_input(times: usize) -> Result {
    // ctr that is done with its input before the creation is over never calls CloseIO (containerd's issue 4489), without which runc's
    // shim ends no input.
    let lengths: &[usize] = if is_runc() { &[BURST] } else { &[10, 100_000, BURST] };
    for &length in lengths {
        let text: Vec<u8> = (0..length).map(|n| b"0123456789abc"[n % 13]).collect();
        let expected = format!("{}  -\n", md5_hex(&text)?);
        for time in 1..=times {
            let output = fed(&text)?;
            expect_code(&output, 0)?;
            ensure(stdout(&output) == expected, || format!("{length} bytes, time {time}: {output:?}"))?;
        }
    }
    Ok(())
}

/// What `md5sum` says of this input.
fn fed(text: &[u8]) -> Result<Output> {
    let mut command = run_command("fed", &["--rm"], &["md5sum"])?;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut input = child.stdin.take().ok_or("no standard input")?;
    input.write_all(text)?;
    drop(input);
    ended(child)
}

/// Waits for a `ctr`, which may have been left without an end.
fn ended(mut child: Child) -> Result<Output> {
    if let Err(error) = eventually("ctr ends", || Ok(child.try_wait()?.is_some())) {
        child.kill()?;
        return Err(format!("{error}: {:?}", child.wait_with_output()?).into());
    }
    Ok(child.wait_with_output()?)
}

/// Reads two lines, of which a first client has typed one; its standard input stays open as long as that of its `ctr`.
fn half_typed(options: &[&str]) -> Result<Child> {
    let script = "read first; touch /read; read second; echo $first $second; exit 7";
    let mut client = run_command("typed", options, &["sh", "-c", script])?.stdin(Stdio::piped()).spawn()?;
    client.stdin.as_mut().ok_or("no standard input")?.write_all(b"one\n")?;
    Ok(client)
}

/// Has a second client type the other one.
fn type_the_rest(container: &Container) -> Result {
    ensure(status(container.id())? == "RUNNING", || "it has ended".to_owned())?;
    let mut client = container.task("attach", &[]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    client.stdin.as_mut().ok_or("no standard input")?.write_all(b"two\n")?;
    let output = ended(client)?;
    ensure(stdout(&output) == "one two\n", || format!("{output:?}"))?;
    expect_code(&output, 7)?;
    // ctr removes the task that it was attached to.
    expect_code(&ctr(["container", "delete", container.id()]).output()?, 0)
}

fn has_read(container: &Container) -> Result {
    eventually("it reads", || Ok(container.exec(&["test", "-e", "/read"])?.status.success()))
}

fn detached_input() -> Result {
    expect_code(&ended(half_typed(&["--detach"])?)?, 0)?;
    let container = Container::of("typed");
    has_read(&container)?;
    type_the_rest(&container)
}

fn orphaned_input() -> Result {
    let mut client = half_typed(&["--fifo-dir", &pipes()?])?;
    eventually("it runs", || Ok(status("typed").is_ok_and(|status| status == "RUNNING")))?;
    let container = Container::of("typed");
    has_read(&container)?;
    client.kill()?;
    client.wait()?;
    type_the_rest(&container)
}

fn lasting_input() -> Result {
    expect_code(&ended(half_typed(&["--detach"])?)?, 0)?;
    ctr::kill()?;
    ctr::start()?;
    type_the_rest(&Container::of("typed"))
}

fn nowhere() -> Result {
    let options = ["--null-io"];
    let script = format!("cat; head -c {BURST} /dev/zero; touch /done; sleep 1000");
    let container = in_background("mute", &options, &["sh", "-c", &script])?;
    eventually("all is written", || Ok(container.exec(&["test", "-e", "/done"])?.status.success()))?;
    container.end()
}

fn log_file() -> Result {
    let directory = tempfile::tempdir()?;
    let log = directory.path().join("log");
    std::fs::write(&log, "before\n")?;
    let target = format!("file://{}", log.display());
    let container =
        in_background("logged", &["--log-uri", &target], &["sh", "-c", "echo out; echo err >&2"])?;
    container.wait()?;
    container.delete()?;
    let written = read_to_string(&log)?;
    let mut lines: Vec<_> = written.lines().collect();
    ensure(lines.first() == Some(&"before"), || written.clone())?;
    lines.sort_unstable();
    ensure(lines == ["before", "err", "out"], || written.clone())
}

fn log_program() -> Result {
    let directory = tempfile::tempdir()?;
    let (program, log) = (directory.path().join("logger"), directory.path().join("log"));
    // Descriptors 3 and 4 are the streams; the end of file on 5 says that the logger is ready. It is sent TERM at the end.
    let script = "#!/bin/sh\ntrap '' TERM\nexec 5>&-\n{ echo $CONTAINER_ID $CONTAINER_NAMESPACE $1 $2; cat <&3; cat <&4; } >$2.new\nmv $2.new $2\n";
    std::fs::write(&program, script)?;
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let target = format!("binary://{}?path={}", program.display(), log.display());
    let container =
        in_background("logged", &["--log-uri", &target], &["sh", "-c", "echo out; echo err >&2"])?;
    container.wait()?;
    container.delete()?;
    eventually("the logger ends", || Ok(log.exists()))?;
    let written = read_to_string(&log)?;
    let expected = format!("logged bulkhead-test path {}\nout\nerr\n", log.display());
    ensure(written == expected, || written)
}

fn orphan() -> Result {
    let container = in_background("host", &[], &["sleep", "1000"])?;
    let output = container.exec(&["sh", "-c", "sleep 2000 & echo done; exit 5"])?;
    expect_code(&output, 5)?;
    ensure(stdout(&output) == "done\n", || format!("{output:?}"))?;
    // The orphan has no parent but the first process, and goes on.
    expect_code(&container.exec(&["pidof", "sleep"])?, 0)?;
    container.end()
}

/// A task of a bundle of our own, whose standard output is a pipe of our own.
struct Task {
    bundle: Bundle,
    shim: Shim,
    pipe: PathBuf,
    /// runc's shim wants standard error to be somewhere when standard output is.
    errors: PathBuf,
    _errors_reader: Reader,
}

impl Task {
    fn create(id: &str, script: &str) -> Result<Self> {
        let bundle = Bundle::new(id, &["sh", "-c", script])?;
        let pipe = bundle.fifo("stdout")?;
        let errors = bundle.fifo("stderr")?;
        let reader = Reader::open(&errors)?;
        let shim = bundle.start_shim()?;
        Ok(Self { bundle, shim, pipe, errors, _errors_reader: reader })
    }

    fn request(&self) -> CreateTaskRequest {
        CreateTaskRequest {
            stdout: self.pipe.display().to_string(),
            stderr: self.errors.display().to_string(),
            ..self.bundle.request()
        }
    }

    /// Creates and starts it. The pipe has to have a reader.
    fn start(&self) -> Result {
        self.shim.create(&self.request())?;
        self.shim.start(self.bundle.id(), "")?;
        Ok(())
    }

    fn end(self, code: u32) -> Result {
        let ended = self.shim.wait(self.bundle.id(), "")?;
        ensure(ended == code, || format!("exit code {ended}, not {code}"))?;
        self.shim.delete(self.bundle.id(), "")?;
        self.shim.shutdown(self.bundle.id())?;
        self.bundle.clean_up()
    }
}

/// `ctr` cannot do it: what it is to do at the end of its input it learns after the task's creation.
fn closed_early() -> Result {
    let task = Task::create("closed", "cat; echo end")?;
    let reader = Reader::open(&task.pipe)?;
    let input = task.bundle.fifo("stdin")?;
    let request = CreateTaskRequest { stdin: input.display().to_string(), ..task.request() };
    task.shim.create(&request)?;
    drop(File::options().write(true).open(&input)?);
    task.shim.close_stdin(task.bundle.id())?;
    task.shim.start(task.bundle.id(), "")?;
    task.end(0)?;
    let said = reader.read_to_end()?;
    ensure(said == b"end\n", || format!("{:?}", String::from_utf8_lossy(&said)))
}

fn never_read() -> Result {
    let task = Task::create("unread", "cat /dev/zero")?;
    let reader = Reader::open(&task.pipe)?;
    task.start()?;
    task.shim.kill(task.bundle.id(), "", 9)?;
    task.end(137)?;
    drop(reader);
    Ok(())
}

fn comes_back() -> Result {
    let script = "await() { while [ ! -e $1 ]; do sleep 0.1; done; }; \
                  echo first; await /alone; echo second; touch /written; await /back; echo third; exit 3";
    let task = Task::create("returning", script)?;
    // The root is a directory of the host.
    let root = task.bundle.path().join("rootfs");
    let mut reader = Reader::open(&task.pipe)?;
    task.start()?;
    let first = reader.read(6)?;
    ensure(first == b"first\n", || format!("{first:?}"))?;
    drop(reader);
    File::create(root.join("alone"))?;
    eventually("it writes to nobody", || Ok(root.join("written").exists()))?;
    let reader = Reader::open(&task.pipe)?;
    let read = thread::spawn(move || reader.read_to_end().map_err(|error| error.to_string()));
    File::create(root.join("back"))?;
    task.end(3)?;
    let rest = read.join().map_err(|_| "the reader panicked")??;
    ensure(rest == b"second\nthird\n", || format!("{:?}", String::from_utf8_lossy(&rest)))
}
