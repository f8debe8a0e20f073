//! A container to be made: what the host has for it is opened, then given slots and names in its machine.

use std::os::fd::OwnedFd;
use std::path::Path;

use bulkhead_fs::control::ShareKind;
use bulkhead_protocol::agent::{CreateContainerRequest, Rootfs, Stdio};
use oci_spec::runtime::Spec;

use crate::binds::{self, Bind, Shared, SharedBinds};
use crate::disk::Disk;
use crate::file_server::FileServer;
use crate::handover::{self, Above, Root, RootfsMount};
use crate::pod::PodError;
use crate::size::Size;
use crate::sizing::MachineSize;
use crate::slots::Slots;
use crate::storage::{self, Storage, Upper};

/// A container to be made.
#[derive(Debug)]
pub struct NewContainer<'a> {
    /// Its name, an id.
    pub id: &'a str,
    /// Its configuration.
    pub spec: Spec,
    /// Its bundle.
    pub bundle: &'a Path,
    /// Its root.
    pub root: RootSource<'a>,
    /// Its standard streams.
    pub stdio: Stdio,
    /// Whom it runs as, by a name or a number that is looked up in its root. If that is empty, its configuration says it.
    pub user: &'a str,
    /// The first container of the pod, if this is another one.
    pub sandbox: Option<&'a str>,
}

/// Where a container's root comes from.
#[derive(Debug)]
pub enum RootSource<'a> {
    /// From the mounts that containerd hands over; without any, it is the directory `root.path` of the configuration.
    Mounts(&'a [RootfsMount]),
    /// The caller has opened it.
    Opened(Root),
}

/// What the host has for a container, opened, and what the agent is told but for the root.
pub(crate) struct Prepared {
    request: CreateContainerRequest,
    spec: Spec,
    root: Root,
    binds: Vec<Bind>,
}

impl Prepared {
    /// Opens what the container has of the host. A network file system may take its time, so a thread of its own does it.
    /// A snapshot gets a disk of `storage` for what is written, unless the root is read-only.
    pub(crate) async fn make(
        container: NewContainer<'_>,
        size: MachineSize,
        storage: Size,
    ) -> Result<Self, PodError> {
        let NewContainer { id, mut spec, bundle, root, stdio, user, sandbox } = container;
        let (id, bundle, first) = (id.to_owned(), bundle.to_owned(), sandbox.map(ToOwned::to_owned));
        let mut request = CreateContainerRequest {
            container_id: id.clone(),
            stdio: Some(stdio).into(),
            user: user.to_owned(),
            ..Default::default()
        };
        let (mounts, opened) = match root {
            RootSource::Mounts(mounts) => (mounts.to_vec(), None),
            RootSource::Opened(root) => (Vec::new(), Some(root)),
        };
        let read_only = spec.root().as_ref().is_some_and(|root| root.readonly() == Some(true));
        let has_nothing_to_open = opened.is_some() && !binds::has_any(&spec);
        let prepare = move || -> Result<Self, PodError> {
            handover::refuse_hooks(&spec)?;
            handover::refuse_disks(&spec)?;
            request.shared_namespaces = handover::take_namespaces(&mut spec, first.as_deref())?;
            if handover::translate_limits(&mut spec, size.cpus)? && first.is_some() {
                tracing::warn!(
                    "the limits of disks of container {id} have no effect: its virtual machine has those of the pod's first container"
                );
            }
            let directory = spec.root().as_ref().map(|root| bundle.join(root.path()));
            let root = opened.map_or_else(|| handover::root(&mounts, directory.as_deref()), Ok)?;
            let binds = binds::take(&mut spec, &bundle)?;
            Ok(Self { request, spec, root, binds })
        };
        let mut prepared =
            if has_nothing_to_open { prepare()? } else { tokio::task::spawn_blocking(prepare).await?? };
        if let Root::Layers { above, .. } = &mut prepared.root
            && let Above::Snapshot(directory) = above
            && !read_only
        {
            *above = Above::Disk(storage::snapshot_disk(directory, storage).await?);
        }
        Ok(prepared)
    }
}

/// A container as the guest can have it.
#[derive(Debug)]
pub(crate) struct Plan {
    /// What the agent is told.
    pub(crate) request: CreateContainerRequest,
    /// Its disks, each with its slot.
    pub(crate) disks: Vec<(u8, Disk)>,
    /// What it shares with the host.
    pub(crate) shares: Vec<(OwnedFd, Shared, ShareKind)>,
    /// The share of its root, if the container is not to write to it. The agent makes mount points there.
    pub(crate) protected: Option<String>,
}

