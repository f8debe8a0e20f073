//! Named pipes between a test and a shim.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::vm::Result;

/// Makes a named pipe.
pub fn make(path: &Path) -> Result {
    Ok(mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)?)
}

/// The reading end of one.
pub struct Reader(File);

impl Reader {
    /// Opens it, whether or not there is a writer yet.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self(File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?))
    }

    /// Reads up to the end, which comes when the last writer has closed it. There has to be one by now, or to have been one.
    pub fn read_to_end(mut self) -> Result<Vec<u8>> {
        fcntl(&self.0, FcntlArg::F_SETFL(OFlag::empty()))?;
        let mut bytes = Vec::new();
        self.0.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads exactly so many bytes.
    pub fn read(&mut self, count: usize) -> Result<Vec<u8>> {
        fcntl(&self.0, FcntlArg::F_SETFL(OFlag::empty()))?;
        let mut bytes = vec![0; count];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
