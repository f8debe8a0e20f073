//! What a container's root is made of, and what is made of that before its machine is.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use bulkhead_rootfs_builder::directory;
use bulkhead_rootfs_builder::store::Store;
use bulkhead_sandbox::container::RootSource;
use bulkhead_sandbox::handover::{self, Above};
use bulkhead_sandbox::image_file::{self, Format};
use bulkhead_sandbox::paths::Paths;
use bulkhead_sandbox::size::Size;
use bulkhead_sandbox::storage::make_scratch;
use rustix::fs::statvfs;

use crate::container::claim::Claim;
use crate::failure::Failure;
use crate::progress::Progress;
use crate::spec::build::ImageDefaults;

/// What a container's root is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Root {
    /// EROFS images, the topmost first.
    Layers(Vec<PathBuf>),
    /// A directory, to be packed.
    Directory(PathBuf),
    /// An ext4 image, to be copied.
    Ext4(PathBuf),
    /// The directory that the bundle's configuration names, to be shared.
    Bundle,
}

impl Root {
    /// An image of the store, and what it says about how to run it.
    pub(crate) fn from_image(paths: &Paths, name: &str) -> Result<(Self, ImageDefaults), Failure> {
        let image = Store::open(paths.images())?.resolve(name)?;
        let layers = image.layers.into_iter().rev().collect();
        Ok((Self::Layers(layers), ImageDefaults::from(&image.config)))
    }

    /// A directory or an image file.
    pub(crate) fn from_path(path: &Path) -> Result<Self, Failure> {
        let context = || format!("cannot use {} as a root", path.display());
        let metadata = fs::metadata(path).map_err(|e| Failure::from(e).context(&context()))?;
        if metadata.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        match image_file::open(path)?.1 {
            Format::Erofs => Ok(Self::Layers(vec![path.to_owned()])),
            Format::Ext4 => Ok(Self::Ext4(path.to_owned())),
        }
    }

    /// Makes what does not exist yet, with a scratch disk of this size if there is to be one.
    pub(crate) async fn prepare(
        &self,
        claim: &Claim,
        scratch: Option<Size>,
    ) -> Result<RootSource<'static>, Failure> {
        let images = match self {
            Self::Bundle => return Ok(RootSource::Mounts(&[])),
            Self::Layers(layers) => layers.clone(),
            Self::Directory(directory) => vec![pack(directory, claim).await?],
            Self::Ext4(image) => {
                let (image, copy) = (image.clone(), claim.scratch());
                let context = format!("cannot copy {} to {}", image.display(), copy.display());
                let copied = tokio::task::spawn_blocking(move || {
                    fs::copy(&image, &copy)?;
                    File::options().read(true).write(true).open(&copy)
                });
                let disk = copied.await?.map_err(|e| Failure::from(e).context(&context))?;
                return Ok(RootSource::Opened(handover::Root::Ext4(disk)));
            }
        };
        let above = match scratch {
            Some(size) => Above::Disk(make_scratch(&claim.scratch(), size).await?),
            None => Above::Memory,
        };
        Ok(RootSource::Opened(handover::Root::Layers { images, above }))
    }
}

async fn pack(directory: &Path, claim: &Claim) -> Result<PathBuf, Failure> {
    let (directory, output) = (directory.to_owned(), claim.packed_root());
    let space = statvfs(&claim.data)?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let packed = output.clone();
    let packing = tokio::task::spawn_blocking(move || {
        let mut progress = Progress::start();
        directory::pack(&directory, &output, free, &mut |bytes| {
            progress.show(|| format!("packing {}: {}", directory.display(), Size(bytes)));
        })
    });
    let packing = packing.await?;
    packing.map_err(|e| {
        let place = claim.data.display();
        Failure::from(e)
            .context(&format!("cannot pack the root into {place}, with {} of free space", Size(free)))
    })?;
    Ok(packed)
}
