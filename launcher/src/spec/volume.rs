//! Files and directories of the host in a container, as `-v` and `--mount` name them.

use std::fmt::Display;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf, absolute};

use oci_spec::runtime::{Mount, MountBuilder};

use crate::failure::Failure;
use crate::message;

/// A file or directory of the host and where a container has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    source: PathBuf,
    /// Absolute, without `.` and `..`.
    destination: PathBuf,
    read_only: bool,
}

/// Why a text names no volume.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum VolumeError {
    #[error("give SRC:DST or SRC:DST:ro, such as ./data:/data")]
    Form,
    #[error("{0:?} is no path, and there are no named volumes: begin it with '/' or './'")]
    Name(String),
    #[error("{0:?} in the container is not absolute: begin it with '/'")]
    Relative(String),
    #[error("{0:?} has \"..\" in it: say where it leads")]
    Parent(String),
    #[error("nothing can be mounted on {0} of a container")]
    Reserved(PathBuf),
    #[error("there is no option {0:?} for a volume: 'ro' and 'rw' are possible")]
    Option(String),
    #[error("give type=bind,source=PATH,target=PATH: there are no other types")]
    Type,
    #[error("there is no key {0:?}: give type=bind,source=PATH,target=PATH and, if wanted, readonly")]
    Key(String),
    #[error("it has no {0}")]
    Missing(&'static str),
    #[error("{0:?} is neither true nor false")]
    Bool(String),
}

/// `SRC:DST[:ro]`, the value of `-v`.
pub(crate) fn parse_volume(text: &str) -> Result<Volume, VolumeError> {
    let (source, destination, options) = match text.split(':').collect::<Vec<_>>()[..] {
        [source, destination] => (source, destination, ""),
        [source, destination, options] => (source, destination, options),
        _ => return Err(VolumeError::Form),
    };
    if source.is_empty() || destination.is_empty() {
        return Err(VolumeError::Form);
    }
    // Elsewhere, a name without a slash is that of a volume.
    if !source.starts_with(['/', '.']) {
        return Err(VolumeError::Name(source.into()));
    }
    let mut read_only = false;
    for option in options.split(',').filter(|option| !option.is_empty()) {
        read_only = match option {
            "ro" | "readonly" => true,
            "rw" => false,
            other => return Err(VolumeError::Option(other.into())),
        };
    }
    Volume::new(source, destination, read_only)
}

/// `type=bind,source=SRC,target=DST[,readonly]`, the value of `--mount`.
pub(crate) fn parse_mount(text: &str) -> Result<Volume, VolumeError> {
    let (mut source, mut target, mut read_only, mut is_bind) = (None, None, false, false);
    for field in text.split(',') {
        let (key, value) = field.split_once('=').map_or((field, None), |(key, value)| (key, Some(value)));
        match (key, value) {
            ("type", Some("bind")) => is_bind = true,
            ("type", _) => return Err(VolumeError::Type),
            ("source" | "src", Some(path)) => source = Some(path),
            ("target" | "destination" | "dst", Some(path)) => target = Some(path),
            ("readonly" | "ro", value) => {
                read_only = match value {
                    None | Some("true" | "1") => true,
                    Some("false" | "0") => false,
                    Some(other) => return Err(VolumeError::Bool(other.into())),
                }
            }
            (other, _) => return Err(VolumeError::Key(other.into())),
        }
    }
    if !is_bind {
        return Err(VolumeError::Type);
    }
    let given =
        |path: Option<_>, name| path.filter(|path: &&str| !path.is_empty()).ok_or(VolumeError::Missing(name));
    Volume::new(given(source, "source")?, given(target, "target")?, read_only)
}

impl Volume {
    fn new(source: &str, destination: &str, read_only: bool) -> Result<Self, VolumeError> {
        if !destination.starts_with('/') {
            return Err(VolumeError::Relative(destination.into()));
        }
        let mut clean = PathBuf::new();
        for component in Path::new(destination).components() {
            if component == Component::ParentDir {
                return Err(VolumeError::Parent(destination.into()));
            }
            clean.push(component);
        }
        // What the guest's own are.
        let is_reserved = clean == Path::new("/") || clean == Path::new("/dev") || clean.starts_with("/proc");
        if is_reserved {
            return Err(VolumeError::Reserved(clean));
        }
        Ok(Self { source: source.into(), destination: clean, read_only })
    }

    /// The mount of a configuration. What is at the source is looked at: it must be there, and should not be a socket.
    fn mount(&self) -> Result<Mount, Failure> {
        let source = absolute(&self.source)?;
        let refused = |why: &dyn Display| Failure::new(format!("cannot mount {}: {why}", source.display()));
        let kind = match fs::metadata(&source) {
            Ok(metadata) => metadata.file_type(),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(refused(&"it does not exist: make it first, or correct its name"));
            }
            Err(error) => return Err(refused(&error)),
        };
        if kind.is_block_device() || kind.is_char_device() {
            return Err(refused(&"devices of the host are not shared with a virtual machine"));
        }
        if kind.is_socket() {
            message::warn(&format!(
                "{} is a socket: nobody listens on it in the container, whose machine is another one",
                source.display()
            ));
        }
        let access = if self.read_only { "ro" } else { "rw" };
        Ok(MountBuilder::default()
            .typ("bind")
            .source(source)
            .destination(&self.destination)
            .options(["rbind", access].map(String::from).to_vec())
            .build()?)
    }
}

