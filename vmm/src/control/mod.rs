//! How a VMM is steered: one SEQPACKET socket for its whole life, over which its owner sends requests with descriptors and
//! receives replies and events. End of file on it ends the VMM.
//!
//! - [`message`]: what is said
//! - [`socket`]: how it travels

pub mod message;
pub mod socket;