impl Plan {
    /// Finds slots and names for what was opened.
    pub(crate) fn new(
        prepared: Prepared,
        slots: &mut Slots,
        shared: &mut SharedBinds,
        size: MachineSize,
    ) -> Result<Self, PodError> {
        let Prepared { mut request, mut spec, root, binds } = prepared;
        let mut root_share = None;
        let Storage { disks, rootfs } = match root {
            Root::Layers { images, above } => {
                let upper = match above {
                    Above::Disk(disk) => Upper::Scratch(disk),
                    // It takes up to half of the memory, as tmpfs does by itself.
                    Above::Memory | Above::Snapshot(_) => {
                        Upper::Tmpfs(Size(u64::from(size.memory_mib) << 19))
                    }
                };
                storage::plan(slots, &images, upper)?
            }
            Root::Ext4(disk) => storage::plan_ext4(slots, disk)?,
            Root::Share(mount) => {
                let name = format!("{}.root", request.container_id);
                let rootfs = Rootfs { share: name.clone(), ..Default::default() };
                root_share = Some((mount, Shared::new(name, false), ShareKind::Root));
                Storage { disks: Vec::new(), rootfs }
            }
        };
        request.rootfs = Some(rootfs).into();
        let id = &request.container_id;
        let read_only = spec.root().as_ref().is_some_and(|root| root.readonly() == Some(true));
        let protected = root_share.as_ref().filter(|_| read_only).map(|(_, shared, _)| shared.name.clone());
        let mut shares = Vec::from_iter(root_share);
        let taken = binds.into_iter().filter_map(|bind| shared.take(id, &mut spec, bind));
        shares.extend(taken.map(|(mount, shared)| (mount, shared, ShareKind::Bind)));
        // What was taken would not be given back: it cannot fail, since it was JSON before.
        request.spec = serde_json::to_vec(&spec)?;
        Ok(Self { request, disks, shares, protected })
    }

    /// What is to be given back.
    pub(crate) fn holdings(&self) -> Holdings {
        Holdings {
            planned: self.disks.iter().map(|(slot, _)| *slot).collect(),
            plugged: Vec::new(),
            shares: self.shares.iter().map(|(_, shared, _)| shared.name.clone()).collect(),
            writes_disk: self.disks.iter().any(|(_, disk)| !disk.read_only),
        }
    }

    /// Has a file server show its shares to the guest.
    pub(crate) async fn serve(&self, server: &FileServer) -> Result<(), PodError> {
        for (mount, shared, kind) in &self.shares {
            shared.serve(server, mount, *kind).await?;
        }
        Ok(())
    }
}

/// What a container has of its machine's, to be given back.
#[derive(Debug, Default)]
pub(crate) struct Holdings {
    /// The slots of disks that the machine has not been given.
    planned: Vec<u8>,
    /// The slots of disks that it has, or may have.
    plugged: Vec<u8>,
    /// The names of its shares.
    pub(crate) shares: Vec<String>,
    /// Its root is a disk of the host.
    pub(crate) writes_disk: bool,
}

impl Holdings {
    /// From now on the machine may have the disk of a slot, whatever becomes of the request to plug it.
    pub(crate) fn plug(&mut self, slot: u8) {
        if let Some(at) = self.planned.iter().position(|planned| *planned == slot) {
            self.plugged.push(self.planned.remove(at));
        }
    }

    /// As [`plug`](Self::plug), for all of them: the machine boots with them.
    pub(crate) fn plug_all(&mut self) {
        self.plugged.append(&mut self.planned);
    }

    /// Gives back the slots that the machine has never had, and returns the others, which must be unplugged first.
    pub(crate) fn give_back_planned(&mut self, slots: &mut Slots) -> Vec<u8> {
        self.planned.drain(..).for_each(|slot| slots.give_back(slot));
        std::mem::take(&mut self.plugged)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn plan(slots: &mut Slots) -> Plan {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("layer.erofs");
        let mut content = vec![0; 4096];
        content[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        content[1036] = 12;
        fs::write(&image, content).unwrap();
        let above = Above::Disk(tempfile::tempfile().unwrap());
        let root = Root::Layers { images: vec![image], above };
        let (request, spec) = (CreateContainerRequest::default(), Spec::default());
        let prepared = Prepared { request, spec, root, binds: Vec::new() };
        let size = MachineSize { memory_mib: 64, cpus: 1 };
        Plan::new(prepared, slots, &mut SharedBinds::default(), size).unwrap()
    }

    #[test]
    fn creations_that_are_given_up_use_up_no_slots() {
        let mut slots = Slots::default();
        // More often than there are slots, and given up before the first disk is plugged.
        for _ in 0..100 {
            let unplug = plan(&mut slots).holdings().give_back_planned(&mut slots);
            assert!(unplug.is_empty());
        }
    }

    #[test]
    fn a_slot_that_the_machine_may_have_is_unplugged_before_it_is_given_back() {
        let mut slots = Slots::default();
        let half = plan(&mut slots);
        let (first, second) = (half.disks[0].0, half.disks[1].0);
        let mut holdings = half.holdings();
        holdings.plug(first);
        assert_eq!(holdings.give_back_planned(&mut slots), [first]);
        assert_eq!(slots.take().unwrap(), second);

        let whole = plan(&mut slots);
        let mut holdings = whole.holdings();
        holdings.plug_all();
        assert_eq!(holdings.give_back_planned(&mut slots), [whole.disks[0].0, whole.disks[1].0]);
    }
}