/// The mounts of a configuration that has some already: those of `volumes` come after them, and in the place of what is mounted
/// where one of them is. A directory comes before what is mounted below it, whatever the order of the command line.
pub(crate) fn add<'a>(
    mounts: &mut Vec<Mount>,
    volumes: impl Iterator<Item = &'a Volume>,
) -> Result<(), Failure> {
    let mut volumes: Vec<&Volume> = volumes.collect();
    volumes.sort_by_key(|volume| volume.destination.components().count());
    for (n, volume) in volumes.iter().enumerate() {
        let destination = &volume.destination;
        if volumes[..n].iter().any(|other| other.destination == *destination) {
            return Err(Failure::new(format!("two volumes are to be at {}", destination.display())));
        }
        mounts.retain(|mount| mount.destination() != destination);
    }
    for volume in volumes {
        mounts.push(volume.mount()?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::get_default_mounts;
    use proptest::prelude::*;

    use super::*;

    fn volume(source: &str, destination: &str, read_only: bool) -> Volume {
        Volume { source: source.into(), destination: destination.into(), read_only }
    }

    #[test]
    fn a_volume_is_written_as_docker_has_it() {
        for (text, expected) in [
            ("/srv:/data", volume("/srv", "/data", false)),
            ("./srv:/data:ro", volume("./srv", "/data", true)),
            ("..:/data//x/./:rw", volume("..", "/data/x", false)),
        ] {
            assert_eq!(parse_volume(text).unwrap(), expected, "{text}");
        }
        for (text, expected) in [
            ("type=bind,source=/srv,target=/data", volume("/srv", "/data", false)),
            ("type=bind,src=srv,dst=/data,readonly", volume("srv", "/data", true)),
            ("destination=/data,ro=true,type=bind,src=/a:b", volume("/a:b", "/data", true)),
            ("type=bind,src=/srv,dst=/data,readonly=false", volume("/srv", "/data", false)),
        ] {
            assert_eq!(parse_mount(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_volume_is_refused_with_what_to_write() {
        for (text, words) in [
            ("/srv", "SRC:DST"),
            ("/srv:", "SRC:DST"),
            (":/data", "SRC:DST"),
            ("/a:/b:ro:x", "SRC:DST"),
            ("data:/data", "named volumes"),
            ("/srv:data", "absolute"),
            ("/srv:/a/../b", "\"..\""),
            ("/srv:/", "nothing can be mounted on /"),
            ("/srv:/dev/", "nothing can be mounted on /dev"),
            ("/srv:/proc/sys", "/proc/sys"),
            ("/srv:/data:z", "\"z\""),
        ] {
            let error = parse_volume(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        for (text, words) in [
            ("source=/srv,target=/data", "type=bind"),
            ("type=volume,source=a,target=/data", "type=bind"),
            ("type=bind,target=/data", "no source"),
            ("type=bind,source=,target=/data", "no source"),
            ("type=bind,source=/srv", "no target"),
            ("type=bind,source=/srv,target=/data,readonly=maybe", "\"maybe\""),
            ("type=bind,source=/srv,target=/data,size=3", "\"size\""),
            ("", "key"),
        ] {
            let error = parse_mount(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn volumes_take_the_place_of_other_mounts_and_directories_come_first() {
        let mut mounts = get_default_mounts();
        let volumes = [volume("/", "/a/b", true), volume("/", "/dev/shm", false), volume("/", "/a", false)];
        add(&mut mounts, volumes.iter()).unwrap();
        assert_eq!(mounts.len(), get_default_mounts().len() - 1 + 3);
        let last: Vec<_> = mounts.iter().rev().take(3).map(|mount| mount.destination().clone()).collect();
        assert_eq!(last, ["/dev/shm", "/a/b", "/a"].map(PathBuf::from));
        let read_only = |mount: &Mount| mount.options().as_ref().unwrap().contains(&"ro".to_owned());
        assert!(read_only(&mounts[mounts.len() - 2]) && !read_only(&mounts[mounts.len() - 3]));
    }

    #[test]
    fn volumes_that_cannot_be_had_are_named() {
        let refused = |volumes: &[Volume]| add(&mut Vec::new(), volumes.iter()).unwrap_err().to_string();
        assert!(refused(&[volume("/nonexistent", "/a", false)]).contains("/nonexistent: it does not exist"));
        assert!(refused(&[volume("/dev/null", "/a", false)]).contains("/dev/null: devices"));
        assert!(refused(&[volume("/", "/a", false), volume("/etc", "/a", true)]).contains("at /a"));
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_understood(text in "[a-z/.,:=]{0,32}") {
            for parsed in [parse_volume(&text), parse_mount(&text)].into_iter().flatten() {
                prop_assert!(parsed.destination.is_absolute() && parsed.destination != Path::new("/"));
            }
        }
    }
}
