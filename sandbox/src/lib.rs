//! One sandbox seen from the host: a virtual machine with an agent in it. The launcher and the containerd shim are built on
//! this library, so it never prints, never ends the process and reads no command line.
//!
//! From what is there to what runs:
//! - [`config`], [`size`]: the configuration files
//! - [`artifacts`], [`image_file`]: the VMM, the guest's kernel and its image; what a disk image holds
//! - [`uid`]: a uid of its own for every VMM
//! - [`paths`]: where this host keeps what is Bulkhead's
//! - [`oci`], [`sizing`]: what a bundle's configuration says about its machine, and how large that is
//! - [`slots`], [`storage`], [`disk`]: a container's root as disks of the guest
//! - [`share`], [`file_server`]: host directories for the guest, and the process that serves them
//! - [`process`], [`vmm`], [`control`]: processes that are locked up; the VMM and the socket that steers it
//! - [`cgroup`]: the host's cgroup of a sandbox
//! - [`console`], [`end`]: what the guest's console said, and how a machine came to its end
//! - [`sandbox`]: a machine from its first process to its last, built from the above
//! - [`handover`]: from what containerd hands over to what a guest can use; [`binds`]: its bind mounts
//! - [`container`]: a container to be made, with what it has of the host
//! - [`pod`]: a machine with the containers of a pod, from what containerd hands over
//! - [`agent`], [`stream`]: calls to the agent in the guest, and the standard streams of its processes
//! - [`timing`]: where the time went
//! - [`watch`]: descriptors that tokio watches

pub mod agent;
pub mod artifacts;
pub mod binds;
mod birth;
pub mod cgroup;
mod cmdline;
pub mod config;
pub mod console;
pub mod container;
pub mod control;
pub mod disk;
pub mod end;
pub mod file_server;
pub mod handover;
pub mod image_file;
pub mod oci;
pub mod paths;
pub mod pod;
pub mod process;
pub mod sandbox;
pub mod share;
pub mod size;
pub mod sizing;
pub mod slots;
pub mod storage;
pub mod stream;
pub mod timing;
pub mod uid;
pub mod vmm;
mod vsock;
pub mod watch;
