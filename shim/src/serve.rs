//! The shim while it serves.

use std::env;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, timeout, timeout_at};
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::address::Address;
use crate::args::Args;
use crate::daemon;
use crate::events::{Destination, Publisher, forward};
use crate::service::services;
use crate::shim::Shim;
use crate::task::Task;

/// containerd's name for the socket that takes events. CRI-O has none.
const EVENTS_VARIABLE: &str = "TTRPC_ADDRESS";
/// The unit of the time between two tries to send an event.
const EVENTS_PAUSE: Duration = Duration::from_secs(1);
/// How long a shim that ends waits for its last events to be taken.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a shim that ends waits for threads that wait for the kernel.
const BLOCKING_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a shim that ends waits for its turn to clean up: longer than a `delete` takes.
const TURN_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a shim that is terminated waits for the ends of its containers.
const END_TIMEOUT: Duration = Duration::from_secs(3);
/// How long it waits for what they wrote to be on the disks of the host. A host that is shut down may have no more time than this.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves until containerd says that it is enough. `listener` and `lock`, by which others know that it lives, have been inherited.
pub(crate) fn serve(args: &Args, listener: UnixListener, lock: OwnedFd) -> io::Result<()> {
    // One thread: containers are many, and what the shim has to do is little.
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let served = runtime.block_on(run(args, listener, lock));
    // A write to a slow disk is not waited for, only what removes the cgroup of a machine whose making was given up.
    runtime.shutdown_timeout(BLOCKING_TIMEOUT);
    served
}

async fn run(args: &Args, listener: UnixListener, lock: OwnedFd) -> io::Result<()> {
    let mut address = Address::of(&args.address, &args.namespace, &args.id, None);
    if let Some(socket) = listener.local_addr()?.as_pathname() {
        socket.clone_into(&mut address.socket);
    }
    let (publisher, queue) = Publisher::new();
    let events = env::var_os(EVENTS_VARIABLE).filter(|address| !address.is_empty()).map(PathBuf::from);
    let namespace = args.namespace.clone();
    tokio::spawn(forward(queue, Destination { socket: events, namespace, pause: EVENTS_PAUSE }));
    let shim = Arc::new(Shim::new(args.namespace.clone(), address.directory.clone(), publisher.clone()));

    let listener = Listener::from(tokio::net::UnixListener::from_std(listener)?);
    let mut server = Server::new().add_listener(listener).register_service(services(&shim));
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    server.start().await.map_err(io::Error::other)?;
    tracing::debug!(id = args.id, "the shim serves");
    tokio::select! {
        () = shim.is_shut_down() => {}
        _ = term.recv() => end_all(&shim).await,
        _ = int.recv() => end_all(&shim).await,
    }
    // Whoever comes from now on shall start another shim.
    let _ = fs::remove_file(&address.socket);
    if timeout(FLUSH_TIMEOUT, publisher.flush()).await.is_err() {
        tracing::warn!("the last events are lost: containerd does not take them");
    }
    // The answer to Shutdown goes out before the connections are closed.
    server.shutdown().await.map_err(io::Error::other)?;
    let machine = shim.machine.lock().await.take();
    if let Some(machine) = machine {
        machine.end("its shim ends").await;
        machine.gone().await;
    }
    // To others it is gone from here on. A `start` or a `delete` whose turn it is goes on with the directory or removes it, or has looked
    // before, and its turn ends soon.
    drop(lock);
    daemon::abandon(&address, std::time::Instant::now() + TURN_TIMEOUT);
    Ok(())
}

/// Ends all containers, and has their ends told.
async fn end_all(shim: &Shim) {
    tracing::warn!("the shim is terminated: its containers end");
    let deadline = Instant::now() + WRITE_TIMEOUT;
    let tasks = shim.tasks();
    let writing = |task: &&Arc<Task>| task.machine().is_ok_and(|machine| machine.pod().holds_back(&task.id));
    let writing: Vec<_> = tasks.iter().filter(writing).collect();
    for task in &writing {
        // An error is one of a container that has ended.
        let _ = shim.kill(&task.id, "", Signal::KILL.as_raw().unsigned_abs(), true).await;
    }
    for task in writing {
        let _ = timeout_at(deadline, task.init.stopped()).await;
        // Its output may be read by nobody any more, and is not to hold up its writes.
        task.init.detach();
        let _ = timeout_at(deadline, task.released()).await;
    }
    let deadline = Instant::now() + END_TIMEOUT;
    for task in tasks {
        task.kill();
        if let Ok(machine) = task.machine() {
            machine.end("its shim was terminated").await;
        }
        let _ = timeout_at(deadline, task.init.stopped()).await;
    }
}
