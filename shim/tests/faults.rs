//! What is killed, hangs or is damaged, and what containerd gets to see of it.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use containerd_shim_protos::api::{self, Status};
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::TaskClient;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use serde_json::json;
use support::{Host, NAMESPACE, kill, lives, until};
use ttrpc::Code;

const SIGKILL: u32 = 9;

#[tokio::test]
async fn a_vmm_that_is_killed_ends_all_its_containers_and_they_can_be_deleted() {
    let host = Host::new().await;
    let pod = json!({"io.containerd.runc.v2.group": "pod"});
    host.bundle("one", &["/bin/sleep", "600"], &[], &pod);
    host.bundle("two", &["/bin/sleep", "600"], &[], &pod);
    let one = host.start("one").await;
    let two = host.start("two").await;
    for shim in [&one, &two] {
        shim.create(&shim.request()).await.unwrap();
        shim.start("").await.unwrap();
    }
    one.exec(&one.exec_request("e", &["/bin/sleep", "600"])).await.unwrap();
    one.start("e").await.unwrap();
    kill(one.state("").await.unwrap().pid);
    for (shim, exec) in [(&one, "e"), (&one, ""), (&two, "")] {
        assert_eq!(shim.wait(exec).await.unwrap(), 137);
        assert_eq!(shim.status(exec).await, Status::STOPPED);
    }
    assert_eq!(two.kill("", SIGKILL).await.unwrap_err().0, Code::NOT_FOUND);
    let told = host.events.until("exit one 137").await;
    let place = |line: &str| told.iter().position(|told| told == line).unwrap();
    assert!(place("exit e 137") < place("exit one 137"), "{told:?}");
    let log = one.logged();
    assert!(log.contains("level=error") && log.contains("the VMM was killed by signal 9"), "{log}");
    two.delete("").await.unwrap();
    one.finish(&host).await;
}

#[tokio::test]
async fn a_guest_that_panics_says_so_in_the_log() {
    let host = Host::new().await;
    let shim = host.created("web", &["fake:panic"], &[]).await;
    let (code, text) = shim.start("").await.unwrap_err();
    assert_eq!(code, Code::UNAVAILABLE);
    assert!(text.contains("the guest's kernel panicked"), "{text}");
    assert_eq!(shim.wait("").await.unwrap(), 137);
    let log = shim.logged();
    assert!(log.contains("Kernel panic - not syncing: Fatal exception"), "{log}");
    shim.finish(&host).await;
}

