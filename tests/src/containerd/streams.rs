//! Standard streams of tasks: bursts, readers that come and go, an orphan that keeps them.

use std::fs::{File, read_to_string};
use std::path::PathBuf;
use std::thread;

use bulkhead_tests::bulkhead::{eventually, expect_code, stderr, stdout};
use bulkhead_tests::ctr::{Bundle, CreateTaskRequest, Reader, Shim, in_background, run};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;

use crate::trial;

/// More than pipes and buffers on the way take together.
const BURST: usize = 8 << 20;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("streams: standard output and error are apart", apart),
        trial("streams: eight megabytes written in a burst before the end arrive whole", burst),
        trial("streams: input that ended before the command started is an end of file", closed_early),
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
