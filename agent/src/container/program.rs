//! The last step of a container's process: finding its program and becoming it.
//!
//! libcontainer calls this in the process itself, within the container and with its final rights. Why it fails has to
//! reach the host as more than a text, so it is written to a descriptor that the execution of the program closes.

use std::collections::HashMap;
use std::ffi::{CString, NulError};
use std::fs::{DirBuilder, File};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use oci_spec::runtime::{Process, Spec};
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::Errno;

use crate::zygote::protocol::{Failure, FailureKind};

/// Where programs are looked for when the environment does not say: Docker's default.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Executes what the configuration says.
#[derive(Clone)]
pub(super) struct Program {
    outcome: Rc<File>,
    directory: Option<PathBuf>,
}

impl Program {
    /// Failures are written to `outcome`, each in one piece. `directory` is made, if it is missing, and entered.
    pub(super) fn new(outcome: OwnedFd, directory: Option<PathBuf>) -> Self {
        Self { outcome: Rc::new(outcome.into()), directory }
    }

    fn enter(&self) -> Result<(), Failure> {
        let Some(directory) = &self.directory else { return Ok(()) };
        let made = DirBuilder::new().recursive(true).mode(0o755).create(directory);
        made.and_then(|()| std::env::set_current_dir(directory)).map_err(|error| {
            let text = format!("create the working directory {}: {error}", directory.display());
            Failure::new(FailureKind::Invalid, text)
        })
    }

    fn report(&self, failure: &Failure) {
        if let Ok(record) = postcard::to_stdvec(failure) {
            // When the agent is not there to read it, there is nobody to tell.
            let _ = (&*self.outcome).write_all(&record);
        }
    }
}

impl Executor for Program {
    /// Finds the program before the host is told that the process is ready to start.
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let process = spec.process().as_ref();
        let process = process.ok_or_else(|| Failure::new(FailureKind::Invalid, "no process"));
        let found = self.enter().and(process).and_then(find);
        found.map(drop).map_err(|failure| {
            self.report(&failure);
            ExecutorValidationError::ArgValidationError(failure.text)
        })
    }

    /// The environment is given to the program as the configuration has it, in order.
    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let failure = find(process).and_then(|program| execute(&program, process)).err();
        let failure = failure.unwrap_or_else(|| Failure::new(FailureKind::Internal, "execve returned"));
        self.report(&failure);
        Err(ExecutorError::Other(failure.text))
    }
}

fn find(process: &Process) -> Result<PathBuf, Failure> {
    let name = process.args().iter().flatten().next().map_or("", String::as_str);
    let path = variables(process).filter_map(|variable| variable.strip_prefix("PATH=")).next_back();
    search(name, path.unwrap_or(PATH))
}

fn variables(process: &Process) -> impl DoubleEndedIterator<Item = &str> {
    process.env().as_deref().unwrap_or_default().iter().map(String::as_str)
}

/// Looks for a program as a shell does: a name with a slash is a path, any other is searched in `path`.
fn search(name: &str, path: &str) -> Result<PathBuf, Failure> {
    let mut best = Errno::NOENT;
    let candidates: Vec<PathBuf> = match name {
        "" => Vec::new(),
        name if name.contains('/') => vec![PathBuf::from(name)],
        name => path.split(':').map(|directory| Path::new(directory).join(name)).collect(),
    };
    for candidate in candidates {
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            // A file that may not be executed says more than one that is not there.
            Err(Errno::NOENT) => {}
            Err(error) => best = error,
        }
    }
    let text = if name.contains('/') { "" } else { " in $PATH" };
    Err(failure(best, &format!("exec {name:?}: executable not found{text}"), name))
}

fn executable(path: &Path) -> Result<(), Errno> {
    let metadata = path.metadata().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    if metadata.is_dir() {
        return Err(Errno::ISDIR);
    }
    access(accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS), metadata.mode())
}

