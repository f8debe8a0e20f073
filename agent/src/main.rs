//! The agent: PID 1 of a Bulkhead guest. It runs OCI containers for the host, which steers it over vsock.
//! `docs/protocol.md` says what the host may ask.

// std's own start-up opens /dev/null for descriptors that are closed and aborts when it cannot. The kernel opens no
// console for init when it has none, and /dev is empty until `boot` has mounted it: so the agent starts at C's `main`.
#![cfg_attr(not(test), no_main)]

mod boot;
mod cgroup;
mod container;
mod control;
mod descriptor;
mod fault;
mod guest;
mod lifecycle;
mod log;
mod network;
mod process;
mod rcu;
mod service;
mod status;
mod streams;
mod vsock;
mod zygote;

use std::sync::Arc;

use bulkhead_protocol::agent_ttrpc::create_agent;
use bulkhead_protocol::limits::{CONTROL_PORT, STREAM_PORT};
use rustix::time::ClockId;
use tokio_vsock::VsockListener;
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use lifecycle::Lifecycle;
use service::Service;

/// What the kernel starts.
#[cfg_attr(not(test), unsafe(no_mangle))]
#[cfg_attr(test, allow(dead_code))]
extern "C" fn main(_arguments: libc::c_int, _values: *const *const libc::c_char) -> libc::c_int {
    let mounted = boot::mount_all();
    let command_line = boot::command_line();
    // What fails here is told, too, if there is a way to.
    log::init(log::level_of(command_line.as_deref().unwrap_or_default()));
    mounted.unwrap_or_else(|error| status::fail(&chain(&error)));
    let command_line = command_line.unwrap_or_else(|error| status::fail(&chain(&error)));
    // With panic=abort the hook is the last code that runs; elsewhere it is too, since it does not return.
    std::panic::set_hook(Box::new(|panic| status::fail(panic)));
    boot::prepare().unwrap_or_else(|error| status::fail(&chain(&error)));
    let zygote = zygote::fork().unwrap_or_else(|error| status::fail(&chain(&error)));
    boot::raise_limits().unwrap_or_else(|error| status::fail(&chain(&error)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(4).build();
    let runtime = runtime.unwrap_or_else(|error| status::fail(&format_args!("start the runtime: {error}")));
    runtime.block_on(serve(zygote, &command_line))
}

/// Listens, says so, and serves for ever.
async fn serve(zygote: zygote::Unattached, command_line: &str) -> ! {
    let zygote = zygote.attach().unwrap_or_else(|error| status::fail(&chain(&error)));
    let lifecycle = Lifecycle::new(zygote);
    let service = Arc::new(Service::new(Arc::clone(&lifecycle)));
    tokio::spawn(vsock::carry_streams(listen(STREAM_PORT), Arc::clone(&lifecycle)));
    let mut server = Server::new()
        .add_listener(Listener::new(vsock::FromHost(listen(CONTROL_PORT))))
        .register_service(create_agent(service.clone()));
    if let Err(error) = server.start().await {
        status::fail(&format_args!("serve on vsock port {CONTROL_PORT}: {error}"));
    }
    service.ready(guest::nanoseconds(ClockId::Boottime));
    if let Err(error) = status::report(bulkhead_protocol::status::READY) {
        status::fail(&format_args!("write the status port: {error}"));
    }
    fault::when_ready(command_line);
    let error = process::reap(&lifecycle.table, lifecycle.zygote()).await;
    status::fail(&format_args!("wait for children: {error}"))
}

fn listen(port: u32) -> VsockListener {
    vsock::listen(port)
        .unwrap_or_else(|error| status::fail(&format_args!("listen on vsock port {port}: {error}")))
}

/// An error and its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
