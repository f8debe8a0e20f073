//! The agent: PID 1 of a Bulkhead guest. It runs OCI containers for the host, which steers it over vsock.
//! `docs/protocol.md` says what the host may ask.

// std's own start-up opens /dev/null for descriptors that are closed and aborts when it cannot. The kernel opens no
// console for init when it has none, and /dev is empty until `boot` has mounted it: so the agent starts at C's `main`.
#![cfg_attr(not(test), no_main)]

mod boot;
mod cgroup;
mod guest;
mod log;
mod service;
mod status;

use std::sync::Arc;

use bulkhead_protocol::agent_ttrpc::create_agent;
use bulkhead_protocol::limits::{CONTROL_PORT, STREAM_PORT};
use rustix::time::ClockId;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};
use ttrpc::r#async::Server;

use service::Service;

/// What the kernel starts.
#[cfg_attr(not(test), unsafe(no_mangle))]
#[cfg_attr(test, allow(dead_code))]
extern "C" fn main(_arguments: libc::c_int, _values: *const *const libc::c_char) -> libc::c_int {
    let command_line = match boot::mount_all().and_then(|()| boot::command_line()) {
        Ok(text) => text,
        Err(error) => status::fail(&chain(&error)),
    };
    log::init(log::level_of(&command_line));
    // With panic=abort the hook is the last code that runs; elsewhere it is too, since it does not return.
    std::panic::set_hook(Box::new(|panic| status::fail(panic)));
    if let Err(error) = boot::prepare() {
        status::fail(&chain(&error));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.unwrap_or_else(|error| status::fail(&format_args!("start the runtime: {error}")));
    runtime.block_on(serve(&command_line))
}

/// Listens, says so, and serves for ever.
async fn serve(command_line: &str) -> ! {
    let service = Arc::new(Service::new());
    let _streams = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT))
        .unwrap_or_else(|error| status::fail(&format_args!("listen on vsock port {STREAM_PORT}: {error}")));
    let mut server = Server::new()
        .bind(&format!("vsock://-1:{CONTROL_PORT}"))
        .unwrap_or_else(|error| status::fail(&format_args!("listen on vsock port {CONTROL_PORT}: {error}")))
        .register_service(create_agent(service.clone()));
    if let Err(error) = server.start().await {
        status::fail(&format_args!("serve on vsock port {CONTROL_PORT}: {error}"));
    }
    service.ready(guest::nanoseconds(ClockId::Boottime));
    if let Err(error) = status::report(bulkhead_protocol::status::READY) {
        status::fail(&format_args!("write the status port: {error}"));
    }
    fault(command_line);
    std::future::pending().await
}

/// Executes an invalid instruction when the kernel command line has `bulkhead.fault=ill`: the kernel kills PID 1 and
/// panics without the agent having had a word in it.
#[cfg(feature = "fault-injection")]
fn fault(command_line: &str) {
    if command_line.split_ascii_whitespace().any(|word| word == "bulkhead.fault=ill") {
        // SAFETY: it ends this process, which is what the build is for.
        unsafe { std::arch::asm!("ud2") };
    }
}

#[cfg(not(feature = "fault-injection"))]
fn fault(_command_line: &str) {}

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
