//! The OCI configuration of a container: from an image's defaults and the command line, or from a bundle.
//!
//! - [`build`]: the configuration that the launcher makes
//! - [`bundle`]: the one that comes with a bundle

pub(crate) mod build;
pub(crate) mod bundle;
