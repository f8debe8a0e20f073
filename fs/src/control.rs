//! What the owner of a file server says to it. Messages travel over a
//! [`ControlSocket`](bulkhead_vmm::control::socket::ControlSocket) with their descriptors beside them; the end of file on it
//! ends the server.

use serde::{Deserialize, Serialize};

pub use bulkhead_vmm::control::message::Fd;

/// Shares that a server takes at a time. A small `--nofile` lowers it to an eighth of that.
pub const SHARES_MAX: usize = 1024;

/// What the owner sends. It is answered by one [`Reply`], in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FromOwner {
    /// Repeated in the reply.
    pub id: u32,
    /// What is asked.
    pub request: Request,
}

/// What the owner may ask.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Show something under a name in the root directory.
    AddShare {
        /// Its name there: an id as of [`is_valid_id`](bulkhead_protocol::limits::is_valid_id) that no other share has.
        name: String,
        /// A detached mount of a directory, a regular file, a socket or a fifo; `O_PATH` will do. Nobody else has it
        /// mounted, so only the mounts that it came with are in it. It should be `nodev` and `nosuid`, and read-only if
        /// `read_only` is set.
        share: Fd,
        /// Who else changes it.
        kind: ShareKind,
        /// Refuse all changes, whatever the mount would allow.
        read_only: bool,
    },
    /// Refuse all changes of a share from now on. What has been opened for writing stays so.
    Protect {
        /// As it was added.
        name: String,
    },
    /// Take a share away. What the guest still knows of it is stale from then on.
    RemoveShare {
        /// As it was added.
        name: String,
    },
}

/// Who changes a share, which decides how long the guest may remember what it has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShareKind {
    /// The guest alone, so that it need not ask twice: a container's root.
    Root,
    /// Others as well: a bind mount, a volume.
    Bind,
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// That of the request.
    pub id: u32,
    /// What came of it, and if nothing, why.
    pub result: Result<(), String>,
}
