//! All containers. Each has a data directory, and while it runs a run directory whose lock its launcher holds: a run
//! directory that nobody has locked belongs to a launcher that was killed.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use bulkhead_sandbox::paths::{Paths, private_directory};
use bulkhead_sandbox::pod;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::claim::Claim;
use super::files::{LOCK_FILE, is_locked, lock_file, remove_directory, remove_disks, subdirectories};
use super::record::{self, Outcome, RECORD_FILE, RUNNING_FILE, Record, Running};
use super::{cgroups, name};
use crate::failure::Failure;
use crate::message;

/// The exit code of a container whose launcher was killed: that of a SIGKILL.
const EXIT_KILLED: u8 = 137;

/// All containers of this host.
#[derive(Clone, Debug)]
pub(crate) struct Registry {
    paths: Paths,
}

/// What a container is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// It runs, or its machine is being made.
    Live(Running),
    /// It has ended.
    Exited(Outcome),
}

/// A container as it was found.
#[derive(Clone, Debug)]
pub(crate) struct Container {
    /// What it is.
    pub(crate) record: Record,
    /// What it is doing.
    pub(crate) state: State,
}

impl Registry {
    /// The registry, its directories made if need be.
    pub(crate) fn open(paths: &Paths) -> Result<Self, Failure> {
        let (containers, notes) = (paths.data.join("containers"), paths.run.join(cgroups::DIRECTORY));
        for directory in [&paths.data, &paths.run, &containers, &notes] {
            private_directory(directory)?;
        }
        Ok(Self { paths: paths.clone() })
    }

    /// Writes down a new container and claims it. A name that another container has is refused.
    pub(crate) fn create(&self, record: &Record, wants_name: bool) -> Result<Claim, Failure> {
        let _lock = self.lock()?;
        self.sweep()?;
        if wants_name {
            let taken = self.records()?.into_iter().find(|other| other.name == record.name);
            if let Some(other) = taken {
                return Err(Failure::new(format!(
                    "the name {:?} is that of container {}: remove it with `bulkhead rm`, or take another name",
                    record.name, other.id
                )));
            }
        }
        let run = self.run_directory(&record.id);
        private_directory(&run)?;
        let lock = lock_file(&run)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        private_directory(&self.data_directory(&record.id))?;
        let claim = Claim::new(self, &record.id, lock);
        claim.running(None)?;
        record::write(&claim.data, RECORD_FILE, record)?;
        Ok(claim)
    }

    /// All containers, the oldest first.
    pub(crate) fn list(&self) -> Result<Vec<Container>, Failure> {
        let _lock = self.lock()?;
        self.sweep()?;
        let mut containers = Vec::new();
        for record in self.records()? {
            let run = self.paths.container_run(&record.id);
            let state = match &record.outcome {
                Some(outcome) => State::Exited(outcome.clone()),
                // Neither outcome nor run directory: the host went down.
                None if !run.exists() => match self.bury(&record)? {
                    Some(outcome) => State::Exited(outcome),
                    None => continue,
                },
                None => match record::read(&run, RUNNING_FILE)? {
                    Some(running) => State::Live(running),
                    // Removed by its launcher since it was listed.
                    None => continue,
                },
            };
            containers.push(Container { record, state });
        }
        containers.sort_by_key(|container| container.record.created_at_ns);
        Ok(containers)
    }

    /// The container of this name, of this id, or the only one whose id begins like this.
    pub(crate) fn find(&self, reference: &str) -> Result<Container, Failure> {
        let containers = self.list()?;
        let exact = |c: &&Container| c.record.name == reference || c.record.id == reference;
        if let Some(found) = containers.iter().find(exact) {
            return Ok(found.clone());
        }
        let mut matching =
            containers.iter().filter(|c| !reference.is_empty() && c.record.id.starts_with(reference));
        let shown: String = reference.chars().take(64).collect();
        match (matching.next(), matching.next()) {
            (Some(found), None) => Ok(found.clone()),
            (None, _) => {
                Err(Failure::new(format!("there is no container {shown:?}: `bulkhead ps -a` lists all")))
            }
            (Some(_), Some(_)) => {
                Err(Failure::new(format!("{shown:?} is the beginning of several ids: give more of it")))
            }
        }
    }

