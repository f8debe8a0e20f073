//! A hostile driver against the transport and every kind of device: whatever it does, nothing panics, spins or takes memory without
//! bound, nothing is written but what the driver gave for writing, and after a reset the device works as on the first day.
//!
//! The vsock device's protocol has tests of its own beside it; here it is one of six behind the transport.
//!
//! - [`allocations`]: how much memory something takes
//! - [`driver`]: a slot, its rings, and a driver that behaves
//! - [`messages`]: the control socket's requests, tampered with
//! - [`requests`]: random chains
//! - [`transport`]: random register writes, and saved state that was tampered with

mod allocations;
mod driver;
mod messages;
mod requests;
mod transport;
