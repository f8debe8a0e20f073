//! The agent's vsock ports. Only the host may connect: a container's process could reach them too, from within the guest.

use std::io;
use std::os::fd::{FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_core::Stream;
use tokio::sync::Semaphore;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use crate::descriptor::nonblocking;
use crate::lifecycle::Lifecycle;
use crate::streams;

/// Who may connect. A test without a virtual machine connects within one kernel.
const HOST: u32 =
    if cfg!(feature = "loopback") { tokio_vsock::VMADDR_CID_LOCAL } else { tokio_vsock::VMADDR_CID_HOST };
/// Connections whose header has not arrived, at a time; more wait to be accepted.
const PENDING_MAX: usize = 128;
/// How long a connection's header may take.
const HEADER_PATIENCE: Duration = Duration::from_secs(5);
/// How long to leave it alone when no connection can be accepted, as when descriptors are used up.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Listens on a port, on every address that the guest may have.
///
/// # Errors
/// When the kernel has no vsock.
pub(crate) fn listen(port: u32) -> io::Result<VsockListener> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
}

/// The host's connections to a listener.
pub(crate) struct FromHost(pub(crate) VsockListener);

impl Stream for FromHost {
    type Item = io::Result<VsockStream>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            let (connection, peer) = ready!(self.0.poll_accept(context))?;
            if peer.cid() == HOST {
                return Poll::Ready(Some(Ok(connection)));
            }
            tracing::warn!("a connection from within the guest was closed");
        }
    }
}

/// Serves the connections that carry standard streams, for ever.
pub(crate) async fn carry_streams(listener: VsockListener, lifecycle: Arc<Lifecycle>) {
    let pending = Arc::new(Semaphore::new(PENDING_MAX));
    loop {
        // Never closed, so there is always a permit to wait for.
        let Ok(permit) = Arc::clone(&pending).acquire_owned().await else { return };
        let (connection, peer) = match std::future::poll_fn(|context| listener.poll_accept_std(context)).await
        {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::error!("accept a stream: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if peer.cid() != HOST {
            tracing::warn!("a connection from within the guest was closed");
            continue;
        }
        // SAFETY: the descriptor was the connection's and is nobody's now.
        let connection = unsafe { OwnedFd::from_raw_fd(connection.into_raw_fd()) };
        let lifecycle = Arc::clone(&lifecycle);
        tokio::spawn(async move {
            let connection = nonblocking(connection)?;
            let header = tokio::time::timeout(HEADER_PATIENCE, streams::header(&connection)).await??;
            drop(permit);
            // A stream that cannot be had is closed without a word.
            if let Ok(process) = lifecycle.table.process(&header.container_id, &header.exec_id) {
                process.streams.carry(header.stream, connection).await;
            }
            io::Result::Ok(())
        });
    }
}
