//! What the suite and the benchmarks share: a VMM steered by hand, and the launcher as a user runs it.

#![allow(missing_docs, clippy::missing_errors_doc)] // of tests: their names say it

pub mod bulkhead;
pub mod checksum;
pub mod container;
pub mod ctr;
pub mod elf;
pub mod files;
pub mod layout;
pub mod residue;
pub mod retry;
pub mod terminal;
pub mod vm;
