//! A process in a container as a user sees it: its streams, its terminal, its signals.
//!
//! - [`stdio`], [`terminal`], [`signals`]: the launcher's own side
//! - [`attach`]: the streams in between
//! - [`attend`]: from the start of a process to its exit code

pub(crate) mod attach;
pub(crate) mod attend;
pub(crate) mod signals;
pub(crate) mod stdio;
pub(crate) mod terminal;
