//! Connections that carry one standard stream of a process in the guest.

use std::io;
use std::path::Path;
use std::time::Duration;

use bulkhead_protocol::limits::{STREAM_CONNECT_TIMEOUT_S, STREAM_PORT};
use bulkhead_protocol::stream::{HeaderError, StreamHeader};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::vsock;

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// An id that no header can carry.
    #[error("cannot name the stream")]
    Header(#[from] HeaderError),
    /// No connection.
    #[error("cannot connect to a stream of the guest")]
    Connect(#[from] io::Error),
    /// The VMM did not connect in time.
    #[error("the guest does not take a stream connection within {STREAM_CONNECT_TIMEOUT_S} s")]
    Timeout,
}

/// Connects to the stream that `header` names; from here on it carries bytes.
///
/// # Errors
/// [`StreamError`] when the guest cannot be reached. A stream that the guest does not have ends at once.
pub async fn open(socket: &Path, header: &StreamHeader) -> Result<UnixStream, StreamError> {
    let header = header.encode()?;
    let connecting = async {
        let mut stream = vsock::connect(socket, STREAM_PORT).await?;
        stream.write_all(&header).await?;
        Ok(stream)
    };
    timeout(Duration::from_secs(STREAM_CONNECT_TIMEOUT_S), connecting)
        .await
        .map_err(|_| StreamError::Timeout)?
}