    /// Removes what is kept of a container that does not run.
    pub(crate) fn remove(&self, id: &str) -> Result<(), Failure> {
        let _lock = self.lock()?;
        self.sweep()?;
        let run = self.paths.container_run(id);
        if is_locked(&run)? {
            return Err(Failure::new(format!(
                "container {id} is running: stop it first, or use `bulkhead rm -f`"
            )));
        }
        // A launcher that was killed while it removed its run directory may have left it without a lock.
        remove_directory(&run)?;
        remove_directory(&self.paths.container_data(id))
    }

    /// A handle on the process that runs a container; `None` when it has gone.
    pub(crate) fn supervisor(&self, container: &Container) -> Result<Option<OwnedFd>, Failure> {
        let State::Live(running) = container.state else { return Ok(None) };
        let handle = open_process(running.supervisor_pid)?;
        // Only if the lock is still held after that, the process of this number is the one that holds it.
        Ok(handle.filter(|_| self.runs(container)))
    }

    /// A handle on the VMM of a container that has started; `None` when it has gone, or its launcher has.
    pub(crate) fn vmm(&self, container: &Container) -> Result<Option<OwnedFd>, Failure> {
        let State::Live(Running { supervisor_pid, vmm_pid: Some(vmm_pid) }) = container.state else {
            return Ok(None);
        };
        let Ok(vmm_pid) = i32::try_from(vmm_pid) else { return Ok(None) };
        let handle = open_process(vmm_pid)?;
        // A child of the launcher that holds the lock: nobody else can have got its number.
        Ok(handle.filter(|_| parent(vmm_pid) == Some(supervisor_pid) && self.runs(container)))
    }

    /// True while a container's launcher holds its lock.
    fn runs(&self, container: &Container) -> bool {
        is_locked(&self.paths.container_run(&container.record.id)).unwrap_or(false)
    }

    /// Where connections to a running container's guest are made.
    pub(crate) fn socket(&self, id: &str) -> PathBuf {
        self.paths.container_run(id).join(pod::SOCKET_FILE)
    }

    /// The run directory of a container.
    pub(super) fn run_directory(&self, id: &str) -> PathBuf {
        self.paths.container_run(id)
    }

    /// What stands for the host's cgroup of a container.
    pub(super) fn cgroup_note(&self, id: &str) -> PathBuf {
        cgroups::note(&self.paths.run, id)
    }

    /// The data directory of a container.
    pub(crate) fn data_directory(&self, id: &str) -> PathBuf {
        self.paths.container_data(id)
    }

    /// Nobody else makes or finds containers while the result lives.
    pub(super) fn lock(&self) -> Result<File, Failure> {
        let lock = lock_file(&self.paths.run)?;
        flock(&lock, FlockOperation::LockExclusive)?;
        Ok(lock)
    }

    /// Cleans up after launchers that were killed. Their VMMs ended with them.
    fn sweep(&self) -> Result<(), Failure> {
        for run in subdirectories(&self.paths.run)? {
            // What is not surely ours stays: the user may have given us a directory that others use.
            let Some(id) = run.file_name().and_then(|name| name.to_str()).filter(|name| name::is_id(name))
            else {
                continue;
            };
            if !run.join(LOCK_FILE).is_file() || is_locked(&run)? {
                continue;
            }
            let data = self.paths.container_data(id);
            match record::read::<Record>(&data, RECORD_FILE) {
                Ok(Some(record)) if record.outcome.is_none() => drop(self.bury(&record)?),
                Ok(Some(_)) => {}
                // Killed before it had written anything that could be read.
                Ok(None) | Err(_) => remove_directory(&data)?,
            }
            remove_directory(&run)?;
            cgroups::bury(&self.cgroup_note(id));
        }
        cgroups::sweep(&self.paths.run)
    }

