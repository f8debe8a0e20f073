//! What the suite and the benchmarks share: a VMM steered by hand.

pub mod vm;
