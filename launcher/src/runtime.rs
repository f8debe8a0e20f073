//! The asynchronous runtime: one thread, made only by commands that need it.

use std::future::Future;

use tokio::runtime::Builder;

use crate::failure::Failure;

/// Runs a command. Work that was moved to other threads is left behind when it has ended.
pub(crate) fn block_on<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(command);
    runtime.shutdown_background();
    result
}
