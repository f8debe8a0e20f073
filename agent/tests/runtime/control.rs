//! Limits that change, pausing, and kills for want of memory.

use std::time::Duration;

use bulkhead_protocol::agent::Stdio;
use serde_json::json;
use tokio::time::timeout;
use ttrpc::Code;

use super::output;
use crate::support::{self, Container, code, run, shell};

fn file(id: &str, name: &str) -> String {
    std::fs::read_to_string(format!("/sys/fs/cgroup/bulkhead/{id}/{name}")).unwrap().trim().to_owned()
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn limits_change_while_a_container_runs() {
    run(async {
        let mut spec = shell("sleep 100");
        spec["linux"]["resources"] = json!({
            "memory": {"limit": 67_108_864, "swap": 67_108_864}, "pids": {"limit": 20},
            "cpu": {"quota": 50000, "period": 100_000, "shares": 512}
        });
        let container = Container::create("update", &spec, Stdio::default()).await.unwrap();
        // What is created has a cgroup as well.
        container.update(&json!({"pids": {"limit": 21}})).await.unwrap();
        assert_eq!(file("update", "pids.max"), "21");
        container.start().await.unwrap();
        container
            .update(&json!({
                "memory": {"limit": 134_217_728, "swap": 150_994_944, "reservation": 33_554_432},
                "cpu": {"period": 20000, "shares": 2048, "cpus": "0", "mems": "0"},
                "blockIO": {"throttleWriteIOPSDevice": [{"major": 7, "minor": 0, "rate": 100}]},
                "unified": {"memory.high": "120000512"},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "3MB", "limit": 0}],
                "devices": [{"allow": false, "access": "rwm"}]
            }))
            .await
            .unwrap();
        for (name, expected) in [
            ("memory.max", "134217728"),
            ("memory.swap.max", "16777216"),
            ("memory.low", "33554432"),
            ("memory.high", "120000512"),
            ("hugetlb.2MB.max", "0"),
            ("cpu.max", "50000 20000"),
            ("cpuset.cpus", "0"),
            ("cpuset.mems", "0"),
            ("io.max", "7:0 rbps=max wbps=max riops=max wiops=100"),
            ("pids.max", "21"),
        ] {
            assert_eq!(file("update", name), expected, "{name}");
        }
        let weight: u64 = file("update", "cpu.weight").parse().unwrap();
        assert!((150..250).contains(&weight), "{weight}");
        // No more than what is mentioned, and none where -1 says so.
        container
            .update(&json!({"memory": {"limit": -1}, "pids": {"limit": -1}, "cpu": {"quota": -1}}))
            .await
            .unwrap();
        for (name, expected) in [
            ("memory.max", "max"),
            ("memory.swap.max", "max"),
            ("memory.low", "33554432"),
            ("cpu.max", "max 20000"),
            ("pids.max", "max"),
            ("cpuset.cpus", "0"),
        ] {
            assert_eq!(file("update", name), expected, "{name}");
        }
        container.remove(true).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn quotas_and_bursts_move_together_in_both_directions() {
    run(async {
        let container = Container::create("burst", &shell("sleep 100"), Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        for (quota, burst) in [(20000, 10000), (80000, 60000), (20000, 5000)] {
            let cpu = json!({"cpu": {"quota": quota, "period": 100_000, "burst": burst}});
            container.update(&cpu).await.unwrap();
            assert_eq!(file("burst", "cpu.max"), format!("{quota} 100000"));
            assert_eq!(file("burst", "cpu.max.burst"), burst.to_string());
        }
        container.remove(true).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_new_limit_holds_when_the_call_answers() {
    run(async {
        let container = Container::create("holds-now", &shell("sleep 100"), Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        container.update(&json!({"pids": {"limit": 1}})).await.unwrap();
        // The exec's own processes are too many now.
        assert!(container.exec("x", &["true"], output(), "").await.is_err());
        container.update(&json!({"pids": {"limit": 20}})).await.unwrap();
        container.exec("y", &["true"], output(), "").await.unwrap();
        assert_eq!(container.wait("y").await.exit_status, 0);
        container.remove(true).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn limits_that_nobody_can_keep_are_refused_by_name() {
    run(async {
        let container = Container::create("norule", &shell("sleep 100"), Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        let none = json!([{"major": 250, "minor": 77, "rate": 1}]);
        for (resources, word) in [
            (json!({"blockIO": {"throttleReadBpsDevice": none}}), "no block device 250:77"),
            (json!({"memory": {"swappiness": 1}}), "swappiness"),
            (json!({"cpu": {"cpus": "zero"}}), "cpu.cpus"),
            (json!({"unified": {"cgroup.freeze": "1"}}), "cgroup.freeze"),
            (json!({"unified": {"memory.nonesuch": "1"}, "pids": {"limit": 5}}), "memory.nonesuch"),
            (json!("none"), "JSON"),
        ] {
            let error = container.update(&resources).await.expect_err(word);
            assert!(error.to_string().contains(word), "{resources}: {error}");
            assert_eq!(code(Err::<(), _>(error)), Code::INVALID_ARGUMENT, "{resources}");
        }
        let check = json!({"memory": {"limit": 4096, "checkBeforeUpdate": true}});
        assert_eq!(code(container.update(&check).await), Code::FAILED_PRECONDITION);
        assert_eq!((file("norule", "memory.max"), file("norule", "pids.max")), ("max".into(), "max".into()));
        container.remove(true).await.unwrap();
        assert_eq!(code(container.update(&json!({})).await), Code::NOT_FOUND);

        // The same at creation, of which nothing is left.
        let mut spec = shell("true");
        spec["linux"]["resources"] = json!({"blockIO": {"throttleReadBpsDevice": none}});
        let error = Container::create("norule", &spec, output()).await.err().unwrap();
        assert!(error.to_string().contains("only the guest's own devices"), "{error}");
        assert_eq!(code(Err::<(), _>(error)), Code::INVALID_ARGUMENT);
        assert!(!std::path::Path::new("/sys/fs/cgroup/bulkhead/norule").exists());
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_paused_container_stands_still_until_it_goes_on() {
    run(async {
        let script = "while :; do :; done";
        let container = Container::create("pause", &shell(script), Stdio::default()).await.unwrap();
        assert_eq!(code(container.pause().await), Code::FAILED_PRECONDITION);
        container.start().await.unwrap();
        let used = || async { container.stats().await.unwrap().cpu["usage_usec"] };
        for _ in 0..3 {
            container.pause().await.unwrap();
            container.pause().await.unwrap();
            assert!(file("pause", "cgroup.events").contains("frozen 1"));
            let before = used().await;
            assert_eq!(code(container.exec("x", &["true"], output(), "").await), Code::FAILED_PRECONDITION);
            assert_eq!(used().await, before);
            container.resume().await.unwrap();
            container.resume().await.unwrap();
            assert!(file("pause", "cgroup.events").contains("frozen 0"));
        }
        container.exec("x", &["true"], output(), "").await.unwrap();
        assert_eq!(container.wait("x").await.exit_status, 0);
        container.pause().await.unwrap();
        // A signal that can be put off is.
        container.signal("", 15, false).await.unwrap();
        container.signal("", 9, false).await.unwrap();
        assert_eq!(container.wait("").await.exit_status, 137);
        assert_eq!(code(container.pause().await), Code::FAILED_PRECONDITION);
        assert_eq!(code(container.resume().await), Code::FAILED_PRECONDITION);
        container.remove(false).await.unwrap();

        let container =
            Container::create("pause", &shell("sleep 100 & wait"), Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        container.pause().await.unwrap();
        container.remove(true).await.unwrap();
        assert_eq!(code(container.pause().await), Code::NOT_FOUND);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn all_processes_of_a_paused_container_can_be_killed() {
    run(async {
        let container =
            Container::create("frozen", &shell("sleep 100 & wait"), Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        container.pause().await.unwrap();
        container.signal("", 9, true).await.unwrap();
        assert_eq!(container.wait("").await.exit_status, 137);
        container.remove(false).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn kills_for_want_of_memory_are_told_to_all_who_watch() {
    run(async {
        let mut spec = shell("sleep 100");
        spec["linux"]["resources"] = json!({"memory": {"limit": 33_554_432, "swap": 33_554_432}});
        support::writable_cgroups(&mut spec);
        let container = Container::create("oom", &spec, Stdio::default()).await.unwrap();
        let watch = |known| {
            let container = container.another();
            tokio::spawn(async move { container.watch_oom(known).await })
        };
        let (first, second, later) = (watch(0), watch(0), watch(1));
        container.start().await.unwrap();
        let hog = ["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"];
        container.exec("hog", &hog, output(), "").await.unwrap();
        assert_eq!(container.wait("hog").await.exit_status, 137);
        assert_eq!((first.await.unwrap().unwrap(), second.await.unwrap().unwrap()), (1, 1));
        // Known at once to who comes late, and nothing to who knows it.
        assert_eq!(container.watch_oom(0).await.unwrap(), 1);
        assert!(timeout(Duration::from_millis(200), container.watch_oom(1)).await.is_err());
        container.exec("hog2", &hog, output(), "").await.unwrap();
        assert_eq!(later.await.unwrap().unwrap(), 2);
        let last = watch(2);
        container.signal("", 9, true).await.unwrap();
        assert_eq!(container.wait("").await.exit_status, 137);
        container.remove(false).await.unwrap();
        assert_eq!(code(last.await.unwrap()), Code::NOT_FOUND);
        assert_eq!(code(container.watch_oom(0).await), Code::NOT_FOUND);
    });
}
