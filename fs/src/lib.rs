//! A file server for one guest. It shows directories and files of the host, its shares, in one synthetic root directory and
//! speaks FUSE with the VMM's fs device about them. Names, attributes and policy are its business; when the guest opens a
//! regular file, the VMM is handed that one descriptor and moves the data itself.
//!
//! - [`control`]: what the owner says, all that an owner needs
//! - [`server`]: the two sockets; [`session`]: one request and its reply; [`worker`]: what takes long
//! - [`wire`], [`name`], [`attributes`]: what is in them
//! - [`shares`], [`nodes`], [`handles`]: what the guest sees, what it knows, what it has open
//! - [`descriptors`], [`directory`]: bounded caches of the nodes' descriptors and of what was read of directories
//! - [`host`], [`identity`]: opening files of the host, creating them as somebody
//! - [`jail`], [`seccomp`]: giving up all privileges but those that a file server needs

pub mod attributes;
pub mod control;
pub mod descriptors;
pub mod directory;
pub mod handles;
pub mod host;
pub mod identity;
pub mod jail;
pub mod name;
pub mod nodes;
mod operations;
pub mod seccomp;
pub mod server;
pub mod session;
pub mod shares;
pub mod wire;
pub mod worker;
