//! Files of a cgroup and what is written to them, and why that cannot be.

use std::fs;
use std::io;
use std::path::Path;

use rustix::io::Errno;

use super::write_file;
use crate::zygote::protocol::FailureKind;

/// Why limits are refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the resources are no valid JSON of the OCI runtime specification")]
    Parse(#[from] serde_json::Error),
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    #[error("{0} cannot be {1}")]
    Value(&'static str, i64),
    #[error("memory.swap {0} is memory and swap together: it needs a memory.limit that is not greater")]
    Swap(i64),
    #[error("unified resource {0:?} names no file of the container's own cgroup")]
    Unified(String),
    #[error("hugepageLimits: {0:?} is no size of huge pages")]
    PageSize(String),
    #[error("{field} cannot be enforced: the guest's kernel has no {file}")]
    NotEnforced { field: String, file: String },
    #[error("{field}: the guest has no block device {device}; only the guest's own devices can be limited")]
    Device { field: String, device: String },
    #[error("the container uses {0} bytes of memory, more than the new limit of {1}")]
    Usage(u64, u64),
    #[error("{field}: write {value:?} to {file}")]
    Write { field: String, file: String, value: String, source: io::Error },
}

impl Error {
    /// What the failure means to the host.
    pub(crate) fn kind(&self) -> FailureKind {
        match self {
            Self::Usage(..) => FailureKind::Precondition,
            Self::Write { source, .. } => match Errno::from_io_error(source) {
                Some(Errno::INVAL | Errno::RANGE | Errno::OPNOTSUPP | Errno::NODEV) => FailureKind::Invalid,
                Some(Errno::BUSY) => FailureKind::Precondition,
                _ => FailureKind::Internal,
            },
            _ => FailureKind::Invalid,
        }
    }
}

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// What the configuration calls it.
    pub(super) field: String,
    pub(super) file: String,
    pub(super) value: Value,
    /// False for a limit that a kernel without this file keeps all the same: on pages of a size that it does not have.
    pub(super) needed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Value {
    Text(String),
    /// The period of `cpu.max`, whose quota comes first and stays as it is.
    Period(u64),
}

/// Writes all of them to the files of a group, or none when there is no file for one.
///
/// # Errors
/// [`Error`] with the first that could not be written; those before it hold.
pub(super) fn write(settings: &[Setting], directory: &Path) -> Result<(), Error> {
    let (there, missing): (Vec<_>, Vec<_>) =
        settings.iter().partition(|setting| directory.join(&setting.file).exists());
    if let Some(setting) = missing.into_iter().find(|setting| setting.needed) {
        let Setting { field, file, .. } = setting.clone();
        return Err(Error::NotEnforced { field, file });
    }
    // Two values may each forbid the other's change, such as a quota and a burst that must not be greater: what is
    // refused as it is now is tried again after the rest.
    let mut again = Vec::new();
    for setting in there {
        match setting.write(directory) {
            Err(Error::Write { source, .. }) if Errno::from_io_error(&source) == Some(Errno::INVAL) => {
                again.push(setting);
            }
            other => other?,
        }
    }
    again.into_iter().try_for_each(|setting| setting.write(directory))
}

impl Setting {
    fn write(&self, directory: &Path) -> Result<(), Error> {
        let path = directory.join(&self.file);
        let failed = |value: String| {
            |source| Error::Write { field: self.field.clone(), file: self.file.clone(), value, source }
        };
        let value = match &self.value {
            Value::Text(text) => text.clone(),
            Value::Period(period) => {
                let now = fs::read_to_string(&path).map_err(failed(String::new()))?;
                format!("{} {period}", now.split_ascii_whitespace().next().unwrap_or("max"))
            }
        };
        write_file(&path, &value).map_err(failed(value.clone())).map_err(|error| match error {
            Error::Write { field, source, .. }
                if self.file.starts_with("io.") && Errno::from_io_error(&source) == Some(Errno::NODEV) =>
            {
                let device = value.split(' ').next().unwrap_or_default().to_owned();
                Error::Device { field, device }
            }
            other => other,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(field: &str, file: &str, value: Value) -> Setting {
        Setting { field: field.into(), file: file.into(), value, needed: true }
    }

    #[test]
    fn nothing_is_written_when_a_file_is_missing() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("pids.max"), "").unwrap();
        let settings = [
            setting("pids.limit", "pids.max", Value::Text("5".into())),
            setting("blockIO.weight", "io.weight", Value::Text("1".into())),
        ];
        let error = write(&settings, directory.path()).unwrap_err();
        assert_eq!(error.kind(), FailureKind::Invalid);
        assert!(error.to_string().starts_with("blockIO.weight cannot be enforced"), "{error}");
        assert_eq!(fs::read_to_string(directory.path().join("pids.max")).unwrap(), "");
    }

    #[test]
    fn what_is_kept_without_a_file_needs_none() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("hugetlb.2MB.max"), "").unwrap();
        let huge = |file: &str| Setting {
            needed: false,
            ..setting("hugepageLimits", file, Value::Text("0".into()))
        };
        write(&[huge("hugetlb.1GB.max"), huge("hugetlb.2MB.max")], directory.path()).unwrap();
        assert_eq!(fs::read_to_string(directory.path().join("hugetlb.2MB.max")).unwrap(), "0");
        assert!(!directory.path().join("hugetlb.1GB.max").exists());
    }

    #[test]
    fn a_period_alone_keeps_the_quota() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("cpu.max");
        fs::write(&file, "70000 100000\n").unwrap();
        write(&[setting("cpu.period", "cpu.max", Value::Period(20000))], directory.path()).unwrap();
        assert!(fs::read_to_string(&file).unwrap().starts_with("70000 20000"));
    }

    #[test]
    fn what_the_kernel_says_is_told_apart() {
        let failed = |errno: Errno| Error::Write {
            field: "f".into(),
            file: "g".into(),
            value: "v".into(),
            source: errno.into(),
        };
        assert_eq!(failed(Errno::INVAL).kind(), FailureKind::Invalid);
        assert_eq!(failed(Errno::BUSY).kind(), FailureKind::Precondition);
        assert_eq!(failed(Errno::IO).kind(), FailureKind::Internal);
    }
}
