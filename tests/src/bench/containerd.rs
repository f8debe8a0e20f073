//! Containers under containerd, by its own client, beside runc's: a run, an exec, an end, files that are shared, memory.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bulkhead_tests::ctr::{self, Container, RUNC, ctr, ctr_run, in_background_of, runtime};
use bulkhead_tests::files::busybox_tree;
use bulkhead_tests::vm::{Result, ensure, proc_file};

use crate::density::{SETTLE, available};
use crate::image::write_data;
use crate::read::{self, read_times};
use crate::repeat::{attempt, repeat, timed};
use crate::report::{Bar, Row};

/// The first argument that makes this program the one that walks in the containers.
pub(crate) const FIND: &str = "find";

/// A tree of so many directories, and of so many files in each.
const DIRECTORIES: usize = 200;
const FILES: usize = 100;

/// The first ones pay for what all share.
const FIRST: Range<u64> = 0..10;
const FURTHER: Range<u64> = 10..20;

const NAME: &str = "bench";
const PEER: &str = "runc";

/// Where a program of a root without an image's environment is found.
const PATH: [&str; 2] = ["--env", "PATH=/bin"];

pub(crate) fn measure() -> Result<Vec<Row>> {
    ctr::image()?;
    let own = runtime();
    let mut rows = vec![runs(&own, "overlayfs", 1.5)?];
    let row = |name, own: &[Duration], runc: &[Duration], times| {
        Row::ms(name, own).beside(PEER, runc).bar(Bar::TimesPeer(times))
    };
    // Thousands of interrupts, of which the lab's QEMU delivers one too many now and then: what cannot be had is said.
    let mut add = |what: &'static str, measured: Result<Vec<Row>>| match measured {
        Ok(measured) => rows.extend(measured),
        Err(error) => {
            eprintln!("{what}: {error}");
            rows.push(Row::unmeasured(what));
        }
    };
    let once = |name, measure: fn(&str) -> Result<Vec<Duration>>| -> Result<Vec<Row>> {
        Ok(vec![row(name, &measure(&own)?, &measure(RUNC)?, 1.0)])
    };
    add("exec", once("ctr exec of true in a running container", execs));
    add("delete", once("ctr delete of a running container", ends));
    let pick = |runs: &[[Duration; 2]], which: usize| runs.iter().map(|run| run[which]).collect::<Vec<_>>();
    let read = |name, reads: fn(&str, &Path) -> Result<Pairs>| -> Result<Vec<Row>> {
        let (reads, runc) = both(&own, reads)?;
        Ok(vec![
            row(name, &pick(&reads, 0), &pick(&runc, 0), 1.5),
            Row::ms("  the same again", &pick(&reads, 1)).beside(PEER, &pick(&runc, 1)),
        ])
    };
    add(
        "read",
        read("read 256 MiB through a bind mount, by 128 KiB", |runtime, directory| {
            reads(runtime, directory, &[])
        }),
    );
    add(
        "large read",
        read("read 256 MiB through a bind mount, by 1 MiB", |runtime, directory| {
            reads(runtime, directory, &[read::LARGE])
        }),
    );
    let find = || -> Result<Vec<Row>> {
        let (walks, runc) = both(&own, walks)?;
        Ok(vec![
            row("find over 20,000 files of a shared root", &pick(&walks, 0), &pick(&runc, 0), 4.0),
            row("  the same again", &pick(&walks, 1), &pick(&runc, 1), 1.5),
        ])
    };
    add("find", find());
    let memory = [idle(&own)?];
    let name = "host memory of an idle container, 11th to 20th";
    rows.push(Row::mib(name, &memory).beside_mib(PEER, &[idle(RUNC)?]).bar(Bar::AtMost(45.0)));
    let name = "resident memory of an idle shim";
    rows.push(Row::mib(name, &[shim(&own)?]).beside_mib(PEER, &[shim(RUNC)?]).bar(Bar::AtMost(12.0)));
    ctr::stop();
    Ok(rows)
}

/// What containerd 2.1 is needed for.
pub(crate) fn erofs() -> Result<Vec<Row>> {
    ctr::image()?;
    ensure(ctr::snapshotters()?.contains(&"erofs"), || "containerd has no erofs snapshotter".to_owned())?;
    let rows = vec![runs(&runtime(), "erofs", 1.3)?];
    ctr::stop();
    Ok(rows)
}

fn runs(own: &str, snapshotter: &str, times: f64) -> Result<Row> {
    let runs = |runtime| {
        let options = ["--rm", "--snapshotter", snapshotter];
        repeat(|| Ok(timed(&mut ctr_run(runtime, NAME, &options, &["true"])?)?.0))
    };
    let name = format!("ctr run --rm busybox true, {snapshotter}");
    Ok(Row::ms(name, &runs(own)?).beside(PEER, &runs(RUNC)?).bar(Bar::TimesPeer(times)))
}

type Pairs = Vec<[Duration; 2]>;

