//! The header that opens a stream connection on [`STREAM_PORT`](crate::limits::STREAM_PORT), after which it carries bytes
//! and nothing else.
//!
//! ```text
//! 0        4        5          6         7
//! | "BHS1" | stream | id bytes | exec id | container id ... | exec id ... |
//! |        |        |   n      | bytes m |     n bytes      |   m bytes   |
//! ```
//!
//! The host opens the connection and sends the header at once. Nothing answers it: a stream that cannot be had is closed.

use crate::limits::{ID_MAX, is_valid_id};

const MAGIC: [u8; 4] = *b"BHS1";
/// Length of the part before the two ids.
pub const PREFIX_LEN: usize = 7;

/// Which of a process's standard streams a connection carries. With a terminal, input and resize go to the pseudoterminal
/// through [`Stdin`](Stream::Stdin), all output comes through [`Stdout`](Stream::Stdout).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Stream {
    /// Host to guest. `SHUTDOWN(SEND)` of the host is end of file for the process.
    Stdin = 0,
    /// Guest to host.
    Stdout = 1,
    /// Guest to host.
    Stderr = 2,
}

/// Whose stream a connection is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamHeader {
    /// Which stream.
    pub stream: Stream,
    /// The container.
    pub container_id: String,
    /// The exec, or empty for the container's init.
    pub exec_id: String,
}

/// Why a header was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HeaderError {
    /// The first bytes are not those of a header.
    #[error("not a stream header: it does not begin with BHS1")]
    Magic,
    /// No such stream.
    #[error("unknown stream {0}")]
    Stream(u8),
    /// An id is too long, empty or holds characters that ids may not.
    #[error("the stream header names an invalid id")]
    Id,
}

impl StreamHeader {
    /// The header as it is sent.
    ///
    /// # Errors
    /// [`HeaderError::Id`] when an id is not valid.
    pub fn encode(&self) -> Result<Vec<u8>, HeaderError> {
        self.check_ids()?;
        let (id, exec) = (self.container_id.as_bytes(), self.exec_id.as_bytes());
        let length = |id: &[u8]| u8::try_from(id.len()).map_err(|_| HeaderError::Id);
        let mut out = Vec::with_capacity(PREFIX_LEN + id.len() + exec.len());
        out.extend(MAGIC);
        out.extend([self.stream as u8, length(id)?, length(exec)?]);
        out.extend(id);
        out.extend(exec);
        Ok(out)
    }

    /// Reads the first [`PREFIX_LEN`] bytes: the stream, and the lengths of the two ids that follow.
    ///
    /// # Errors
    /// [`HeaderError`] when these are not the first bytes of a header.
    pub fn decode_prefix(prefix: [u8; PREFIX_LEN]) -> Result<(Stream, usize, usize), HeaderError> {
        let [m0, m1, m2, m3, stream, id, exec] = prefix;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(HeaderError::Magic);
        }
        let stream = match stream {
            0 => Stream::Stdin,
            1 => Stream::Stdout,
            2 => Stream::Stderr,
            other => return Err(HeaderError::Stream(other)),
        };
        let (id, exec) = (usize::from(id), usize::from(exec));
        if id == 0 || id > ID_MAX || exec > ID_MAX {
            return Err(HeaderError::Id);
        }
        Ok((stream, id, exec))
    }

    /// Joins the prefix with the two ids.
    ///
    /// # Errors
    /// [`HeaderError::Id`] when an id is not valid.
    pub fn from_parts(stream: Stream, container_id: Vec<u8>, exec_id: Vec<u8>) -> Result<Self, HeaderError> {
        let text = |bytes| String::from_utf8(bytes).map_err(|_| HeaderError::Id);
        let header = Self { stream, container_id: text(container_id)?, exec_id: text(exec_id)? };
        header.check_ids()?;
        Ok(header)
    }

    fn check_ids(&self) -> Result<(), HeaderError> {
        let exec_ok = self.exec_id.is_empty() || is_valid_id(&self.exec_id);
        if is_valid_id(&self.container_id) && exec_ok { Ok(()) } else { Err(HeaderError::Id) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decode(bytes: &[u8]) -> Result<StreamHeader, HeaderError> {
        let prefix = bytes[..PREFIX_LEN].try_into().unwrap();
        let (stream, id, exec) = StreamHeader::decode_prefix(prefix)?;
        let rest = &bytes[PREFIX_LEN..];
        if rest.len() != id + exec {
            return Err(HeaderError::Id);
        }
        StreamHeader::from_parts(stream, rest[..id].to_vec(), rest[id..].to_vec())
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(id in "[a-z0-9][a-z0-9_.-]{0,127}", exec in "([a-z0-9][a-z0-9_.-]{0,127})?", n in 0u8..3) {
            let stream = [Stream::Stdin, Stream::Stdout, Stream::Stderr][usize::from(n)];
            let header = StreamHeader { stream, container_id: id, exec_id: exec };
            prop_assert_eq!(decode(&header.encode().unwrap()).unwrap(), header);
        }

        #[test]
        fn any_bytes_are_refused_or_hold_valid_ids(bytes in proptest::collection::vec(any::<u8>(), PREFIX_LEN..300)) {
            if let Ok(header) = decode(&bytes) {
                prop_assert!(is_valid_id(&header.container_id));
            }
        }
    }

    #[test]
    fn an_id_that_would_leave_a_directory_is_refused() {
        let header =
            StreamHeader { stream: Stream::Stdin, container_id: "../x".into(), exec_id: String::new() };
        assert_eq!(header.encode(), Err(HeaderError::Id));
    }
}
