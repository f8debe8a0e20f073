//! What the suite and the benchmarks share: a VMM steered by hand.

#![allow(missing_docs, clippy::missing_errors_doc)] // of tests: their names say it

pub mod bulkhead;
pub mod checksum;
pub mod elf;
pub mod vm;
