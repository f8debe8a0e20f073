//! The log: lines of logfmt on the fifo of the bundle, which containerd copies to its own log as they are.

use std::fmt::{self, Write as _};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::SystemTime;

use rustix::fs::{Mode, OFlags, open};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Name of the fifo in a bundle.
const FIFO: &str = "log";

/// Makes the fifo of a bundle the standard error, and the log go there. Without a fifo, nothing is logged.
///
/// It is opened for reading too: so it can be opened when nobody reads, as while containerd is restarted, and writing to it is no
/// broken pipe then. It never blocks: a line that it has no room for is lost.
pub(crate) fn to_fifo(bundle: &Path, debug: bool) {
    if let Ok(fifo) = open_fifo(&bundle.join(FIFO)) {
        // Standard error stays what it is, which is /dev/null.
        let _ = rustix::stdio::dup2_stderr(&fifo);
    }
    let level = if debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
    // It can only fail when there is a log already.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .event_format(Logfmt)
        .with_writer(|| Lossy(io::stderr()))
        .try_init();
    std::panic::set_hook(Box::new(|info| tracing::error!("internal error, please report it: {info}")));
}

/// A log that loses what it has no room for. An error would be told on standard error, where that panics when it is the same fifo.
struct Lossy<W>(W);

impl<W: Write> Write for Lossy<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let _ = self.0.write_all(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn open_fifo(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = std::fs::File::from(open(path, flags, Mode::empty())?);
    if file.metadata()?.file_type().is_fifo() {
        Ok(file.into())
    } else {
        Err(io::Error::other("the log is no fifo"))
    }
}

/// `time="..." level=info msg="..." key=value`, as containerd writes it itself.
struct Logfmt;

impl<S, N> FormatEvent<S, N> for Logfmt
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let time = humantime::format_rfc3339_nanos(SystemTime::now());
        let mut fields = Fields::default();
        event.record(&mut fields);
        writeln!(writer, "time=\"{time}\" level={level} msg={}{}", quoted(&fields.message), fields.others)
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = text;
        } else {
            // Writing to a string does not fail.
            let _ = write!(self.others, " {}={}", field.name(), quoted(&text));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

/// A value, in quotes if it needs them, and on one line whatever it holds.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._/@^+:".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.to_owned() } else { format!("{text:?}") }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_record_is_one_line_of_logfmt_whatever_it_says() {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let log = tracing_subscriber::fmt().event_format(Logfmt).with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(log, || {
            tracing::warn!(id = "a", why = %"two\nlines", count = 3, "it \"happened\"");
        });
        let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        let (time, rest) = text.split_once(' ').unwrap();
        assert!(time.starts_with("time=\"2") && time.ends_with("Z\""), "{time}");
        assert_eq!(rest, "level=warning msg=\"it \\\"happened\\\"\" id=a why=\"two\\nlines\" count=3\n");
    }

    #[test]
    fn a_log_that_is_full_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FIFO);
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
        let mut fifo = std::fs::File::from(open_fifo(&path).unwrap());
        let line = [b'x'; 1000];
        while fifo.write(&line).is_ok() {}
        assert_eq!(Lossy(fifo).write(&line).unwrap(), line.len());
    }

    #[test]
    fn a_log_that_is_no_fifo_is_not_opened() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FIFO);
        std::fs::write(&path, "").unwrap();
        assert!(open_fifo(&path).is_err());
        std::fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
            .unwrap();
        // Although nobody reads.
        let fifo = open_fifo(&path).unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(open_fifo(&link).is_err());
        drop(fifo);
    }
}
