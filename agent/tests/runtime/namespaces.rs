//! Namespaces that containers have from each other, and a container without one for process ids.

use bulkhead_protocol::agent::Stdio;
use serde_json::json;
use ttrpc::Code;

use super::output;
use crate::support::{self, Container, code, run, shell};

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn containers_share_what_they_are_told_to() {
    run(async {
        let script = "for n in pid ipc uts net mnt cgroup; do readlink /proc/self/ns/$n; done";
        let mut spec = shell("sleep 100");
        spec["hostname"] = json!("pod");
        let first = Container::create("pod", &spec, Stdio::default()).await.unwrap();
        first.start().await.unwrap();
        first.exec("x", &["sh", "-c", script], output(), "").await.unwrap();
        let theirs = first.finish_exec("x").await.stdout;
        let all = [("pid", "pod"), ("ipc", "pod"), ("uts", "pod"), ("network", "pod")];

        let second = shell(&format!("{script}; hostname; ip link show lo | grep -c UP"));
        let second = Container::create_sharing("member", &second, output(), &all).await.unwrap();
        let ours = second.finish().await;
        let (ours, theirs): (Vec<_>, Vec<_>) = (ours.stdout.lines().collect(), theirs.lines().collect());
        assert_eq!(ours[..4], theirs[..4]);
        assert!(ours[4] != theirs[4] && ours[5] != theirs[5], "{ours:?} {theirs:?}");
        assert_eq!(ours[6..], ["pod", "1"]);
        first.remove(true).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_shared_process_namespace_ends_with_its_owner_and_not_with_a_member() {
    run(async {
        let owner = Container::create("owner", &shell("sleep 100"), Stdio::default()).await.unwrap();
        owner.start().await.unwrap();
        let shared = [("pid", "owner")];
        // Its second process is no child of its init, nor is its init process 1.
        let script = "echo $$; (sleep 100 & echo) >/dev/null; ps | grep -c 'sleep 100'; exec sleep 100";
        let container =
            Container::create_sharing("member1", &shell(script), output(), &shared).await.unwrap();
        let mut stdout = container.stream("", bulkhead_protocol::stream::Stream::Stdout).await;
        container.start().await.unwrap();
        let said = stdout.read_until("\n").await;
        assert_ne!(said.lines().next(), Some("1"), "{said}");
        container.exec("x", &["sh", "-c", "echo $$"], output(), "").await.unwrap();
        assert_ne!(container.finish_exec("x").await.stdout, "1\n");
        // An ordinary process, which a signal ends; what it leaves behind is killed.
        container.signal("", 15, false).await.unwrap();
        assert_eq!(container.wait("").await.exit_status, 143);
        container.remove(false).await.unwrap();
        assert!(!std::path::Path::new("/sys/fs/cgroup/bulkhead/member1").exists());
        owner.exec("y", &["true"], output(), "").await.unwrap();
        assert_eq!(owner.wait("y").await.exit_status, 0);

        // A signal to all reaches its own processes and no others.
        let spec = shell("sleep 100 & wait");
        let member = Container::create_sharing("member2", &spec, output(), &shared).await.unwrap();
        member.start().await.unwrap();
        member.signal("", 9, true).await.unwrap();
        assert_eq!(member.wait("").await.exit_status, 137);
        member.remove(false).await.unwrap();

        let member = Container::create_sharing("member3", &spec, output(), &shared).await.unwrap();
        member.start().await.unwrap();
        owner.signal("", 9, false).await.unwrap();
        assert_eq!(owner.wait("").await.exit_status, 137);
        assert_eq!(member.wait("").await.exit_status, 137);
        member.remove(false).await.unwrap();
        let late = Container::create_sharing("late", &shell("true"), output(), &shared).await;
        assert_eq!(code(late), Code::FAILED_PRECONDITION);
        owner.remove(false).await.unwrap();
        let later = Container::create_sharing("later", &shell("true"), output(), &shared).await;
        assert_eq!(code(later), Code::FAILED_PRECONDITION);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_shared_user_namespace_has_the_ids_of_its_owner() {
    run(async {
        let script = "cat /proc/self/uid_map | tr -s ' '; id -u; echo >/dev/stdout ok";
        let mut spec = shell("sleep 100");
        support::add_namespace(&mut spec, "user");
        support::without_mounts(&mut spec, "/sys");
        spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        let owner = Container::create("users", &spec, Stdio::default()).await.unwrap();
        owner.start().await.unwrap();
        let mut spec = shell(script);
        support::without_mounts(&mut spec, "/sys");
        let shared = [("user", "users"), ("ipc", "users"), ("uts", "users"), ("network", "users")];
        let member = Container::create_sharing("userof", &spec, output(), &shared).await.unwrap();
        let finished = member.finish().await;
        assert_eq!(finished.stdout.trim_start(), "0 100000 65536\n0\nok\n", "{}", finished.stderr);
        // A member's namespace can be shared on, and an exec joins it.
        let mut spec = shell("sleep 100");
        support::without_mounts(&mut spec, "/sys");
        let member = Container::create_sharing("userof2", &spec, Stdio::default(), &shared).await.unwrap();
        member.start().await.unwrap();
        member.exec("x", &["sh", "-c", script], output(), "").await.unwrap();
        assert_eq!(member.finish_exec("x").await.stdout.trim_start(), "0 100000 65536\n0\nok\n");
        let mut spec = shell(script);
        support::without_mounts(&mut spec, "/sys");
        let third =
            Container::create_sharing("userof3", &spec, output(), &[("user", "userof2")]).await.unwrap();
        assert_eq!(third.finish().await.stdout.trim_start(), "0 100000 65536\n0\nok\n");
        member.remove(true).await.unwrap();
        owner.remove(true).await.unwrap();

        // Who has none of its own has nothing to give.
        let owner = Container::create("nousers", &shell("sleep 100"), Stdio::default()).await.unwrap();
        let shared = [("user", "nousers")];
        let member = Container::create_sharing("userof4", &shell("id -u"), output(), &shared).await.unwrap();
        assert_eq!(member.finish().await.stdout, "0\n");
        owner.remove(false).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn what_cannot_be_shared_is_refused() {
    run(async {
        let other = Container::create("other", &shell("sleep 100"), Stdio::default()).await.unwrap();
        for (shared, expected) in [
            (&[("mount", "other")][..], Code::INVALID_ARGUMENT),
            (&[("cgroup", "other")], Code::INVALID_ARGUMENT),
            (&[("", "other")], Code::INVALID_ARGUMENT),
            (&[("ipc", "other"), ("ipc", "other")], Code::INVALID_ARGUMENT),
            (&[("ipc", "../other")], Code::INVALID_ARGUMENT),
            (&[("ipc", "nonesuch")], Code::FAILED_PRECONDITION),
            (&[("ipc", "self")], Code::FAILED_PRECONDITION),
        ] {
            let refused = Container::create_sharing("self", &shell("true"), output(), shared).await;
            assert_eq!(code(refused), expected, "{shared:?}");
        }
        let mut spec = shell("true");
        spec["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/pid");
        let error = Container::create("path", &spec, output()).await.err().unwrap();
        assert!(error.to_string().contains("pid namespace"), "{error}");
        assert_eq!(code(Err::<(), _>(error)), Code::INVALID_ARGUMENT);
        // One that was created and not started has namespaces, too.
        let member = Container::create_sharing("early", &shell("true"), output(), &[("ipc", "other")]).await;
        assert_eq!(member.unwrap().finish().await.status, 0);
        other.remove(false).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_container_without_a_process_namespace_is_whole_all_the_same() {
    run(async {
        let mut spec = shell("sleep 100 & wait");
        support::without_namespace(&mut spec, "pid");
        let container = Container::create("nopid", &spec, Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        container.exec("x", &["sh", "-c", "cat /proc/self/cgroup; echo $$"], output(), "").await.unwrap();
        let finished = container.finish_exec("x").await;
        let (cgroup, pid) = finished.stdout.split_once('\n').unwrap();
        assert_eq!(cgroup, "0::/", "{}", finished.stderr);
        assert!(pid.trim().parse::<u32>().unwrap() > 1, "{pid}");
        container.exec("y", &["sleep", "100"], output(), "").await.unwrap();
        container.signal("y", 15, false).await.unwrap();
        assert_eq!(container.wait("y").await.exit_status, 143);
        container.exec("z", &["sleep", "100"], output(), "").await.unwrap();
        // Its init's end is that of all the others.
        container.signal("", 15, false).await.unwrap();
        assert_eq!(container.wait("").await.exit_status, 143);
        assert_eq!(container.wait("z").await.exit_status, 137);
        container.remove(false).await.unwrap();
    });
}
