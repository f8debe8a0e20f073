//! Configurations as container engines make them.

use serde_json::{Value, json};

use super::output;
use crate::support::{Container, run};

/// What containerd 2.1 makes for `ctr run` and, with labels and a seccomp filter, for Kubernetes on a host with AppArmor or
/// SELinux.
fn containerd(script: &str) -> Value {
    let mut spec: Value = serde_json::from_str(include_str!("containerd.json")).unwrap();
    spec["process"]["args"] = json!(["sh", "-c", script]);
    spec
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_configuration_of_containerds_is_run_as_it_is() {
    run(async {
        let script = "hostname; ls -ln /dev/fuse | cut -d' ' -f1 | cut -c1-10; ls -d /dev/mqueue /run; id -G; \
                      grep -E '^(CapBnd|NoNewPrivs|Seccomp):' /proc/self/status; mkdir /x 2>&1; \
                      echo >/proc/sys/kernel/shmmax; cat /proc/kcore | wc -c";
        let finished = Container::create("ctr", &containerd(script), output()).await.unwrap().finish().await;
        assert_eq!(
            finished.stdout,
            "pod\ncrw-rw-rw-\n/dev/mqueue\n/run\n0 10\nCapBnd:\t00000000a80425fb\nNoNewPrivs:\t1\nSeccomp:\t2\n\
             mkdir: can't create directory '/x': Operation not permitted\n0\n",
            "{}",
            finished.stderr
        );
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn an_exec_with_labels_of_the_host_is_run() {
    run(async {
        let mut spec = containerd("sleep 100");
        spec["process"]["args"] = json!(["sleep", "100"]);
        spec["linux"]["seccomp"] = json!(null);
        let container =
            Container::create("label", &spec, bulkhead_protocol::agent::Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        let process = json!({
            "args": ["id", "-u"], "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/bin"],
            "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "system_u:system_r:container_t:s0"
        });
        container.exec_process("x", &process, output(), "").await.unwrap();
        assert_eq!(container.finish_exec("x").await.stdout, "0\n");
        container.remove(true).await.unwrap();
    });
}
