//! A FUSE driver, as small as it can be, and the owner of a server: the real binary, in its jail.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Once;
use std::time::Duration;

use bulkhead_fs::control::{Fd, FromOwner, Reply, Request, ShareKind};
use bulkhead_fs::wire::{OUT_HEADER, Reader, Writer, opcode};
use bulkhead_vmm::control::socket::ControlSocket;
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use rustix::io::FdFlags;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, Shutdown, SocketFlags, SocketType,
    recvmsg, send, sendmsg, shutdown, socketpair,
};

/// Flags that the tests' driver negotiates: all.
const INIT_FLAGS: u32 = u32::MAX;

/// A server and both of its sockets.
pub(crate) struct Server {
    child: Child,
    requests: OwnedFd,
    control: ControlSocket,
    _root: tempfile::TempDir,
    unique: u64,
    /// Who asks.
    pub(crate) uid: u32,
    /// See `uid`.
    pub(crate) gid: u32,
}

/// `fuse_entry_out`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) node: u64,
    pub(crate) timeout: u64,
    pub(crate) attributes: Attributes,
}

/// What of `fuse_attr` is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) inode: u64,
    pub(crate) size: u64,
    pub(crate) mode: u32,
    pub(crate) links: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) flags: u32,
}

/// An error's number, as the driver has it.
pub(crate) type Result<T> = std::result::Result<T, i32>;

