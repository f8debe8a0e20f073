//! Containers as the launcher knows them.
//!
//! - [`name`]: ids and names
//! - [`record`]: what is written down of one
//! - [`registry`]: all of them, and what is cleaned up after those whose launcher was killed

pub(crate) mod name;
pub(crate) mod record;
pub(crate) mod registry;