    /// Writes down that a container's launcher was killed, or forgets the container if nothing was to be kept of it.
    fn bury(&self, record: &Record) -> Result<Option<Outcome>, Failure> {
        let data = self.paths.container_data(&record.id);
        if record.auto_remove {
            remove_directory(&data)?;
            return Ok(None);
        }
        let outcome = Outcome {
            exit_code: EXIT_KILLED,
            finished_at_ns: record::now_ns(),
            error: Some("the launcher that ran this container was killed".into()),
        };
        remove_disks(&data)?;
        record::write(&data, RECORD_FILE, &Record { outcome: Some(outcome.clone()), ..record.clone() })?;
        Ok(Some(outcome))
    }

    fn records(&self) -> Result<Vec<Record>, Failure> {
        let mut records = Vec::new();
        for data in subdirectories(&self.paths.data.join("containers"))? {
            match record::read::<Record>(&data, RECORD_FILE) {
                Ok(record) => records.extend(record),
                // One that was damaged must not keep the user from all others.
                Err(error) => message::warn(&error.to_string()),
            }
        }
        Ok(records)
    }
}

/// A handle on a process; `None` when there is none of this number.
fn open_process(pid: i32) -> Result<Option<OwnedFd>, Failure> {
    let Some(pid) = Pid::from_raw(pid) else { return Ok(None) };
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(handle) => Ok(Some(handle)),
        Err(Errno::SRCH) => Ok(None),
        Err(errno) => Err(Failure::from(errno).context("cannot watch the container's processes")),
    }
}