#[tokio::test]
async fn a_shim_that_is_killed_takes_its_machine_along_and_delete_cleans_up() {
    let host = Host::new().await;
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    let vmm = shim.state("").await.unwrap().pid;
    kill(shim.connected().await.shim_pid);
    until("the VMM ends", || !lives(vmm)).await;
    let deleted = host.delete("web");
    assert_eq!((deleted.pid, deleted.exit_status), (vmm, 137));
    assert!(deleted.exited_at.seconds > 0);
    assert_eq!(host.residue(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn delete_kills_a_vmm_that_outlives_its_shim() {
    let host = Host::new().await;
    host.boots_like("survive");
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    let vmm = shim.state("").await.unwrap().pid;
    kill(shim.connected().await.shim_pid);
    host.delete("web");
    until("the VMM ends", || !lives(vmm)).await;
    assert_eq!(host.residue(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn delete_ends_a_shim_that_hangs_with_its_container() {
    let host = Host::new().await;
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    let (vmm, pid) = (shim.state("").await.unwrap().pid, shim.connected().await.shim_pid);
    let stop = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(stop, rustix::process::Signal::STOP).unwrap();
    host.delete("web");
    until("shim and VMM end", || !lives(vmm) && !lives(pid)).await;
    assert_eq!(host.residue(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_creation_that_hangs_can_be_looked_at_and_killed() {
    let host = Host::new().await;
    host.bundle("web", &["/bin/true"], &["FAKE_HANGS_IN_CREATE=1"], &json!({}));
    let shim = host.start("web").await;
    let request = shim.request();
    let client = support::connect(&shim.address).await;
    let creating =
        tokio::spawn(async move { support::answer(client.create(support::ctx(), &request).await) });
    until("the creation has begun", || {
        fs::read_dir(host.path("run/.pods")).unwrap().flatten().any(|pod| pod.path().join("vsock").exists())
    })
    .await;
    assert_eq!(shim.status("").await, Status::CREATED);
    assert_eq!(shim.start("").await.unwrap_err().0, Code::FAILED_PRECONDITION);
    assert_eq!(shim.kill("", 15).await.unwrap_err().0, Code::FAILED_PRECONDITION);
    shim.kill("", SIGKILL).await.unwrap();
    let (code, text) = creating.await.unwrap().unwrap_err();
    assert_eq!(code, Code::CANCELLED, "{text}");
    assert_eq!(shim.state("").await.unwrap_err().0, Code::NOT_FOUND);
    assert_eq!(host.events.told(), Vec::<String>::new());
    shim.shutdown().await;
    host.delete("web");
    assert_eq!(host.residue(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_container_is_being_created_until_nothing_is_left_of_its_creation() {
    let host = Host::new().await;
    let pod = json!({"io.kubernetes.cri.sandbox-id": "pause"});
    host.bundle("pause", &["/bin/sleep", "600"], &[], &pod);
    host.bundle("fake-immovable", &["/bin/true"], &["FAKE_HANGS_IN_CREATE=1"], &pod);
    let pause = host.start("pause").await;
    pause.create(&pause.request()).await.unwrap();
    pause.start("").await.unwrap();
    let app = host.start("fake-immovable").await;
    let (client, request) = (support::connect(&app.address).await, app.request());
    let creating =
        tokio::spawn(async move { support::answer(client.create(support::ctx(), &request).await) });
    while app.connected().await.task_pid == 0 {
        tokio::task::yield_now().await;
    }
    let client = support::connect(&app.address).await;
    let killing = tokio::spawn(async move {
        let request = api::KillRequest { id: "fake-immovable".into(), signal: SIGKILL, ..Default::default() };
        support::answer(client.kill(support::ctx(), &request).await)
    });
    // The guest does not remove it, which the shim waits for.
    while !creating.is_finished() {
        match app.state("").await {
            Ok(state) => assert_eq!(state.status.unwrap(), Status::CREATED),
            Err((code, _)) => assert_eq!(code, Code::NOT_FOUND),
        }
    }
    assert_eq!(creating.await.unwrap().unwrap_err().0, Code::CANCELLED);
    killing.await.unwrap().unwrap();
    assert_eq!(app.state("").await.unwrap_err().0, Code::NOT_FOUND);
    pause.kill("", SIGKILL).await.unwrap();
    pause.wait("").await.unwrap();
    pause.finish(&host).await;
}

#[tokio::test]
async fn a_client_that_gives_up_its_creation_can_delete_what_comes_of_it() {
    let host = Host::new().await;
    host.bundle("web", &["/bin/true"], &["FAKE_HANGS_IN_CREATE=1"], &json!({}));
    let shim = host.start("web").await;
    let request = shim.request();
    let client = support::connect(&shim.address).await;
    let patience = ttrpc::context::with_duration(std::time::Duration::from_millis(300));
    assert!(client.create(patience, &request).await.is_err());
    shim.delete("").await.unwrap();
    shim.shutdown().await;
    host.delete("web");
    assert_eq!(host.residue(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_guest_that_does_not_take_a_sigkill_is_ended() {
    let host = Host::new().await;
    let shim = host.created("web", &["/bin/sleep", "600"], &["FAKE_DEAF=1"]).await;
    shim.start("").await.unwrap();
    shim.kill("", SIGKILL).await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 137);
    shim.finish(&host).await;
}

#[tokio::test]
async fn a_kill_that_nobody_waits_for_ends_the_container_all_the_same() {
    let host = Host::new().await;
    let shim = host.created("web", &["/bin/sleep", "600"], &["FAKE_DEAF=1"]).await;
    shim.start("").await.unwrap();
    let request = api::KillRequest { id: "web".into(), signal: SIGKILL, ..Default::default() };
    let patience = ttrpc::context::with_duration(std::time::Duration::from_millis(300));
    assert!(shim.client.kill(patience, &request).await.is_err());
    assert_eq!(shim.wait("").await.unwrap(), 137);
    shim.finish(&host).await;
}

#[tokio::test]
async fn a_guest_that_only_says_that_it_kills_is_ended() {
    let host = Host::new().await;
    let shim = host.created("web", &["/bin/sleep", "600"], &["FAKE_IMMORTAL=1"]).await;
    shim.start("").await.unwrap();
    shim.kill("", SIGKILL).await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 137);
    shim.finish(&host).await;
}

#[tokio::test]
async fn a_guest_that_answers_a_sigkill_with_an_error_is_ended() {
    for (told, code) in [("FAKE_REFUSES=1", Code::FAILED_PRECONDITION), ("FAKE_DENIES=1", Code::NOT_FOUND)] {
        let host = Host::new().await;
        let shim = host.created("web", &["/bin/sleep", "600"], &[told]).await;
        shim.start("").await.unwrap();
        assert_eq!(shim.kill("", SIGKILL).await.unwrap_err().0, code);
        assert_eq!(shim.wait("").await.unwrap(), 137);
        shim.finish(&host).await;
    }
}

#[tokio::test]
async fn a_signal_for_an_exec_that_does_not_start_is_not_taken_for_one_that_has_ended() {
    let host = Host::new().await;
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    shim.exec(&shim.exec_request("e", &["fake:hang"])).await.unwrap();
    let client = support::connect(&shim.address).await;
    let start = api::StartRequest { id: "web".into(), exec_id: "e".into(), ..Default::default() };
    let starting = tokio::spawn(async move { support::answer(client.start(support::ctx(), &start).await) });
    for _ in 0..2 {
        // The first one may come before the start.
        assert_eq!(shim.kill("e", SIGKILL).await.unwrap_err().0, Code::FAILED_PRECONDITION);
    }
    // The container has not suffered, and does not wait for it.
    assert_eq!(shim.status("").await, Status::RUNNING);
    shim.kill("", SIGKILL).await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 137);
    starting.await.unwrap().unwrap_err();
    shim.finish(&host).await;
}

#[tokio::test]
async fn a_guest_that_runs_out_of_memory_without_end_does_not_flood_containerd() {
    let host = Host::new().await;
    let shim = host.created("web", &["/bin/sleep", "1"], &["FAKE_OOM_FLOOD=1"]).await;
    shim.start("").await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 0);
    let told = host.events.until("exit web 0").await;
    let count = told.iter().filter(|line| *line == "oom web").count();
    // One a second, and a busy machine may take its time for a sleep of one second.
    assert!((1..60).contains(&count), "{count}");
    shim.finish(&host).await;
}

#[tokio::test]
async fn what_is_wrong_with_the_host_or_the_bundle_is_told_by_create() {
    let host = Host::new().await;
    let bundle = host.bundle("web", &["/bin/true"], &[], &json!({}));
    let shim = host.start("web").await;
    let refused = |request: api::CreateTaskRequest| {
        let shim = &shim;
        async move { shim.create(&request).await.unwrap_err() }
    };
    let unknown = api::Mount { type_: "zfs".into(), ..Default::default() };
    let (code, text) = refused(api::CreateTaskRequest { rootfs: vec![unknown], ..shim.request() }).await;
    assert_eq!(code, Code::INVALID_ARGUMENT, "{text}");
    let (code, _) = refused(api::CreateTaskRequest { checkpoint: "/c".into(), ..shim.request() }).await;
    assert_eq!(code, Code::INVALID_ARGUMENT);

    fs::write(host.path("config.toml"), "[defaults]\nmemroy = \"1G\"\n").unwrap();
    let (code, text) = refused(shim.request()).await;
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("config.toml") && text.contains("memroy"), "{text}");
    fs::write(host.path("config.toml"), "[paths]\nkvm = \"/dev/null\"\n").unwrap();

    fs::rename(host.path("share/vmlinux"), host.path("share/moved")).unwrap();
    let (_, text) = refused(shim.request()).await;
    assert!(text.contains("share/vmlinux") && text.contains("install Bulkhead completely"), "{text}");
    fs::rename(host.path("share/moved"), host.path("share/vmlinux")).unwrap();

    fs::write(bundle.join("config.json"), "{").unwrap();
    let (code, text) = refused(shim.request()).await;
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(text.contains("config.json"), "{text}");
    fs::remove_file(bundle.join("config.json")).unwrap();
    assert_eq!(refused(shim.request()).await.0, Code::INVALID_ARGUMENT);
    host.bundle_again("web");

    let options = |type_url: &str, value: Vec<u8>| {
        let any = Any { type_url: type_url.into(), value, ..Default::default() };
        api::CreateTaskRequest { options: Some(any).into(), ..shim.request() }
    };
    let (code, _) = refused(options("runtimeoptions.v1.Options", vec![0xff])).await;
    assert_eq!(code, Code::INVALID_ARGUMENT);
    // After all of that, a good request is served by the same shim.
    shim.create(&options("containerd.runc.v1.Options", vec![8, 1])).await.unwrap();
    shim.finish(&host).await;
}

#[tokio::test]
async fn without_anybody_who_takes_events_everything_else_goes_on() {
    let host = Host::new().await;
    host.bundle("web", &["/bin/sh", "-c", "exit 3"], &[], &json!({}));
    let start = host
        .shim(&["-namespace", NAMESPACE, "-id", "web", "start"])
        .env_remove("TTRPC_ADDRESS")
        .current_dir(host.path("bundles/web"))
        .output()
        .unwrap();
    let address = String::from_utf8(start.stdout).unwrap();
    let client = support::connect(&address).await;
    let shim = support::Shim {
        id: "web".into(),
        root: host.path("root.erofs"),
        bundle: host.path("bundles/web"),
        address,
        client,
    };
    shim.create(&shim.request()).await.unwrap();
    shim.start("").await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 3);
    shim.finish(&host).await;
    assert_eq!(host.events.told(), Vec::<String>::new());
}

#[tokio::test]
async fn start_leaves_a_shim_of_its_own_that_only_root_can_speak_to() {
    use std::os::unix::fs::MetadataExt;
    let host = Host::new().await;
    host.bundle("web", &["/bin/true"], &[], &json!({}));
    let shim = host.start("web").await;
    let socket = fs::metadata(shim.address.strip_prefix("unix://").unwrap()).unwrap();
    assert_eq!(socket.mode() & 0o777, 0o600);
    let pid = shim.connected().await.shim_pid;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_ascii_whitespace().collect();
    // Its own process group and session.
    assert_eq!((fields[2], fields[3]), (pid.to_string().as_str(), pid.to_string().as_str()));
    for (fd, target) in [(0, "/dev/null"), (1, "/dev/null"), (2, "log")] {
        let link = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
        assert!(link.to_str().unwrap().ends_with(target), "{fd}: {}", link.display());
    }
    // A second start of the same container finds it.
    assert_eq!(String::from_utf8(host.start_output("web").stdout).unwrap(), shim.address);
    shim.shutdown().await;
    until("the shim ends", || !lives(pid)).await;
    assert_eq!(host.residue(), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_containerd_that_sends_parameters_gets_version_three() {
    use std::io::Write;
    use std::process::Stdio;
    let host = Host::new().await;
    host.bundle("web", &["/bin/true"], &[], &json!({}));
    let params = BootstrapParams {
        instance_id: "web".into(),
        namespace: NAMESPACE.into(),
        socket_dir: Some(host.path("s").display().to_string()),
        ..Default::default()
    };
    let mut start = host
        .shim(&["-namespace", NAMESPACE, "-id", "web", "start"])
        .current_dir(host.path("bundles/web"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    start.stdin.take().unwrap().write_all(&params.write_to_bytes().unwrap()).unwrap();
    let output = start.wait_with_output().unwrap();
    let reply: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&reply["version"], &reply["protocol"]), (&json!(3), &json!("ttrpc")));
    let address = reply["address"].as_str().unwrap();
    assert!(address.starts_with(&format!("unix://{}/", host.path("s").display())), "{address}");
    let client = support::connect(address).await;
    let shutdown = api::ShutdownRequest::default();
    client.shutdown(support::ctx(), &shutdown).await.unwrap();
    until("nothing is left", || host.residue().is_empty()).await;
}

#[tokio::test]
async fn whoever_runs_it_by_hand_learns_what_it_is() {
    let host = Host::new().await;
    let run = |args: &[&str]| host.shim(args).output().unwrap();
    let version = run(&["-v"]);
    assert!(String::from_utf8(version.stdout).unwrap().contains(env!("CARGO_PKG_VERSION")));
    let help = run(&["--help"]);
    assert!(help.status.success());
    assert!(String::from_utf8(help.stdout).unwrap().contains("io.containerd.bulkhead.v2"));
    let nothing = run(&[]);
    assert_eq!(nothing.status.code(), Some(2));
    assert!(String::from_utf8(nothing.stderr).unwrap().contains("no action"));
    let info = RuntimeInfo::parse_from_bytes(&run(&["-info"]).stdout).unwrap();
    assert_eq!(info.name, "io.containerd.bulkhead.v2");
    // A bundle without a configuration.
    let start =
        host.shim(&["-namespace", "n", "-id", "i", "start"]).current_dir(host.path("run")).output().unwrap();
    assert!(!start.status.success() && start.stdout.is_empty());
    assert!(String::from_utf8(start.stderr).unwrap().contains("config.json"));
}

#[tokio::test]
async fn a_shim_that_is_terminated_tells_of_its_containers_ends() {
    let host = Host::new().await;
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    let pid = shim.connected().await.shim_pid;
    assert!(Command::new("kill").arg(pid.to_string()).status().unwrap().success());
    host.events.until("exit web 137").await;
    until("the shim ends", || !lives(pid)).await;
    host.delete("web");
    assert_eq!(host.residue(), Vec::<PathBuf>::new());
}

/// A shim with a container whose root is a disk, and a guest that has written to it only when the file is there that is returned.
async fn writing(host: &Host, args: &[&str]) -> (support::Shim, PathBuf) {
    let disk = host.path("disk");
    fs::write(&disk, support::ext4()).unwrap();
    let done = host.path("done");
    host.bundle("web", args, &[&format!("FAKE_WRITES_UNTIL={}", done.display())], &json!({}));
    let shim = host.start("web").await;
    let mut request = shim.request();
    request.rootfs[0].type_ = "ext4".into();
    request.rootfs[0].source = disk.display().to_string();
    request.rootfs[0].options.clear();
    shim.create(&request).await.unwrap();
    shim.start("").await.unwrap();
    (shim, done)
}

#[tokio::test]
async fn what_is_written_to_a_slow_disk_is_waited_for_by_whoever_deletes() {
    let host = Host::new().await;
    let (shim, done) = writing(&host, &["/bin/true"]).await;
    assert_eq!(shim.wait("").await.unwrap(), 0);
    let vmm = shim.state("").await.unwrap().pid;
    let delete = |client: TaskClient| {
        let request = api::DeleteRequest { id: "web".into(), ..Default::default() };
        tokio::spawn(async move { support::answer(client.delete(support::ctx(), &request).await) })
    };
    let first = delete(support::connect(&shim.address).await);
    let second = delete(support::connect(&shim.address).await);
    // Longer than a guest without a disk is waited for.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(lives(vmm) && !first.is_finished() && !second.is_finished());
    fs::write(&done, "").unwrap();
    let answers = [first.await.unwrap(), second.await.unwrap()];
    assert!(done.with_extension("written").exists());
    // The other one is told only when nothing is left to interrupt.
    let codes: Vec<_> = answers.iter().map(|answer| answer.as_ref().err().map(|error| error.0)).collect();
    assert!(codes.contains(&None) && codes.contains(&Some(Code::NOT_FOUND)), "{codes:?}");
    shim.shutdown().await;
    host.delete("web");
    until("nothing is left", || host.residue().is_empty()).await;
}

#[tokio::test]
async fn a_shim_that_is_terminated_gives_its_containers_time_to_write() {
    let host = Host::new().await;
    let (shim, done) = writing(&host, &["/bin/sleep", "600"]).await;
    let pid = shim.connected().await.shim_pid;
    assert!(Command::new("kill").arg(pid.to_string()).status().unwrap().success());
    host.events.until("exit web 137").await;
    assert!(lives(pid));
    fs::write(&done, "").unwrap();
    until("the shim ends", || !lives(pid)).await;
    assert!(done.with_extension("written").exists());
    host.delete("web");
    assert_eq!(host.residue(), Vec::<PathBuf>::new());
}
