//! The output of a container as it is kept: one line per line of output, in the format of Kubernetes' container runtime
//! interface.
//!
//! ```text
//! 2026-01-31T12:00:00.123456789Z stdout F a whole line
//! 2026-01-31T12:00:00.123456789Z stderr P the beginning of a line that goes on, or was never ended
//! ```
//!
//! The log is bounded: what is full moves to `log.1`, and the former `log.1` is forgotten.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bulkhead_protocol::stream::Stream;

/// Size at which a log file is full, in bytes.
const FILE_MAX: u64 = 16 << 20;
/// Longest piece of output on one line, in bytes.
const PIECE_MAX: usize = 16 << 10;
/// The file that is written.
pub(crate) const CURRENT: &str = "log";
/// The file before it.
pub(crate) const PREVIOUS: &str = "log.1";

/// Writes a container's log.
#[derive(Debug)]
pub(crate) struct LogWriter {
    directory: PathBuf,
    file: BufWriter<File>,
    written: u64,
    limit: u64,
}

impl LogWriter {
    /// An empty log in a directory.
    pub(crate) fn create(directory: &Path) -> io::Result<Self> {
        Ok(Self { directory: directory.to_owned(), file: open(directory)?, written: 0, limit: FILE_MAX })
    }

    /// Appends output as it came.
    pub(crate) fn write(&mut self, stream: Stream, output: &[u8]) -> io::Result<()> {
        let time = humantime::format_rfc3339_nanos(SystemTime::now()).to_string();
        let name = if stream == Stream::Stderr { "stderr" } else { "stdout" };
        for line in output.split_inclusive(|byte| *byte == b'\n') {
            let (text, whole) = match line.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (line, false),
            };
            let mut pieces = text.chunks(PIECE_MAX).peekable();
            if text.is_empty() {
                self.append(&time, name, whole, b"")?;
            }
            while let Some(piece) = pieces.next() {
                self.append(&time, name, whole && pieces.peek().is_none(), piece)?;
            }
        }
        self.file.flush()
    }

    fn append(&mut self, time: &str, stream: &str, whole: bool, piece: &[u8]) -> io::Result<()> {
        let head = format!("{time} {stream} {} ", if whole { 'F' } else { 'P' });
        let length = (head.len() + piece.len() + 1) as u64;
        if self.written + length > self.limit {
            self.file.flush()?;
            match fs::rename(self.directory.join(CURRENT), self.directory.join(PREVIOUS)) {
                // It has moved already, but then no new one could be opened.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                moved => moved?,
            }
            self.file = open(&self.directory)?;
            self.written = 0;
        }
        self.file.write_all(head.as_bytes())?;
        self.file.write_all(piece)?;
        self.file.write_all(b"\n")?;
        self.written += length;
        Ok(())
    }
}

fn open(directory: &Path) -> io::Result<BufWriter<File>> {
    let file =
        File::options().write(true).create(true).truncate(true).mode(0o600).open(directory.join(CURRENT))?;
    Ok(BufWriter::new(file))
}

/// One line of a log: the stream and the output as it came. `None` for a line that is not from a log.
pub(crate) fn parse(line: &[u8]) -> Option<(Stream, Vec<u8>)> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let (_time, stream, tag, text) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let stream = match stream {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    let mut output = text.to_vec();
    match tag {
        b"F" => output.push(b'\n'),
        b"P" => {}
        _ => return None,
    }
    Some((stream, output))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn replay(content: &[u8]) -> Vec<(Stream, Vec<u8>)> {
        content
            .strip_suffix(b"\n")
            .unwrap_or_default()
            .split(|byte| *byte == b'\n')
            .filter_map(parse)
            .collect()
    }

    #[test]
    fn a_full_log_keeps_what_came_last() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogWriter::create(dir.path()).unwrap();
        log.limit = 1000;
        for n in 0..100 {
            log.write(Stream::Stdout, format!("line {n}\n").as_bytes()).unwrap();
        }
        let current = fs::read(dir.path().join(CURRENT)).unwrap();
        let previous = fs::read(dir.path().join(PREVIOUS)).unwrap();
        assert!(current.len() <= 1000 && previous.len() <= 1000 && previous.len() > 900);
        let mut lines = replay(&previous);
        lines.extend(replay(&current));
        let first = 100 - lines.len();
        for (n, (_, line)) in lines.into_iter().enumerate() {
            assert_eq!(line, format!("line {}\n", first + n).as_bytes());
        }
    }

    #[test]
    fn a_log_comes_back_after_no_new_file_could_be_opened() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = LogWriter::create(dir.path()).unwrap();
        log.limit = 1;
        fs::rename(dir.path().join(CURRENT), dir.path().join(PREVIOUS)).unwrap();
        log.write(Stream::Stdout, b"back\n").unwrap();
        assert_eq!(
            replay(&fs::read(dir.path().join(CURRENT)).unwrap()),
            [(Stream::Stdout, b"back\n".to_vec())]
        );
    }

    #[test]
    fn lines_that_are_not_a_log_are_passed_over() {
        for line in [&b""[..], b"x", b"t stdout F", b"t stdin F x", b"t stdout Q x"] {
            assert_eq!(parse(line), None);
        }
    }

    #[test]
    fn a_long_line_is_kept_in_pieces_that_join_again() {
        let dir = tempfile::tempdir().unwrap();
        let line = [vec![b'x'; 2 * PIECE_MAX + 5], b"\n".to_vec()].concat();
        LogWriter::create(dir.path()).unwrap().write(Stream::Stdout, &line).unwrap();
        let pieces = replay(&fs::read(dir.path().join(CURRENT)).unwrap());
        assert_eq!(pieces.len(), 3);
        assert_eq!(pieces.into_iter().flat_map(|(_, piece)| piece).collect::<Vec<_>>(), line);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_was_written_is_replayed_byte_for_byte(
            outputs in proptest::collection::vec(
                (any::<bool>(), proptest::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 1..300)), 1..5)
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut log = LogWriter::create(dir.path()).unwrap();
            let mut expected = [Vec::new(), Vec::new()];
            for (error, output) in outputs {
                log.write(if error { Stream::Stderr } else { Stream::Stdout }, &output).unwrap();
                expected[usize::from(error)].extend(output);
            }
            let mut actual = [Vec::new(), Vec::new()];
            for (stream, output) in replay(&fs::read(dir.path().join(CURRENT)).unwrap()) {
                actual[usize::from(stream == Stream::Stderr)].extend(output);
            }
            prop_assert_eq!(actual, expected);
        }
    }
}
