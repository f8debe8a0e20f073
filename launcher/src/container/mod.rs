//! Containers as the launcher knows them.
//!
//! - [`name`]: ids and names
//! - [`record`]: what is written down of one
//! - [`files`]: the files and directories of one
//! - [`claim`]: the right to run one
//! - [`registry`]: all of them, and what is cleaned up after those whose launcher was killed

pub(crate) mod claim;
mod files;
pub(crate) mod name;
pub(crate) mod record;
pub(crate) mod registry;