/// Whether a file may be executed. A seccomp filter that does not know `faccessat2` says that it may not be called; then the mode of the
/// file has to do, as for Go's `exec.LookPath`.
fn access(said: Result<(), Errno>, mode: u32) -> Result<(), Errno> {
    match said {
        Err(Errno::NOSYS | Errno::PERM) if mode & 0o111 != 0 => Ok(()),
        Err(Errno::NOSYS | Errno::PERM) => Err(Errno::ACCESS),
        said => said,
    }
}

fn execute(program: &Path, process: &Process) -> Result<(), Failure> {
    let name = program.to_string_lossy();
    let invalid =
        |_: NulError| Failure::new(FailureKind::Invalid, "an argument or variable holds a NUL byte");
    let file = CString::new(name.as_bytes()).map_err(invalid)?;
    let strings = |list: &Option<Vec<String>>| -> Result<Vec<CString>, Failure> {
        list.iter().flatten().map(|text| CString::new(text.as_str()).map_err(invalid)).collect()
    };
    let (arguments, variables) = (strings(process.args())?, strings(process.env())?);
    let (arguments, variables) = (pointers(&arguments), pointers(&variables));
    // SAFETY: all three are NUL-terminated, the arrays end in null, and what they point to outlives the call.
    unsafe { libc::execve(file.as_ptr(), arguments.as_ptr(), variables.as_ptr()) };
    let error = Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO);
    // The file is there, or `find` would not have found it.
    Err(failure(error, &format!("exec {name:?}: no such file: its interpreter is missing"), &name))
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([std::ptr::null()]).collect()
}

/// What an error of finding or executing a program means: 127, 126, or neither.
fn failure(error: Errno, not_found: &str, name: &str) -> Failure {
    match error {
        Errno::NOENT => Failure::new(FailureKind::CommandNotFound, not_found),
        Errno::ACCESS | Errno::ISDIR | Errno::NOTDIR | Errno::NOEXEC | Errno::PERM | Errno::LOOP => {
            Failure::new(FailureKind::CommandNotExecutable, format!("exec {name:?}: {error}"))
        }
        _ => Failure::new(FailureKind::Internal, format!("exec {name:?}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn kind(result: Result<PathBuf, Failure>) -> FailureKind {
        result.unwrap_err().kind
    }

    #[test]
    fn programs_are_found_or_it_is_said_why_not() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, mode| {
            let path = directory.path().join(name);
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let (good, plain) = (file("good", 0o755), file("plain", 0o644));
        let path = format!("/nonexistent:{}", directory.path().display());

        assert_eq!(search("good", &path).unwrap(), good);
        assert_eq!(search(good.to_str().unwrap(), "").unwrap(), good);
        assert_eq!(kind(search("plain", &path)), FailureKind::CommandNotExecutable);
        assert_eq!(kind(search(plain.to_str().unwrap(), "")), FailureKind::CommandNotExecutable);
        assert_eq!(kind(search("missing", &path)), FailureKind::CommandNotFound);
        assert_eq!(kind(search("", &path)), FailureKind::CommandNotFound);
        assert_eq!(kind(search("/", &path)), FailureKind::CommandNotExecutable);
        assert_eq!(kind(search("/etc/passwd/x", &path)), FailureKind::CommandNotExecutable);
    }

    #[test]
    fn the_mode_counts_when_access_cannot_be_asked_for() {
        for filtered in [Errno::PERM, Errno::NOSYS] {
            assert_eq!(access(Err(filtered), 0o100_755), Ok(()));
            assert_eq!(access(Err(filtered), 0o100_644), Err(Errno::ACCESS));
        }
        assert_eq!(access(Err(Errno::ACCESS), 0o100_755), Err(Errno::ACCESS));
    }

    #[test]
    fn a_name_that_is_missing_is_quoted_in_the_text() {
        assert!(search("missing", "/nonexistent").unwrap_err().text.contains("\"missing\""));
    }
}
