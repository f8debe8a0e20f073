//! The guest's console as its owner keeps it: a memfd that outlives the VMM, and its last lines made fit for a terminal.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use bulkhead_protocol::limits::ERROR_TEXT_MAX;
use bulkhead_vmm::console_ring::{FILE_SIZE, read};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// Longest line that is shown, in bytes; the rest of it is left out.
const LINE_MAX: usize = 400;
/// How the kernel begins to say why it panics. The stack that follows may be longer than what is shown.
const PANIC: &[u8] = b"Kernel panic - not syncing: ";

/// The guest's console.
#[derive(Debug)]
pub struct Console(File);

impl Console {
    /// An empty console.
    ///
    /// # Errors
    /// When the process or the system is out of descriptors or memory.
    pub fn new() -> io::Result<Self> {
        let file: File = memfd_create("console", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into();
        file.set_len(FILE_SIZE as u64)?;
        // A VMM that has been taken over must not make the owner's reads fault or grow.
        fcntl_add_seals(file.as_fd(), SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(Self(file))
    }

    /// The file that the VMM writes to.
    pub fn file(&self) -> &File {
        &self.0
    }

    /// True when the guest has written something.
    pub fn has_output(&self) -> bool {
        read(&self.0).is_ok_and(|bytes| !bytes.is_empty())
    }

    /// The last `count` lines that are not empty, or the first of those from a panic on when they are more, with everything escaped
    /// that is not printable.
    pub fn tail(&self, count: usize) -> Vec<String> {
        last_lines(&read(&self.0).unwrap_or_default(), count)
    }
}

fn last_lines(bytes: &[u8], count: usize) -> Vec<String> {
    let lines =
        bytes.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii_end).filter(|line| !line.is_empty());
    let lines: Vec<&[u8]> = lines.collect();
    let is_panic = |line: &&[u8]| line.windows(PANIC.len()).any(|window| window == PANIC);
    let last = lines.len().saturating_sub(count);
    let start = lines.iter().position(is_panic).map_or(last, |panic| panic.min(last));
    lines.iter().skip(start).take(count).map(|line| escape(&line[..line.len().min(LINE_MAX)])).collect()
}

/// Text from the guest, made fit for a terminal: what is not printable ASCII appears as an escape sequence.
pub fn escape(bytes: &[u8]) -> String {
    let printable = |byte: &u8| byte.is_ascii_graphic() || *byte == b' ';
    bytes
        .iter()
        .flat_map(|byte| if printable(byte) { vec![*byte] } else { byte.escape_ascii().collect() })
        .map(char::from)
        .collect()
}

/// Words from the guest or the VMM, cut and made fit for a terminal.
pub(crate) fn excerpt(text: &str) -> String {
    escape(&text.as_bytes()[..text.len().min(ERROR_TEXT_MAX)])
}

#[cfg(test)]
mod tests {
    use bulkhead_vmm::console_ring::ConsoleRing;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_last_lines_are_shown_without_control_characters() {
        let console = Console::new().unwrap();
        assert!(!console.has_output());
        ConsoleRing::new(console.file()).unwrap().write(b"one\r\n\r\n\x1b[31mtwo\\\r\nthree\xff\n");
        assert!(console.has_output());
        assert_eq!(console.tail(2), ["\\x1b[31mtwo\\", "three\\xff"]);
    }

    #[test]
    fn a_panics_reason_is_shown_however_long_its_stack() {
        let console = Console::new().unwrap();
        let mut ring = ConsoleRing::new(console.file()).unwrap();
        ring.write(b"before\n[ 5.3] Kernel panic - not syncing: Out of memory\n");
        (0..30).for_each(|call| ring.write(format!(" ? call{call}\n").as_bytes()));
        ring.write(b"---[ end Kernel panic - not syncing: Out of memory ]---\n");
        let tail = console.tail(3);
        assert_eq!(tail, ["[ 5.3] Kernel panic - not syncing: Out of memory", " ? call0", " ? call1"]);
        assert_eq!(console.tail(40)[0], "before");
    }

    #[test]
    fn the_vmm_cannot_shrink_the_console_under_its_owner() {
        let console = Console::new().unwrap();
        assert!(console.file().set_len(0).is_err());
        assert!(console.file().set_len(1 << 30).is_err());
    }

    proptest! {
        #[test]
        fn nothing_unprintable_is_shown(bytes in proptest::collection::vec(any::<u8>(), 0..2000), count in 0usize..20) {
            let lines = last_lines(&bytes, count);
            prop_assert!(lines.len() <= count);
            prop_assert!(lines.iter().all(|line| line.len() <= 4 * LINE_MAX));
            prop_assert!(lines.iter().flat_map(|line| line.bytes()).all(|b| (0x20..0x7f).contains(&b)));
        }
    }
}
