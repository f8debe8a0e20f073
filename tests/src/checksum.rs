//! Checksums by the host's own tools.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::vm::Result;

/// The MD5 of some bytes, in hexadecimal.
pub fn md5_hex(bytes: &[u8]) -> Result<String> {
    let mut child = Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().ok_or("no standard input")?.write_all(bytes)?;
    let output = child.wait_with_output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}
