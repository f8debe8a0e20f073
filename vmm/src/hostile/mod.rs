//! A hostile driver against the transport and every kind of device: whatever it does, nothing panics, spins or takes memory without
//! bound, nothing is written but what the driver gave for writing, and after a reset the device works as on the first day.
//!
//! The protocols of the vsock and the file system device have tests of their own beside them; here these are two of the devices behind the
//! transport.
//!
//! - [`allocations`]: how much memory something takes
//! - [`driver`]: a slot, its rings, and a driver that behaves
//! - [`file_server`]: a file server that behaves
//! - [`messages`]: the control socket's requests, tampered with
//! - [`requests`]: random chains
//! - [`transport`]: random register writes, and saved state that was tampered with

mod allocations;
mod driver;
mod file_server;
mod messages;
mod requests;
mod transport;
