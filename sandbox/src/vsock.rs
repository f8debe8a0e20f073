//! Connections to the guest: the VMM's Unix socket takes `CONNECT <port>` and answers `OK <number>`.

use std::io;
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Longest answer, in bytes, its line feed included.
const ANSWER_MAX: usize = 32;

/// Connects to a vsock port of the guest.
pub(crate) async fn connect(socket: &Path, port: u32) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::with_capacity(ANSWER_MAX);
    while !answer.ends_with(b"\n") {
        if answer.len() == ANSWER_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the VMM's answer to CONNECT is too long",
            ));
        }
        // The guest speaks only when it is spoken to, so nothing but the answer can come.
        let room = ANSWER_MAX - answer.len();
        if (&mut stream).take(room as u64).read_buf(&mut answer).await? == 0 {
            let message = "nothing in the guest listens there";
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, message));
        }
    }
    let number = answer.strip_prefix(b"OK ").and_then(|rest| rest.strip_suffix(b"\n"));
    match number {
        Some(digits) if !digits.is_empty() && digits.iter().all(u8::is_ascii_digit) => Ok(stream),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the VMM's answer to CONNECT is not OK and a number",
        )),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    async fn connect_to(answer: &'static [u8]) -> io::Result<UnixStream> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 13];
            stream.read_exact(&mut asked).await.unwrap();
            assert_eq!(&asked, b"CONNECT 1024\n");
            for byte in answer {
                // Whoever has read enough hangs up.
                if stream.write_all(&[*byte]).await.is_err() {
                    break;
                }
                tokio::task::yield_now().await;
            }
        });
        let connected = connect(&path, 1024).await;
        server.await.unwrap();
        connected
    }

    #[tokio::test]
    async fn a_connection_is_there_after_ok() {
        assert!(connect_to(b"OK 1073741824\n").await.is_ok());
    }

    #[tokio::test]
    async fn anything_else_is_an_error() {
        let error = connect_to(b"").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        for answer in [&b"OK \n"[..], b"NO 1\n", b"OK 1 2\n", b"OK 11111111111111111111111111111111111\n"] {
            assert_eq!(connect_to(answer).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }
}
