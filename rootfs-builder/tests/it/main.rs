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

use std::io::Write;
use std::sync::Once;

/// Reports that a check could not run, once, where it cannot be overlooked: `eprintln` would be caught with the output of
/// tests, of which nobody sees that of those that pass.
fn skipped(check: &str, why: &str) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = writeln!(std::io::stderr(), "skipped: {check}: {why}");
    });
}
