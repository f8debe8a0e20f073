//! Messages on standard error, which the owner shows when the VMM has ended without a word on its control socket.

use std::fmt::Arguments;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU32, Ordering};

/// Complaints in a VMM's life. The guest causes them: they must not fill the owner's pipe, nor crowd out the message of a panic.
const COMPLAINTS_MAX: u32 = 8;

/// Writes one line, unless there have been [`COMPLAINTS_MAX`]. It never fails and never waits: the owner's pipe does not block.
pub fn complain(message: Arguments<'_>) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    write(&COUNT, &mut io::stderr().lock(), message);
}

fn write(count: &AtomicU32, output: &mut impl Write, message: Arguments<'_>) {
    let more = |count: u32| (count < COMPLAINTS_MAX).then_some(count + 1);
    if count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok() {
        // `eprintln!` would panic where nobody reads. One write, so that lines of two threads do not mix.
        let _ = output.write_all(format!("bulkhead-vmm: {message}\n").as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Full;

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::WouldBlock.into())
        }
    }

    #[test]
    fn complaints_are_bounded_and_a_full_pipe_does_no_harm() {
        let count = AtomicU32::new(0);
        write(&count, &mut Full, format_args!("lost"));
        let mut output = Vec::new();
        for number in 0..100 {
            write(&count, &mut output, format_args!("disk {number}"));
        }
        let lines = String::from_utf8(output).unwrap();
        assert_eq!(lines.lines().count(), 7);
        assert!(lines.starts_with("bulkhead-vmm: disk 0\nbulkhead-vmm: disk 1\n"), "{lines}");
    }
}
