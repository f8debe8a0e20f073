//! `check`: whether this host can run containers in virtual machines, and what to do if not.

use std::ffi::{CStr, CString};
use std::fmt::Write;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use bulkhead_sandbox::artifacts::Artifacts;
use bulkhead_sandbox::config::Config;
use bulkhead_sandbox::paths::Paths;
use bulkhead_sandbox::size::Size;
use bulkhead_vmm::probe;
use kvm_ioctls::Kvm;
use rustix::fs::{statfs, statvfs};
use rustix::process::geteuid;
use rustix::system::uname;
use serde::Serialize;

use crate::cli::CheckArgs;
use crate::failure::Failure;
use crate::message;

/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: i64 = 0x6367_7270;
/// The first Linux with `mount_setattr`, which every directory that is shared needs.
const LINUX_LEAST: (u32, u32) = (5, 12);
/// The first whose overlayfs takes `lowerdir+`, a layer at a time.
const LINUX_LAYERS: (u32, u32) = (6, 8);
/// Less free disk than this is worth a warning.
const DISK_LOW: Size = Size(1 << 30);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    Warning,
    Failure,
}

/// One thing that was examined.
#[derive(Debug, Serialize)]
struct Line {
    what: &'static str,
    status: Status,
    found: String,
    /// What to do about it.
    advice: Option<String>,
}

fn ok(what: &'static str, found: impl Into<String>) -> Line {
    Line { what, status: Status::Ok, found: found.into(), advice: None }
}

