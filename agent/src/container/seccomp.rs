//! What a seccomp filter says to system calls that are newer than it.
//!
//! A C library tries a new call and takes an older one when it is told ENOSYS, and only then. A filter that names what it allows refuses
//! what was not there when it was written with another error, EPERM mostly. runc therefore answers ENOSYS to every call whose number is above
//! all that the filter names (libcontainer/seccomp/patchbpf); this does so for those that have a name.

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSyscall};

/// System calls since Linux 4.11, the oldest first: in the order of their numbers, which from the fourth on are the same on every
/// architecture. libcontainer skips those that its libseccomp does not know.
const CALLS: [&str; 49] = [
    "statx",
    "io_pgetevents",
    "rseq",
    "pidfd_send_signal",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
    "open_tree",
    "move_mount",
    "fsopen",
    "fsconfig",
    "fsmount",
    "fspick",
    "pidfd_open",
    "clone3",
    "close_range",
    "openat2",
    "pidfd_getfd",
    "faccessat2",
    "process_madvise",
    "epoll_pwait2",
    "mount_setattr",
    "quotactl_fd",
    "landlock_create_ruleset",
    "landlock_add_rule",
    "landlock_restrict_self",
    "memfd_secret",
    "process_mrelease",
    "futex_waitv",
    "set_mempolicy_home_node",
    "cachestat",
    "fchmodat2",
    "map_shadow_stack",
    "futex_wake",
    "futex_wait",
    "futex_requeue",
    "statmount",
    "listmount",
    "lsm_get_self_attr",
    "lsm_set_self_attr",
    "lsm_list_modules",
    "mseal",
    "setxattrat",
    "getxattrat",
    "listxattrat",
    "removexattrat",
    "open_tree_attr",
    "file_getattr",
    "file_setattr",
];

/// Has a filter that refuses what it does not name answer ENOSYS to calls that are newer than all that it names.
pub(super) fn answer_newer_calls(filter: &mut LinuxSeccomp) {
    const ENOSYS: u32 = libc::ENOSYS.cast_unsigned();
    let refuses = match filter.default_action() {
        LinuxSeccompAction::ScmpActErrno => filter.default_errno_ret() != Some(ENOSYS),
        LinuxSeccompAction::ScmpActKill
        | LinuxSeccompAction::ScmpActKillThread
        | LinuxSeccompAction::ScmpActKillProcess
        | LinuxSeccompAction::ScmpActTrap => true,
        _ => false,
    };
    let rules = filter.syscalls().as_deref().unwrap_or_default();
    let named = |call: &&str| rules.iter().any(|rule| rule.names().iter().any(|name| name == call));
    let newer = CALLS.iter().rposition(named).map_or(&CALLS[..], |newest| &CALLS[newest + 1..]);
    if !refuses || newer.is_empty() {
        return;
    }
    let mut rule = LinuxSyscall::default();
    rule.set_names(newer.iter().map(ToString::to_string).collect());
    rule.set_action(LinuxSeccompAction::ScmpActErrno).set_errno_ret(Some(ENOSYS));
    let mut rules = rules.to_vec();
    rules.push(rule);
    filter.set_syscalls(Some(rules));
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn answering(filter: &Value) -> LinuxSeccomp {
        let mut filter = serde_json::from_value(filter.clone()).unwrap();
        answer_newer_calls(&mut filter);
        filter
    }

    /// The names of the rule that was added.
    fn added(filter: &Value) -> Vec<String> {
        let rules = answering(filter).syscalls().clone().unwrap_or_default();
        let added = rules.into_iter().find(|rule| rule.errno_ret() == Some(38));
        added.map(|rule| rule.names().clone()).unwrap_or_default()
    }

    #[test]
    fn only_what_is_newer_than_all_that_is_named_is_added() {
        let filter = |newest: &str| {
            json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
                {"names": ["read", newest, "statx"], "action": "SCMP_ACT_ALLOW"},
                {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
            ]})
        };
        assert_eq!(added(&filter("write"))[..2], ["close_range", "openat2"]);
        assert_eq!(added(&filter("file_getattr")), ["file_setattr"]);
        assert!(added(&filter("file_setattr")).is_empty());
        let none = json!({"defaultAction": "SCMP_ACT_KILL", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]});
        assert_eq!(added(&none).len(), CALLS.len());
    }

    #[test]
    fn a_filter_that_lets_everything_else_through_or_says_enosys_is_left_alone() {
        for filter in [
            json!({"defaultAction": "SCMP_ACT_ALLOW"}),
            json!({"defaultAction": "SCMP_ACT_LOG"}),
            json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38}),
        ] {
            assert_eq!(answering(&filter), serde_json::from_value(filter).unwrap());
        }
    }

    #[test]
    fn the_kernel_says_enosys_to_newer_calls_alone() {
        let filter = answering(&json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [{"names": ["exit_group", "openat2"], "action": "SCMP_ACT_ALLOW"}]
        }));
        let error_of = |call| {
            // SAFETY: both calls take no arguments that matter when a filter refuses them.
            let refused = unsafe { libc::syscall(call, 0, 0, 0, 0) } == -1;
            std::io::Error::last_os_error().raw_os_error().filter(|_| refused)
        };
        // SAFETY: the child only loads the filter, makes system calls and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: this prctl takes numbers.
            let set = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
            let loaded = set == 0 && libcontainer::seccomp::initialize_seccomp(&filter).is_ok();
            let newer = error_of(libc::SYS_faccessat2) == Some(libc::ENOSYS);
            let older = error_of(libc::SYS_getppid) == Some(libc::EPERM);
            // SAFETY: it has no preconditions.
            unsafe { libc::_exit(i32::from(!(loaded && newer && older))) };
        }
        let mut status = 0;
        // SAFETY: waitpid writes one int.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "not loaded, or one of the errors is another");
    }
}