/// The parent of a process that is there.
fn parent(pid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::super::files::SCRATCH_FILE;
    use super::super::record::new_record;
    use super::*;

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths { data: dir.path().join("data"), run: dir.path().join("run") };
        let registry = Registry::open(&paths).unwrap();
        (dir, registry)
    }

    fn outcome(exit_code: u8) -> Outcome {
        Outcome { exit_code, finished_at_ns: 1, error: None }
    }

    #[test]
    fn a_container_is_creating_then_running_then_exited() {
        let (_dir, registry) = registry();
        let record = new_record(Some("web")).unwrap();
        let claim = registry.create(&record, true).unwrap();
        let State::Live(creating) = registry.find("web").unwrap().state else { panic!("not creating") };
        assert_eq!(creating.vmm_pid, None);
        claim.running(Some(2)).unwrap();
        let container = registry.find(&record.id[..3]).unwrap();
        assert_eq!(container.state, State::Live(Running { vmm_pid: Some(2), ..creating }));
        assert!(registry.supervisor(&container).unwrap().is_some());
        assert!(registry.remove(&record.id).is_err());
        claim.finish(&record, Some(outcome(3))).unwrap();
        assert_eq!(registry.find(&record.id).unwrap().state, State::Exited(outcome(3)));
        assert!(!registry.run_directory(&record.id).exists());
        assert!(registry.supervisor(&container).unwrap().is_none());
        registry.remove(&record.id).unwrap();
        assert!(registry.find("web").is_err());
    }

    #[test]
    fn a_process_that_is_no_child_of_the_launcher_is_not_its_vmm() {
        let (_dir, registry) = registry();
        let record = new_record(None).unwrap();
        let claim = registry.create(&record, false).unwrap();
        let vmm_of = |pid| {
            claim.running(Some(pid)).unwrap();
            registry.vmm(&registry.find(&record.id).unwrap()).unwrap()
        };
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let found = vmm_of(child.id()).is_some();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found);
        // Of this number there is none any more; the other is a process, but another's child.
        assert!(vmm_of(child.id()).is_none());
        assert!(vmm_of(std::process::id()).is_none());
    }

    #[test]
    fn a_name_is_taken_once() {
        let (_dir, registry) = registry();
        let claim = registry.create(&new_record(Some("web")).unwrap(), true).unwrap();
        let error = registry.create(&new_record(Some("web")).unwrap(), true).unwrap_err();
        assert!(error.to_string().contains("bulkhead rm"), "{error}");
        drop(claim);
    }

    #[test]
    fn what_a_killed_launcher_left_is_cleaned_up_by_the_next_command() {
        let (_dir, registry) = registry();
        let kept = new_record(None).unwrap();
        let gone = Record { auto_remove: true, ..new_record(None).unwrap() };
        let claims = [registry.create(&kept, false).unwrap(), registry.create(&gone, false).unwrap()];
        fs::write(claims[0].scratch(), "x").unwrap();
        // The lock goes with the process; nothing else of it does.
        drop(claims);
        let containers = registry.list().unwrap();
        let [container] = &containers[..] else { panic!("{containers:?}") };
        let State::Exited(outcome) = &container.state else { panic!("{container:?}") };
        assert_eq!((container.record.id.as_str(), outcome.exit_code), (kept.id.as_str(), 137));
        assert!(!registry.data_directory(&kept.id).join(SCRATCH_FILE).exists());
        for path in [
            registry.run_directory(&kept.id),
            registry.run_directory(&gone.id),
            registry.data_directory(&gone.id),
        ] {
            assert!(!path.exists(), "{}", path.display());
        }
    }

    #[test]
    fn what_others_keep_in_the_run_directory_stays() {
        let (dir, registry) = registry();
        let run = dir.path().join("run");
        let without_lock = run.join("0123456789abcdef");
        let others = [run.join("systemd"), run.join("0123"), without_lock.clone()];
        for directory in &others {
            fs::create_dir(directory).unwrap();
            fs::write(directory.join("file"), "x").unwrap();
        }
        fs::write(run.join("systemd").join(LOCK_FILE), "").unwrap();
        let ours = new_record(None).unwrap();
        drop(registry.create(&ours, false).unwrap());
        registry.list().unwrap();
        assert!(!registry.run_directory(&ours.id).exists());
        for directory in &others {
            assert!(directory.join("file").exists(), "{}", directory.display());
        }
    }

    #[test]
    fn a_record_that_cannot_be_read_does_not_hide_the_others() {
        let (_dir, registry) = registry();
        let records = [new_record(Some("good")).unwrap(), new_record(Some("bad")).unwrap()];
        for record in &records {
            registry.create(record, true).unwrap().finish(record, Some(outcome(0))).unwrap();
        }
        fs::write(registry.data_directory(&records[1].id).join(RECORD_FILE), "").unwrap();
        let [container] = &registry.list().unwrap()[..] else { panic!("not one") };
        assert_eq!(container.record.name, "good");
        drop(registry.create(&new_record(Some("other")).unwrap(), true).unwrap());
    }

    #[test]
    fn a_reboot_leaves_no_container_running() {
        let (_dir, registry) = registry();
        let record = new_record(None).unwrap();
        drop(registry.create(&record, false).unwrap());
        fs::remove_dir_all(registry.run_directory(&record.id)).unwrap();
        assert!(matches!(registry.find(&record.id).unwrap().state, State::Exited(_)));
    }

    #[test]
    fn the_beginning_of_several_ids_names_none() {
        let (_dir, registry) = registry();
        let mut claims = Vec::new();
        for id in ["aa11", "aa22"] {
            claims.push(
                registry.create(&Record { id: id.into(), ..new_record(None).unwrap() }, false).unwrap(),
            );
        }
        assert_eq!(registry.find("aa1").unwrap().record.id, "aa11");
        assert!(registry.find("aa").unwrap_err().to_string().contains("several"));
        assert!(registry.find("").is_err());
    }
}
