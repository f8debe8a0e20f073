//! Reading a large file of an image, beside crun's container reading it from tmpfs.

use std::fs::File;
use std::hint::black_box;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::bulkhead::bulkhead;
use bulkhead_tests::vm::Result;

use crate::crun::Bundle;
use crate::image::{DATA, HELPER, NAME};
use crate::repeat::{repeat, stdout_of};
use crate::report::{Bar, Row};

/// The first argument that makes this program the one that reads in the containers.
pub(crate) const VERB: &str = "read";

/// Its last argument when it is to use memory first, so that the host has given the guest what the file is read into.
pub(crate) const USED: &str = "used";

/// More than the file, in bytes.
const USED_MEMORY: usize = 384 << 20;
/// As much as `cat` reads at once, in bytes.
const BUFFER: usize = 128 << 10;

/// And when it is to read as much at once as one request to a file server asks for.
pub(crate) const LARGE: &str = "large";

/// Bytes then.
const LARGE_BUFFER: usize = 1 << 20;

pub(crate) fn measure(bundle: &Bundle) -> Result<Vec<Row>> {
    let program = [HELPER, VERB, DATA];
    let crun = repeat(|| read_times(&mut bundle.run(&[], &program)?))?;
    let words = [&["run", "--rm", NAME, "--"], &program[..]].concat();
    let own = repeat(|| read_times(&mut bulkhead(&words)))?;
    let used_words = [&words[..], &[USED]].concat();
    let used = repeat(|| read_times(&mut bulkhead(&used_words)))?;
    let pick = |runs: &[[Duration; 2]], which: usize| runs.iter().map(|run| run[which]).collect::<Vec<_>>();
    let row = |name, runs, which| Row::ms(name, &pick(runs, which)).beside("crun", &pick(&crun, which));
    Ok(vec![
        row("read 256 MiB of an image, guest's cache cold", &own, 0).bar(Bar::TimesPeer(2.0)),
        row("  into memory that the guest has used before", &used, 0),
        row("read 256 MiB of an image, guest's cache warm", &own, 1).bar(Bar::TimesPeer(1.05)),
    ])
}

/// What the reader in a container says.
pub(crate) fn read_times(command: &mut Command) -> Result<[Duration; 2]> {
    let text = stdout_of(command)?;
    let times =
        text.lines().map(|line| Ok(Duration::from_nanos(line.parse()?))).collect::<Result<Vec<_>>>()?;
    times.try_into().map_err(|_| format!("two times expected, not {text:?}").into())
}

/// In a container: reads the file twice and prints how many nanoseconds each time took.
pub(crate) fn read_twice(path: &Path, how: &[String]) -> Result {
    let asked = |word: &str| how.iter().any(|given| given == word);
    if asked(USED) {
        // Not zero, which would be the kernel's own page.
        drop(black_box(vec![1u8; USED_MEMORY]));
    }
    // Not zero, so that its pages are there before the clock runs.
    let mut buffer = vec![1; if asked(LARGE) { LARGE_BUFFER } else { BUFFER }];
    for _ in 0..2 {
        let start = Instant::now();
        let mut file = File::open(path)?;
        while file.read(&mut buffer)? > 0 {}
        println!("{}", start.elapsed().as_nanos());
    }
    Ok(())
}
