//! Imports an image into a store and says what that cost: `import STORE SOURCE [NAME]`.

use std::error::Error;
use std::time::Instant;

use bulkhead_rootfs_builder::oci::Source;
use bulkhead_rootfs_builder::store::Store;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (store, source, name) = match arguments.as_slice() {
        [store, source] => (store, source, None),
        [store, source, name] => (store, source, Some(name.as_str())),
        _ => return Err("give the directory of a store, an image, and perhaps a name for it".into()),
    };
    let started = Instant::now();
    let store = Store::open(store)?;
    for image in store.import(&Source::Local(source.into()), name, &mut |_| {})? {
        println!("{} {:?}: {} layers, {} bytes", image.digest, image.names, image.layers.len(), image.size);
    }
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap_or_default();
    println!("{:?}, {peak}", started.elapsed());
    Ok(())
}
