//! The requests, by subject. Each takes what follows the header and gives the body of the reply.
//!
//! - [`connection`]: INIT, STATFS, SYNCFS
//! - [`inode`]: LOOKUP, FORGET, attributes, READLINK
//! - [`tree`]: making, removing, renaming, linking
//! - [`file`]: OPEN, CREATE, TMPFILE and what is done to open files
//! - [`directory`]: OPENDIR, READDIR, READDIRPLUS
//! - [`xattr`]: extended attributes
//!
//! All others are unknown to this server: the guest's kernel then does without (ACCESS, locks, BMAP) or has the program do so.

mod connection;
mod directory;
mod file;
mod inode;
mod tree;
mod xattr;

use rustix::io::Errno;

pub(crate) use self::inode::forget;
use crate::host::FileSystem;
use crate::session::Session;
use crate::wire::{InHeader, Reader, Writer, opcode};

pub(crate) type Result<T> = std::result::Result<T, Errno>;

/// Does what is asked.
pub(crate) fn perform(session: &mut Session, header: &InHeader, body: Reader<'_>) -> Result<Writer> {
    let operation = match header.opcode {
        opcode::LOOKUP => inode::lookup,
        opcode::GETATTR => inode::get_attributes,
        opcode::SETATTR => inode::set_attributes,
        opcode::READLINK => inode::read_link,
        opcode::SYMLINK => tree::make_symlink,
        opcode::MKNOD => tree::make_node,
        opcode::MKDIR => tree::make_directory,
        opcode::UNLINK => tree::unlink,
        opcode::RMDIR => tree::remove_directory,
        opcode::RENAME => tree::rename,
        opcode::RENAME2 => tree::rename_with_flags,
        opcode::LINK => tree::link,
        opcode::OPEN => file::open,
        opcode::CREATE => file::create,
        opcode::TMPFILE => file::create_unnamed,
        opcode::RELEASE | opcode::RELEASEDIR => file::release,
        opcode::FSYNC => file::sync,
        opcode::FALLOCATE => file::allocate,
        opcode::LSEEK => file::seek,
        opcode::COPY_FILE_RANGE => file::copy_range,
        opcode::OPENDIR => directory::open,
        opcode::READDIR => directory::read,
        opcode::READDIRPLUS => directory::read_plus,
        opcode::FSYNCDIR => directory::sync,
        opcode::GETXATTR => xattr::get,
        opcode::SETXATTR => xattr::set,
        opcode::LISTXATTR => xattr::list,
        opcode::REMOVEXATTR => xattr::remove,
        opcode::INIT => connection::init,
        opcode::STATFS => connection::stat_file_system,
        opcode::SYNCFS => connection::sync_file_system,
        // The VMM does these, with a file that it has been given.
        opcode::READ | opcode::WRITE | opcode::FLUSH => return Err(Errno::BADF),
        _ => return Err(Errno::NOSYS),
    };
    let result = operation(session, header, body);
    // Elsewhere root may be taken for nobody (NFS's root_squash), and may less than whoever asks: then it is done as them, as without a
    // server. Not at once, since of their groups only one is known.
    if let Err(Errno::ACCESS | Errno::PERM) = result
        && session.nodes.get(header.node).is_ok_and(|node| node.file_system == FileSystem::Remote)
        && let Ok(Some(_assumed)) = session.identities.assume(header.uid, header.gid, 0)
    {
        return operation(session, header, body);
    }
    result
}
