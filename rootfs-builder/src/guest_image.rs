//! The guest image: the agent, the directories that it mounts on, and nothing else.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::erofs::{Builder, Error as ErofsError, Metadata, Options};

/// Where the agent is in the image; the kernel is told `init=` this.
pub const AGENT: &str = "/agent";
/// Where the agent mounts devtmpfs, proc, sysfs and its tmpfs.
const MOUNT_POINTS: [(&str, u16); 5] =
    [("dev", 0o755), ("proc", 0o555), ("run", 0o755), ("sys", 0o555), ("tmp", 0o1777)];
/// More than the agent is ever allowed to weigh.
const MAX_SIZE: u64 = 256 << 20;

/// Why the guest image could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The agent cannot be read.
    #[error("reading the agent {path:?} failed; build it first and give its path with --agent")]
    Agent {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What was given as the agent is not a program.
    #[error("{path:?} is not an x86_64 ELF program; give the built agent with --agent")]
    NotElf {
        /// Its path.
        path: PathBuf,
    },
    /// The image cannot be written.
    #[error("writing the guest image {path:?} failed; check that its directory exists and has free space")]
    Output {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The image cannot be put together.
    #[error("building the guest image {path:?} failed; check that its directory has free space")]
    Erofs {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: ErofsError,
    },
}

/// Writes the guest image with the program at `agent` to `output`, which is replaced at once or not at all. The bytes depend
/// on the agent only.
///
/// # Errors
/// If the agent is not a readable `x86_64` ELF file, or the image cannot be written.
pub fn build(agent: &Path, output: &Path) -> Result<(), Error> {
    let agent_error = |source| Error::Agent { path: agent.into(), source };
    let output_error = |source| Error::Output { path: output.into(), source };
    let erofs_error = |source| Error::Erofs { path: output.into(), source };

    let mut program = File::open(agent).map_err(agent_error)?;
    let size = program.metadata().map_err(agent_error)?.len();
    check_elf(&program)
        .map_err(agent_error)?
        .then_some(())
        .ok_or_else(|| Error::NotElf { path: agent.into() })?;

    let directory = match output.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let temporary = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(directory)
        .map_err(output_error)?;
    let scratch = tempfile::tempfile_in(directory).map_err(output_error)?;
    let file = temporary.as_file().try_clone().map_err(output_error)?;
    let options = Options { uuid: *b"bulkhead-guest\0\0", max_size: MAX_SIZE };
    let mut image = Builder::new(file, scratch, options).map_err(erofs_error)?;
    let root = image.root();
    for (name, mode) in MOUNT_POINTS {
        let meta = Metadata { mode, ..Metadata::default() };
        image.add_directory((root, name.as_bytes()), meta).map_err(erofs_error)?;
    }
    let meta = Metadata { mode: 0o755, ..Metadata::default() };
    image.add_file((root, &AGENT.as_bytes()[1..]), meta, size, &mut program).map_err(erofs_error)?;
    image.finish().map_err(erofs_error)?;
    temporary.as_file().sync_all().map_err(output_error)?;
    temporary.persist(output).map_err(|error| output_error(error.error))?;
    Ok(())
}

fn check_elf(program: &File) -> io::Result<bool> {
    use std::os::unix::fs::FileExt;
    const MACHINE_X86_64: [u8; 2] = [62, 0];
    let mut header = [0; 20];
    match program.read_exact_at(&mut header, 0) {
        Ok(()) => Ok(header.starts_with(b"\x7fELF\x02") && header[18..20] == MACHINE_X86_64),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_agent_makes_the_same_image() {
        let directory = tempfile::tempdir().unwrap();
        let agent = std::env::current_exe().unwrap();
        let [first, second] = ["first", "second"].map(|name| directory.path().join(name));
        build(&agent, &first).unwrap();
        build(&agent, &second).unwrap();
        let image = std::fs::read(&first).unwrap();
        assert!(image == std::fs::read(&second).unwrap());
        assert!(image.len() as u64 > std::fs::metadata(&agent).unwrap().len());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_is_no_program_is_refused_and_the_old_image_stays() {
        let directory = tempfile::tempdir().unwrap();
        let [agent, output] = ["agent", "output"].map(|name| directory.path().join(name));
        std::fs::write(&output, "old").unwrap();
        assert!(matches!(build(&agent, &output), Err(Error::Agent { .. })));
        std::fs::write(&agent, "#!/bin/sh\n").unwrap();
        assert!(matches!(build(&agent, &output), Err(Error::NotElf { .. })));
        assert_eq!(std::fs::read(&output).unwrap(), b"old");
    }
}
