//! The server as its owner and the VMM see it: the binary, in its jail, with a driver of the tests' at the other end. Without root
//! there is no jail, and every test says that it is skipped.

#![allow(clippy::unwrap_used)] // what is not in a test function is a test's all the same

mod client;
mod directories;
mod guest;
mod hostile;
mod life;
mod network;
mod owners;
mod ring;
mod shares;