impl Server {
    /// A server that serves, or nothing where it cannot have its jail.
    pub(crate) fn start(arguments: &[&str]) -> Option<Self> {
        if let Some(why) = no_jail() {
            static SAID: Once = Once::new();
            // Past what holds back the output of tests that pass.
            SAID.call_once(|| {
                let _ = writeln!(std::io::stderr(), "skipped: the file server in its jail ({why})");
            });
            return None;
        }
        let root = tempfile::tempdir().unwrap();
        let (requests, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        // A server that hangs is an error.
        set_socket_timeout(&requests, Timeout::Recv, Some(Duration::from_mins(1))).unwrap();
        let (control, their_control) = ControlSocket::pair().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-fs"));
        command.arg("--root").arg(root.path()).args(arguments);
        command.arg("--requests-fd").arg(theirs.as_raw_fd().to_string());
        command.arg("--control-fd").arg(their_control.as_raw_fd().to_string());
        let inherited = [OwnedFd::from(their_control), theirs];
        // SAFETY: between fork and exec it makes system calls only.
        unsafe {
            command.pre_exec(move || {
                for fd in &inherited {
                    rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
                }
                Ok(())
            })
        };
        let child = command.spawn().unwrap();
        drop(command);
        let mut server = Self { child, requests, control, _root: root, unique: 0, uid: 0, gid: 0 };
        server.init();
        Some(server)
    }

    fn init(&mut self) {
        let mut body = Writer::default();
        body.u32(7).u32(41).u32(1 << 20).u32(INIT_FLAGS).zeros(48);
        let reply = self.call(opcode::INIT, 0, &body.0).unwrap();
        assert_eq!(reply.len(), 64);
    }

    /// The server's process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The VMM's end of its requests, for a device of the VMM's.
    pub(crate) fn requests(&self) -> OwnedFd {
        self.requests.try_clone().unwrap()
    }

    /// Bytes of memory that it has.
    pub(crate) fn resident(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
    }

    /// Shares a detached mount of a directory or file.
    pub(crate) fn share(&mut self, name: &str, path: &Path, kind: ShareKind, read_only: bool) {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = open_tree(CWD, path, flags).unwrap();
        let request = Request::AddShare { name: name.to_owned(), share: Fd(0), kind, read_only };
        self.owner(request, &[tree.as_fd()]).unwrap();
    }

    /// Shares a directory and looks it up.
    pub(crate) fn share_root(&mut self, path: &Path) -> u64 {
        self.share("share", path, ShareKind::Root, false);
        self.lookup(1, "share").unwrap().node
    }

    /// Says something as the owner.
    pub(crate) fn owner(
        &mut self,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> std::result::Result<(), String> {
        self.control.send(&FromOwner { id: 9, request }, fds).unwrap();
        let (reply, _) = self.control.receive::<Reply>().unwrap();
        assert_eq!(reply.id, 9);
        reply.result
    }

    /// Sends a packet as it is.
    pub(crate) fn send_raw(&mut self, packet: &[u8]) {
        send(&self.requests, packet, rustix::net::SendFlags::NOSIGNAL).unwrap();
    }

    /// Sends a request.
    pub(crate) fn send(&mut self, opcode: u32, node: u64, body: &[u8]) {
        self.unique += 1;
        let mut header = Writer::default();
        header.u32(u32::try_from(40 + body.len()).unwrap()).u32(opcode).u64(self.unique).u64(node);
        header.u32(self.uid).u32(self.gid).u64(0);
        let parts = [IoSlice::new(&header.0), IoSlice::new(body)];
        sendmsg(
            &self.requests,
            &parts,
            &mut rustix::net::SendAncillaryBuffer::default(),
            rustix::net::SendFlags::NOSIGNAL,
        )
        .unwrap();
    }

    /// That of the request sent last.
    pub(crate) fn unique(&self) -> u64 {
        self.unique
    }

    /// A reply's `unique`, what it says, and its file.
    pub(crate) fn receive(&mut self) -> (u64, Result<Vec<u8>>, Option<File>) {
        let mut bytes = vec![0; 256 << 10];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let length =
            recvmsg(&self.requests, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap().bytes;
        assert!(length >= OUT_HEADER, "the server is gone");
        let mut files: Vec<_> = control
            .drain()
            .flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => fds.map(File::from).collect(),
                _ => Vec::new(),
            })
            .collect();
        assert!(files.len() <= 1);
        bytes.truncate(length);
        let mut reader = Reader(&bytes);
        assert_eq!(reader.u32().unwrap() as usize, length);
        let (error, unique) = (reader.u32().unwrap().cast_signed(), reader.u64().unwrap());
        let result = if error == 0 { Ok(reader.0.to_vec()) } else { Err(-error) };
        (unique, result, files.pop())
    }

    /// A request and its reply.
    pub(crate) fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>> {
        let (result, file) = self.call_for_file(opcode, node, body);
        assert!(file.is_none(), "opcode {opcode} gives no file");
        result
    }

    fn call_for_file(&mut self, opcode: u32, node: u64, body: &[u8]) -> (Result<Vec<u8>>, Option<File>) {
        self.send(opcode, node, body);
        let (unique, result, file) = self.receive();
        assert_eq!(unique, self.unique);
        (result, file)
    }

    pub(crate) fn lookup(&mut self, parent: u64, name: &str) -> Result<Entry> {
        self.call(opcode::LOOKUP, parent, &text(&[name])).map(|reply| Entry::parse(&mut Reader(&reply)))
    }

    /// The node at the end of a path of names.
    pub(crate) fn walk(&mut self, mut node: u64, path: &[&str]) -> u64 {
        for name in path {
            node = self.lookup(node, name).unwrap().node;
        }
        node
    }

    pub(crate) fn attributes(&mut self, node: u64) -> Result<Attributes> {
        let reply = self.call(opcode::GETATTR, node, &[0; 16])?;
        Ok(Attributes::parse(&mut Reader(&reply[16..])))
    }

    /// SETATTR of what `valid` says; times are one.
    pub(crate) fn set(
        &mut self,
        node: u64,
        valid: u32,
        [size, time, mode, uid, gid]: [u64; 5],
    ) -> Result<Attributes> {
        let mut body = Writer::default();
        let low = |value: u64| u32::try_from(value).unwrap();
        body.u32(valid).u32(0).u64(0).u64(size).u64(0).u64(time).u64(time).u64(0).zeros(12);
        body.u32(low(mode)).u32(0).u32(low(uid)).u32(low(gid)).u32(0);
        let reply = self.call(opcode::SETATTR, node, &body.0)?;
        Ok(Attributes::parse(&mut Reader(&reply[16..])))
    }

    pub(crate) fn open(&mut self, node: u64, flags: i32) -> Result<(u64, File)> {
        let mut body = Writer::default();
        body.u32(flags.cast_unsigned()).u32(0);
        let (result, file) = self.call_for_file(opcode::OPEN, node, &body.0);
        result.map(|reply| (Reader(&reply).u64().unwrap(), file.expect("an open file")))
    }

    /// CREATE, or TMPFILE.
    pub(crate) fn create(
        &mut self,
        what: u32,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
        umask: u32,
    ) -> Result<(Entry, u64, File)> {
        let mut body = Writer::default();
        body.u32(flags.cast_unsigned()).u32(mode).u32(umask).u32(0).bytes(&text(&[name]));
        let (result, file) = self.call_for_file(what, parent, &body.0);
        let reply = result?;
        let mut reader = Reader(&reply);
        let entry = Entry::parse(&mut reader);
        Ok((entry, reader.u64().unwrap(), file.expect("an open file")))
    }

    pub(crate) fn make_directory(&mut self, parent: u64, name: &str, mode: u32, umask: u32) -> Result<Entry> {
        let mut body = Writer::default();
        body.u32(mode).u32(umask).bytes(&text(&[name]));
        self.call(opcode::MKDIR, parent, &body.0).map(|reply| Entry::parse(&mut Reader(&reply)))
    }

    pub(crate) fn symlink(&mut self, parent: u64, name: &str, target: &str) -> Result<Entry> {
        let reply = self.call(opcode::SYMLINK, parent, &text(&[name, target]))?;
        Ok(Entry::parse(&mut Reader(&reply)))
    }

    pub(crate) fn link(&mut self, node: u64, parent: u64, name: &str) -> Result<Entry> {
        let body = [&node.to_le_bytes()[..], &text(&[name])].concat();
        self.call(opcode::LINK, parent, &body).map(|reply| Entry::parse(&mut Reader(&reply)))
    }

    pub(crate) fn rename(&mut self, from: (u64, &str), to: (u64, &str), flags: u32) -> Result<()> {
        let mut body = Writer::default();
        body.u64(to.0).u32(flags).u32(0).bytes(&text(&[from.1, to.1]));
        self.call(opcode::RENAME2, from.0, &body.0).map(drop)
    }

    pub(crate) fn unlink(&mut self, parent: u64, name: &str) -> Result<()> {
        self.call(opcode::UNLINK, parent, &text(&[name])).map(drop)
    }

    pub(crate) fn release(&mut self, node: u64, handle: u64) -> Result<()> {
        let mut body = Writer::default();
        body.u64(handle).zeros(16);
        self.call(opcode::RELEASE, node, &body.0).map(drop)
    }

    pub(crate) fn open_directory(&mut self, node: u64) -> Result<u64> {
        self.call(opcode::OPENDIR, node, &[0; 8]).map(|reply| Reader(&reply).u64().unwrap())
    }

    /// READDIR or READDIRPLUS: the node, offset behind, and name of each entry.
    pub(crate) fn list(
        &mut self,
        what: u32,
        node: u64,
        handle: u64,
        offset: u64,
        size: u32,
    ) -> Result<Vec<(u64, u64, String)>> {
        let mut body = Writer::default();
        body.u64(handle).u64(offset).u32(size).u32(0).zeros(16);
        let reply = self.call(what, node, &body.0)?;
        assert!(reply.len() <= size as usize);
        let (mut reader, mut entries) = (Reader(&reply), Vec::new());
        while !reader.0.is_empty() {
            let node = if what == opcode::READDIRPLUS { Entry::parse(&mut reader).node } else { 0 };
            reader.u64().unwrap();
            let (next, length) = (reader.u64().unwrap(), reader.u32().unwrap() as usize);
            reader.u32().unwrap();
            let name = String::from_utf8(reader.bytes(length).unwrap().to_vec()).unwrap();
            reader.skip(length.next_multiple_of(8) - length).unwrap();
            entries.push((node, next, name));
        }
        Ok(entries)
    }

    pub(crate) fn set_xattr(&mut self, node: u64, name: &str, value: &[u8]) -> Result<()> {
        let mut body = Writer::default();
        // With flags of its own, since they are negotiated.
        body.u32(u32::try_from(value.len()).unwrap()).u32(0).u64(0).bytes(&text(&[name])).bytes(value);
        self.call(opcode::SETXATTR, node, &body.0).map(drop)
    }

    pub(crate) fn get_xattr(&mut self, node: u64, name: &str, size: u32) -> Result<Vec<u8>> {
        let mut body = Writer::default();
        body.u32(size).u32(0).bytes(&text(&[name]));
        self.call(opcode::GETXATTR, node, &body.0)
    }

    pub(crate) fn forget(&mut self, node: u64, lookups: u64) {
        self.send(opcode::FORGET, node, &lookups.to_le_bytes());
    }
}

/// Why a server cannot have its jail here.
fn no_jail() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root");
    }
    // pivot_root(2) leaves no root that is not one.
    let root = statx(CWD, "/", AtFlags::empty(), StatxFlags::empty()).unwrap();
    let is_mount = root.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
    (!is_mount).then_some("the root directory is no mount, as in a chroot")
}

