//! The OCI configuration of a container that is run from an image or a root: from the image's defaults and the command line.
//!
//! - [`build`]: the whole of it
//! - [`volume`]: files and directories of the host in it

pub(crate) mod build;
pub(crate) mod volume;
