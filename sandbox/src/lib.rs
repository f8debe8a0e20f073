//! One sandbox seen from the host: a virtual machine with an agent in it. The launcher and the containerd shim are built on
//! this library, so it never prints, never ends the process and reads no command line.
//!
//! From what is there to what runs:
//! - [`config`], [`size`]: the configuration files
//! - [`artifacts`], [`image_file`]: the VMM, the guest's kernel and its image; what a disk image holds
//! - [`uid`]: a uid of its own for every VMM
//! - [`storage`], [`disk`]: a container's root as disks of the guest
//! - [`vmm`], [`control`]: the VMM process and the socket that steers it
//! - [`console`], [`end`]: what the guest's console said, and how a machine came to its end
//! - [`sandbox`]: a machine from its first process to its last, built from the above
//! - [`agent`], [`stream`]: calls to the agent in the guest, and the standard streams of its processes
//! - [`timing`]: where the time went
//! - [`watch`]: descriptors that tokio watches

pub mod agent;
pub mod artifacts;
mod cmdline;
pub mod config;
pub mod console;
pub mod control;
pub mod disk;
pub mod end;
pub mod image_file;
pub mod sandbox;
pub mod size;
pub mod storage;
pub mod stream;
pub mod timing;
pub mod uid;
pub mod vmm;
mod vsock;
pub mod watch;