/// Something measured of the runtime and of runc in the same directory.
fn both(own: &str, measure: fn(&str, &Path) -> Result<Pairs>) -> Result<(Pairs, Pairs)> {
    let directory = tempfile::tempdir()?;
    Ok((measure(own, directory.path())?, measure(RUNC, directory.path())?))
}

/// A container that does nothing.
fn sleeper(runtime: &str, id: &str) -> Result<Container> {
    attempt(|| {
        // One whose machine hung is in the way of the next attempt.
        let _ = ctr(["task", "delete", "--force", id]).output()?;
        let _ = ctr(["container", "delete", id]).output()?;
        in_background_of(runtime, id, &["--null-io"], &["sleep", "1000000"])
    })
}

fn end(container: &Container) -> Result<Duration> {
    let (took, _) = timed(&mut container.task("delete", &["--force"]))?;
    timed(&mut ctr(["container", "delete", container.id()]))?;
    Ok(took)
}

fn execs(runtime: &str) -> Result<Vec<Duration>> {
    // A container each, since one whose guest hangs is gone.
    repeat(|| {
        let container = sleeper(runtime, NAME)?;
        let (took, _) = timed(&mut container.exec_command("extra", &[], &["true"]))?;
        end(&container)?;
        Ok(took)
    })
}

fn ends(runtime: &str) -> Result<Vec<Duration>> {
    repeat(|| end(&sleeper(runtime, NAME)?))
}

/// This program reads a file of the host twice, as `how` says.
fn reads(runtime: &str, directory: &Path, how: &[&str]) -> Result<Pairs> {
    let (data, helper) = (directory.join("data"), directory.join("lab-bench"));
    if !data.exists() {
        write_data(&data)?;
        fs::copy(std::env::current_exe()?, &helper)?;
    }
    let mount = format!("type=bind,src={},dst=/shared,options=rbind:ro", directory.display());
    let program = [&["/shared/lab-bench", read::VERB, "/shared/data"], how].concat();
    repeat(|| read_times(&mut ctr_run(runtime, NAME, &["--rm", "--mount", &mount], &program)?))
}

/// This program walks twice through a root with many files.
fn walks(runtime: &str, directory: &Path) -> Result<Pairs> {
    let root = directory.join("root");
    if !root.exists() {
        busybox_tree(&root)?;
        fs::copy(std::env::current_exe()?, root.join("lab-bench"))?;
        for number in 0..DIRECTORIES {
            let below = root.join(format!("files/directory-{number}"));
            fs::create_dir_all(&below)?;
            for number in 0..FILES {
                fs::write(below.join(format!("file-{number}")), "text\n")?;
            }
        }
    }
    let root = root.to_str().ok_or("a temporary directory")?.to_owned();
    let options = ["--rm", PATH[0], PATH[1], "--rootfs", &root];
    repeat(|| read_times(&mut ctr_run(runtime, NAME, &options, &["/lab-bench", FIND, "/files"])?))
}

/// In a container: looks at each file of a tree, twice, and prints how many nanoseconds each time took.
pub(crate) fn find_twice(directory: &Path) -> Result {
    for _ in 0..2 {
        let start = Instant::now();
        let found = count(directory)?;
        println!("{}", start.elapsed().as_nanos());
        ensure(found == DIRECTORIES * FILES, || format!("{found} files"))?;
    }
    Ok(())
}

fn count(directory: &Path) -> Result<usize> {
    let mut files = 0;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        files += if fs::symlink_metadata(&path)?.is_dir() { count(&path)? } else { 1 };
    }
    Ok(files)
}

/// What each of the further ones costs the host.
fn idle(runtime: &str) -> Result<u64> {
    let start = |numbers: Range<u64>| -> Result<Vec<Container>> {
        let started = numbers.map(|number| sleeper(runtime, &format!("idle-{number}"))).collect();
        sleep(SETTLE);
        started
    };
    let mut containers = start(FIRST)?;
    let before = available()?;
    containers.extend(start(FURTHER)?);
    let each = before.saturating_sub(available()?) / (FURTHER.end - FURTHER.start);
    for container in &containers {
        end(container)?;
    }
    Ok(each)
}

/// Resident memory of the shim of a container that does nothing, in bytes.
fn shim(runtime: &str) -> Result<u64> {
    let container = sleeper(runtime, NAME)?;
    sleep(SETTLE);
    let program = match runtime {
        RUNC => "containerd-shim-runc-v2",
        _ => "containerd-shim-bulkhead-v2",
    };
    let mut shims = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        // A process that ends meanwhile has no program.
        let runs = fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe.ends_with(program));
        if let (true, Ok(pid)) = (runs, entry.file_name().to_string_lossy().parse()) {
            shims.push(pid);
        }
    }
    ensure(shims.len() == 1, || format!("{} shims instead of one", shims.len()))?;
    let status = proc_file(shims[0], "status")?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
    let kib: u64 = resident.ok_or("the shim has no VmRSS")?.parse()?;
    end(&container)?;
    Ok(kib * 1024)
}
