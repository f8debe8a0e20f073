//! The agent's log: `tracing` events written to `/dev/kmsg`, one record each, where the guest's console shows them.
//!
//! Quiet by default: only the agent's own warnings and errors, unless the kernel command line has `bulkhead.log=LEVEL`.
//! A worker also copies errors into a pipe, from where they become part of its answer: libcontainer's errors say less
//! than its log.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::str::FromStr as _;
use std::sync::OnceLock;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// The kernel refuses a longer record (`LOG_LINE_MAX` less the prefix).
const RECORD_MAX: usize = 900;

/// Where a worker's errors go besides the kernel's log.
static ERRORS: OnceLock<File> = OnceLock::new();

/// Begins to log. Without `/dev/kmsg` nothing is logged: there is nowhere to say so either.
pub(crate) fn init(level: LevelFilter) {
    let Ok(kmsg) = File::options().write(true).open("/dev/kmsg") else { return };
    // Fails only when a subscriber is there already, which then goes on.
    let _ = tracing::subscriber::set_global_default(KernelLog { kmsg, level });
}

/// The level that a kernel command line asks for with `bulkhead.log=`; an unknown word is the default.
pub(crate) fn level_of(command_line: &str) -> LevelFilter {
    command_line
        .split_ascii_whitespace()
        .find_map(|word| word.strip_prefix("bulkhead.log="))
        .and_then(|level| LevelFilter::from_str(level).ok())
        .unwrap_or(LevelFilter::WARN)
}

/// From here on this process, and those forked from it, copy errors to `pipe`, which never blocks them.
pub(crate) fn copy_errors_to(pipe: OwnedFd) {
    let _ = ERRORS.set(File::from(pipe));
}

struct KernelLog {
    kmsg: File,
    level: LevelFilter,
}

impl KernelLog {
    /// What libraries say is for whoever asks for more than the default: their errors are answered to the host.
    fn shows(&self, metadata: &Metadata<'_>) -> bool {
        let own = metadata.target().starts_with(env!("CARGO_CRATE_NAME"));
        metadata.level() <= &self.level && (own || self.level >= LevelFilter::INFO)
    }
}

impl Subscriber for KernelLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.shows(metadata) || (*metadata.level() == Level::ERROR && ERRORS.get().is_some())
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        let level = *event.metadata().level();
        if self.shows(event.metadata()) {
            let mut record = format!("<{}>bulkhead-agent: {}", priority(level), text.0);
            truncate(&mut record, RECORD_MAX);
            // Nobody could be told.
            let _ = (&self.kmsg).write(record.as_bytes());
        }
        if level == Level::ERROR
            && let Some(mut pipe) = ERRORS.get()
        {
            text.0.push('\n');
            let _ = pipe.write(text.0.as_bytes());
        }
    }

    // Spans carry nothing that this log shows.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// syslog(2)'s number for a level.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

fn truncate(text: &mut String, max: usize) {
    if text.len() > max {
        let end = (0..=max).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        text.truncate(end);
    }
}

/// An event on one line: its message, then `name=value` of every other field.
#[derive(Default)]
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if !self.0.is_empty() {
            self.0.push(' ');
        }
        let written = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, "{name}={value:?}"),
        };
        // Writing to a String cannot fail.
        debug_assert!(written.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_sets_the_level() {
        assert_eq!(level_of("quiet bulkhead.log=debug ro"), LevelFilter::DEBUG);
        assert_eq!(level_of("quiet ro"), LevelFilter::WARN);
        assert_eq!(level_of("bulkhead.log=shout"), LevelFilter::WARN);
    }

    #[test]
    fn a_long_record_is_cut_between_characters() {
        let mut text = "aé".repeat(10);
        truncate(&mut text, 5);
        assert_eq!(text, "aéa");
    }
}
