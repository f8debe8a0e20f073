//! Tests of the crate as its users see it, against readers that are not ours: the crate `erofs-rs`, `fsck.erofs`, and, for
//! root, the kernel.

// Lint-wise only functions marked as tests are tests, but their helpers are as much.
#![allow(clippy::unwrap_used)]

mod archive;
mod directory;
mod formats;
mod fuzz;
mod hostile;
mod layers;
mod mount;
mod oci;
#[cfg(feature = "registry")]
mod registry;
mod store;
mod tree;
mod writer;

/// Reports a test that could not run, where it cannot be overlooked.
fn skipped(test: &str, why: &str) {
    eprintln!("skipped: {test}: {why}");
}
