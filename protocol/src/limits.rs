//! The bounds of the protocol. Both sides check them: the host because the guest is hostile, the agent because one bad
//! request must not take the guest down.

/// Raised with every change that an older peer would misread.
pub const PROTOCOL_VERSION: u32 = 2;

/// vsock port of the ttrpc connection.
pub const CONTROL_PORT: u32 = 1024;
/// vsock port of the standard streams.
pub const STREAM_PORT: u32 = 1025;

/// Longest container or exec id, in bytes. containerd allows 76; a pod's container id is 64.
pub const ID_MAX: usize = 128;
/// Longest OCI `config.json` or `process` object, in bytes. ttrpc itself refuses a message over 4 MiB.
pub const SPEC_MAX: usize = 2 << 20;
/// Most EROFS layers of one root: overlayfs refuses a longer list of lower directories (`OVL_MAX_STACK`).
pub const LAYERS_MAX: usize = 500;
/// Longest hostname, in bytes: `__NEW_UTS_LEN` of the kernel.
pub const HOSTNAME_MAX: usize = 64;
/// Longest `user[:group]`, in bytes.
pub const USER_MAX: usize = 256;
/// Entropy that one call may add, in bytes.
pub const SEED_MAX: usize = 512;
/// Longest text of an error that the host shows of what the agent sent, in bytes.
pub const ERROR_TEXT_MAX: usize = 4096;

/// What the host's shares are called in the guest: the tag of the fs device.
pub const SHARES_TAG: &str = "bulkhead";
/// What the source of a bind mount begins with in a configuration that the agent gets; the share's name, an id, follows.
pub const SHARE_PREFIX: &str = "share:";
/// What the source of a bind mount begins with that is memory of the guest's: a name, an id, follows, a colon, and the most bytes that it
/// may take. The first container that names it has it made; it stays as long as the guest.
pub const MEMORY_PREFIX: &str = "memory:";

/// Containers and execs that may live at a time.
pub const CONTAINERS_MAX: usize = 1024;
/// Processes started by exec that may live at a time, in all containers.
pub const EXECS_MAX: usize = 4096;

/// How long the host waits for the answer to a call that runs no container code, in seconds.
pub const CALL_TIMEOUT_S: u64 = 10;
/// How long the host waits for `CreateContainer`, `StartContainer` and `ExecProcess`, in seconds.
pub const CREATE_TIMEOUT_S: u64 = 60;
/// How long the host waits for `RemoveContainer`, in seconds: what the container wrote goes to its disk first.
pub const REMOVE_TIMEOUT_S: u64 = 60;
/// How long the agent keeps a process's streams for the host to connect to, in seconds.
pub const STREAM_CONNECT_TIMEOUT_S: u64 = 10;

/// True for an id that may name a container or an exec: letters, digits, `_`, `.` and `-`, beginning with a letter or a
/// digit, of at most [`ID_MAX`] bytes. Such an id is safe as a single path component.
pub fn is_valid_id(id: &str) -> bool {
    let mut bytes = id.bytes();
    id.len() <= ID_MAX
        && bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_single_path_components() {
        for good in ["a", "0", "web-1", "a.b_c", &"x".repeat(ID_MAX)] {
            assert!(is_valid_id(good), "{good}");
        }
        for bad in ["", ".", "..", "-a", "a/b", "a\0", "a b", "é", &"x".repeat(ID_MAX + 1)] {
            assert!(!is_valid_id(bad), "{bad:?}");
        }
    }
}
