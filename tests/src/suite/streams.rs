//! Standard streams: every byte arrives, in order, however slowly it is taken, and ends are passed on.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use bulkhead_tests::bulkhead::{bulkhead, expect_code, image, run_command, stderr, stdout};
use bulkhead_tests::checksum::md5_hex;
use bulkhead_tests::vm::{Result, artifact, ensure};
use libtest_mimic::Trial;

use crate::{soak, trial};

const MIB: usize = 1 << 20;
/// What the guest repeats.
const SEED: usize = 8 * MIB;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("streams: standard input arrives whole and ends where it ends", || input(8 * MIB)),
        soak("streams: 100 MiB of standard input arrive whole", || input(100 * MIB)),
        trial("streams: a slow reader gets every byte of the output", || slow_reader(1)),
        soak("streams: a slow reader gets every byte of 1 GiB", || slow_reader(128)),
        trial("streams: an output that nobody reads ends the command", unread),
        trial("streams: a reader that has seen enough ends the pipeline", head),
    ]
}

/// Bytes of which no part is like another.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        // Marsaglia's xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    });
    words.take(length / size_of::<u64>()).flat_map(u64::to_le_bytes).collect()
}

fn input(length: usize) -> Result {
    let bytes = noise(length);
    let mut child =
        run_command(&["-i"], &["md5sum"])?.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().ok_or("no standard input")?.write_all(&bytes)?;
    let output = child.wait_with_output()?;
    expect_code(&output, 0)?;
    let expected = md5_hex(&bytes)?;
    ensure(stdout(&output).starts_with(&expected), || format!("{} instead of {expected}", stdout(&output)))
}

fn slow_reader(rounds: usize) -> Result {
    let seed = noise(SEED);
    let script = format!("cat >/tmp/seed; for n in $(seq {rounds}); do echo round $n; cat /tmp/seed; done");
    let mut command = run_command(&["-i"], &["sh", "-c", &script])?;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    child.stdin.take().ok_or("no standard input")?.write_all(&seed)?;
    let mut stdout = child.stdout.take().ok_or("no standard output")?;
    // By then all that can hold something on the way is full, and the writer stands still.
    std::thread::sleep(Duration::from_secs(2));
    let read = read_rounds(&mut stdout, &seed, rounds);
    drop(stdout);
    let output = child.wait_with_output()?;
    read.map_err(|error| format!("{error}; {}: {}", output.status, stderr(&output)))?;
    expect_code(&output, 0)
}

/// Reads the seed as often as it should come, in pieces that are no multiple of anything, and with pauses.
fn read_rounds(stdout: &mut impl Read, seed: &[u8], rounds: usize) -> Result {
    for round in 1..=rounds {
        let mut head = vec![0; format!("round {round}\n").len()];
        stdout.read_exact(&mut head).map_err(|error| format!("before round {round}: {error}"))?;
        ensure(head == format!("round {round}\n").as_bytes(), || format!("before round {round}: {head:?}"))?;
        let mut piece = vec![0; 65_521];
        for (number, expected) in seed.chunks(piece.len()).enumerate() {
            let piece = &mut piece[..expected.len()];
            stdout.read_exact(piece).map_err(|error| format!("piece {number} of round {round}: {error}"))?;
            ensure(piece == expected, || format!("piece {number} of round {round} differs"))?;
            if number % 32 == 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest)?;
    ensure(rest.is_empty(), || format!("{} bytes too many", rest.len()))
}

fn unread() -> Result {
    let mut child = run_command(&[], &["yes"])?.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    drop(child.stdout.take());
    let output = child.wait_with_output()?;
    ensure(!output.status.success(), || format!("{}", output.status))?;
    ensure(!stderr(&output).contains("internal error"), || stderr(&output))
}

fn head() -> Result {
    image("busybox")?;
    // The environment of the launcher, on a shell that makes the pipe.
    let launcher = bulkhead::<&str>([]);
    let mut shell = Command::new("sh");
    for (name, value) in launcher.get_envs() {
        shell.env(name, value.unwrap_or_default());
    }
    let pipeline = "\"$0\" run --rm busybox:1 -- yes 'a line' | head -n 1";
    let output = shell.arg("-c").arg(pipeline).arg(artifact("bin/bulkhead")).output()?;
    expect_code(&output, 0)?;
    ensure(output.stdout == b"a line\n", || stdout(&output))?;
    ensure(!stderr(&output).contains("internal error"), || stderr(&output))
}
