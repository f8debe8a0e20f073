//! Containers as the launcher knows them.
//!
//! - [`name`]: ids and names
//! - [`record`]: what is written down of one
//! - [`files`]: the files and directories of one
//! - [`cgroups`]: the cgroups of the host that their sandboxes are in
//! - [`claim`]: the right to run one
//! - [`registry`]: all of them, and what is cleaned up after those whose launcher was killed

mod cgroups;
pub(crate) mod claim;
mod files;
pub(crate) mod name;
pub(crate) mod record;
pub(crate) mod registry;