/// Names, each with its NUL.
pub(crate) fn text(names: &[&str]) -> Vec<u8> {
    names.iter().flat_map(|name| name.bytes().chain([0])).collect()
}

impl Entry {
    fn parse(reader: &mut Reader<'_>) -> Self {
        let node = reader.u64().unwrap();
        reader.skip(8).unwrap();
        let timeout = reader.u64().unwrap();
        reader.skip(16).unwrap();
        Self { node, timeout, attributes: Attributes::parse(reader) }
    }
}

impl Attributes {
    fn parse(reader: &mut Reader<'_>) -> Self {
        let (inode, size) = (reader.u64().unwrap(), reader.u64().unwrap());
        reader.skip(44).unwrap();
        let mut next = || reader.u32().unwrap();
        let (mode, links, uid, gid) = (next(), next(), next(), next());
        let (_, _, flags) = (next(), next(), next());
        Self { inode, size, mode, links, uid, gid, flags }
    }
}

impl Drop for Server {
    /// The end of a socket ends the server, and nothing that a test has done has ended it before.
    fn drop(&mut self) {
        let _ = shutdown(&self.requests, Shutdown::Both);
        let status = self.child.wait().unwrap();
        if !std::thread::panicking() {
            assert!(status.success(), "{status}");
        }
    }
}