fn warning(what: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Line {
    Line { what, status: Status::Warning, found: found.into(), advice: Some(advice.into()) }
}

fn failure(what: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Line {
    Line { what, status: Status::Failure, found: found.into(), advice: Some(advice.into()) }
}

/// Examines the host. Exits with 1 when something makes it unfit.
pub(crate) fn check(args: &CheckArgs) -> Result<u8, Failure> {
    let config = Config::from_environment()?;
    let mut lines = kvm_lines(&CString::new(config.paths.kvm.as_os_str().as_bytes())?);
    lines.push(kernel_line(&uname().release().to_string_lossy()));
    lines.push(user_line(geteuid().is_root()));
    lines.push(cgroup_line());
    lines.push(tun_line(Path::new("/dev/net/tun")));
    lines.extend(artifact_lines(&Artifacts::locate(&config.paths)?));
    lines.push(mke2fs_line());
    lines.push(memory_line(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), config.defaults.memory));
    lines.push(disk_line(&Paths::from_environment().data));
    if args.json {
        message::result(&format!("{}\n", serde_json::to_string_pretty(&lines)?));
    } else {
        message::result(&text(&lines));
    }
    Ok(u8::from(lines.iter().any(|line| line.status == Status::Failure)))
}

fn text(lines: &[Line]) -> String {
    let mut text = String::new();
    for line in lines {
        let status = match line.status {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Failure => "FAILURE",
        };
        // Writing to a string does not fail.
        let _ = writeln!(text, "{status:<9}{:<18}{}", line.what, line.found);
        if let Some(advice) = &line.advice {
            let _ = writeln!(text, "{:<27}-> {advice}", "");
        }
    }
    text
}

fn kernel_line(release: &str) -> Line {
    let what = "Linux";
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let text = |(major, minor): (u32, u32)| format!("{major}.{minor}");
    if version < LINUX_LEAST {
        failure(what, release, format!("use Linux {} or later", text(LINUX_LEAST)))
    } else if version < LINUX_LAYERS {
        let advice = format!(
            "containerd's overlayfs snapshotter needs Linux {} for images of several layers: use another one, or a newer kernel",
            text(LINUX_LAYERS)
        );
        warning(what, release, advice)
    } else {
        ok(what, release)
    }
}

fn kvm_lines(device: &CStr) -> Vec<Line> {
    let what = "/dev/kvm";
    let kvm = match Kvm::new_with_path(device) {
        Ok(kvm) => kvm,
        Err(error) => {
            let error = io::Error::from_raw_os_error(error.errno());
            let (found, advice) = match error.kind() {
                io::ErrorKind::NotFound => (
                    "missing".to_owned(),
                    "enable virtualization in the firmware and load kvm_amd or kvm_intel; in a virtual machine, have its host \
                     allow nested virtualization",
                ),
                io::ErrorKind::PermissionDenied => {
                    ("not permitted".to_owned(), "run as root or as a member of the group kvm")
                }
                _ => (error.to_string(), "load kvm_amd or kvm_intel"),
            };
            return vec![failure(what, found, advice)];
        }
    };
    let mut lines = vec![ok(what, "can be opened")];
    let (found, needed) = probe::api_versions(&kvm);
    if found != needed {
        lines.push(failure(
            "KVM API",
            format!("version {found}, not {needed}"),
            "use a Linux kernel of this decade",
        ));
        return lines;
    }
    lines.push(ok("KVM API", format!("version {found}")));
    let missing = probe::missing_capabilities(&kvm);
    if missing.is_empty() {
        let names: Vec<&str> = probe::REQUIRED.iter().map(|(name, _)| *name).collect();
        lines.push(ok("KVM capabilities", names.join(" ")));
    }
    lines.extend(missing.into_iter().map(|name| {
        failure(
            "KVM capabilities",
            format!("{name} is missing"),
            "use a newer Linux kernel on a supported processor",
        )
    }));
    lines.push(ring0_line(probe::ring0_instructions_per_second(&kvm)));
    lines
}

fn ring0_line(measured: Result<u64, probe::ProbeError>) -> Line {
    let what = "guest ring 0";
    match measured {
        Ok(speed) if speed >= probe::RING0_USABLE_PER_SECOND => {
            ok(what, format!("{} million instructions a second", speed / 1_000_000))
        }
        Ok(speed) => failure(
            what,
            format!("only {} thousand instructions a second", speed / 1000),
            "this KVM emulates kernels in software, too slowly to boot one: use a host with hardware virtualization, or the \
             project's lab (`make lab`)",
        ),
        Err(error) => failure(
            what,
            format!("a guest cannot be run: {}", Failure::from(error)),
            "this KVM is unusable: use a host with hardware virtualization, or the project's lab (`make lab`)",
        ),
    }
}

fn user_line(is_root: bool) -> Line {
    if is_root {
        return ok("user", "root: every VMM gets a uid of its own");
    }
    warning("user", "not root: VMMs run as you, without a jail", "run as root to have them locked up")
}

fn cgroup_line() -> Line {
    match statfs("/sys/fs/cgroup") {
        Ok(found) if found.f_type == CGROUP2_MAGIC => ok("cgroup v2", "mounted on /sys/fs/cgroup"),
        Ok(_) | Err(_) => warning(
            "cgroup v2",
            "not mounted on /sys/fs/cgroup",
            "boot with systemd.unified_cgroup_hierarchy=1: without it nothing limits on the host what a sandbox takes",
        ),
    }
}

fn tun_line(device: &Path) -> Line {
    if device.exists() {
        return ok("/dev/net/tun", "there");
    }
    warning(
        "/dev/net/tun",
        "missing",
        "load the module tun; containers have no network yet, but they will need it",
    )
}

fn artifact_lines(artifacts: &Artifacts) -> Vec<Line> {
    let kernel = artifacts.open_kernel().map_err(Failure::from).map(|_| {
        let version = artifacts.kernel_version().unwrap_or_else(|| "of an unknown version".into());
        format!("Linux {version}, {}", artifacts.kernel.display())
    });
    let image = artifacts.open_guest_image().map_err(Failure::from);
    let image = image.and_then(|file| Ok(format!("{}, {}", size(&file)?, artifacts.guest_image.display())));
    let programs = [
        ("VMM", program_version("bulkhead-vmm", &artifacts.vmm)),
        ("file server", program_version("bulkhead-fs", &artifacts.file_server)),
    ];
    programs
        .into_iter()
        .chain([("guest kernel", kernel), ("guest image", image)])
        .map(|(what, result)| match result {
            Ok(found) => ok(what, found),
            Err(error) => failure(what, error.to_string(), "install Bulkhead completely: make install"),
        })
        .collect()
}

fn size(file: &File) -> io::Result<Size> {
    Ok(Size(file.metadata()?.len()))
}

fn program_version(name: &str, path: &Path) -> Result<String, Failure> {
    let expected = format!("{name} {}", env!("CARGO_PKG_VERSION"));
    let said = program_says(path)?;
    if said == expected {
        return Ok(format!("{expected}, {}", path.display()));
    }
    Err(Failure::new(format!("{} is {said:?}, but this program needs {expected:?}", path.display())))
}

/// A program's own words about its version.
pub(super) fn program_says(path: &Path) -> Result<String, Failure> {
    let context = format!("cannot run {}", path.display());
    let output =
        Command::new(path).arg("--version").output().map_err(|e| Failure::from(e).context(&context))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().chars().take(80).collect())
}

