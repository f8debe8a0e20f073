//! Builds the file systems that Bulkhead boots and mounts: the guest image, and EROFS images of container image layers.

pub mod directory;
pub mod erofs;
mod excerpt;
pub mod guest_image;
pub mod oci;
pub mod store;
pub mod tar;
