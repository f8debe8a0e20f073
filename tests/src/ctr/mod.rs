//! containerd as its own client uses it: a daemon of the tests' own, `ctr`, the shim's calls, and what may not be left behind.
//! The runtime is a parameter, `BULKHEAD_RUNTIME`: whatever holds for one must hold for runc.

mod bundle;
mod command;
mod daemon;
mod events;
mod fifo;
mod residue;
mod shim;

pub use bundle::{Bundle, CreateTaskRequest, Mount};
pub use command::{
    Container, IMAGE, NAMESPACE, RUNC, ctr, ctr_run, image, in_background, in_background_of, is_runc,
    metrics, pipes, remove_everything, run, run_command, runtime, spawn, status, tasks,
};
pub use daemon::{
    directory, is_version_2, kill, log_since, pid as daemon_pid, snapshotters, start, stop, task_directory,
};
pub use events::Events;
pub use fifo::{Reader, make};
pub use residue::{Before, descriptors, processes_called};
pub use shim::{CallResult, Code, Shim, Status};