fn mke2fs_line() -> Line {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let executable =
        |path: &PathBuf| fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o111 != 0);
    match directories.map(|directory| directory.join("mke2fs")).find(executable) {
        Some(found) => ok("mke2fs", found.display().to_string()),
        None => warning("mke2fs", "missing", "install e2fsprogs to use `run --storage`"),
    }
}

fn memory_line(meminfo: &str, wanted: Size) -> Line {
    let what = "free memory";
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.trim().strip_suffix(" kB")).and_then(|kib| kib.parse::<u64>().ok());
    match kib.map(|kib| Size(kib << 10)) {
        Some(free) if free >= wanted => ok(what, free.to_string()),
        Some(free) => warning(
            what,
            format!("{free}, but a sandbox may take {wanted}"),
            "free some memory, or give sandboxes less with --memory",
        ),
        None => warning(what, "unknown", "make /proc/meminfo readable"),
    }
}

/// Free space where containers and images are kept, or will be.
fn disk_line(data: &Path) -> Line {
    let what = "free disk";
    let existing = data.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match statvfs(existing) {
        Ok(found) => {
            let free = Size(found.f_bavail.saturating_mul(found.f_frsize));
            let found = format!("{free} for {}", data.display());
            if free >= DISK_LOW {
                ok(what, found)
            } else {
                warning(what, found, "free some space, or set BULKHEAD_ROOT")
            }
        }
        Err(errno) => warning(what, format!("unknown: {errno}"), "set BULKHEAD_ROOT to a usable directory"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_judged_by_its_version() {
        for (release, status) in [
            ("5.11.22-amd64", Status::Failure),
            ("5.12.0", Status::Warning),
            ("6.7.12+bpo-amd64", Status::Warning),
            ("6.8.0", Status::Ok),
            ("6.12.117+deb13-amd64", Status::Ok),
            ("10.0", Status::Ok),
            ("strange", Status::Failure),
        ] {
            assert_eq!(kernel_line(release).status, status, "{release}");
        }
    }

    #[test]
    fn a_missing_kvm_is_a_failure_with_advice() {
        let lines = kvm_lines(c"/nonexistent/kvm");
        assert_eq!((lines.len(), lines[0].status), (1, Status::Failure));
        assert!(text(&lines).contains("-> enable virtualization"), "{}", text(&lines));
    }

    #[test]
    fn a_software_kvm_is_told_by_its_speed() {
        assert_eq!(ring0_line(Ok(3_000_000_000)).status, Status::Ok);
        let slow = ring0_line(Ok(3_000_000));
        assert_eq!(slow.status, Status::Failure);
        assert!(slow.advice.unwrap().contains("make lab"));
    }

    #[test]
    fn missing_artifacts_are_failures_that_name_them() {
        let at = |name| PathBuf::from("/nonexistent").join(name);
        let artifacts = Artifacts {
            vmm: at("bulkhead-vmm"),
            file_server: at("bulkhead-fs"),
            kernel: at("vmlinux"),
            guest_image: at("guest.erofs"),
        };
        let lines = artifact_lines(&artifacts);
        assert!(
            lines.iter().all(|line| line.status == Status::Failure && line.found.contains("/nonexistent"))
        );
    }

    #[test]
    fn too_little_memory_is_a_warning() {
        let meminfo = "MemTotal:  4000000 kB\nMemAvailable:    1048576 kB\n";
        assert_eq!(memory_line(meminfo, Size(1 << 30)).status, Status::Ok);
        assert_eq!(memory_line(meminfo, Size((1 << 30) + 1)).status, Status::Warning);
        assert_eq!(memory_line("", Size(1)).status, Status::Warning);
    }

    #[test]
    fn programs_get_the_status_in_words() {
        let json = serde_json::to_value([ok("a", "b"), warning("c", "d", "e")]).unwrap();
        assert_eq!((&json[0]["status"], &json[1]["advice"]), (&"ok".into(), &"e".into()));
    }
}
