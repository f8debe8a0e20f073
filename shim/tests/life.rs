//! Containers from their creation to their deletion, as containerd asks for it.

#![allow(clippy::unwrap_used)]

mod support;

use std::fs;

use containerd_shim_protos::api::{self, Status};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::{Message, MessageField};
use serde_json::json;
use support::{Host, answer, connect, ctx, lives, until};
use ttrpc::Code;

const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;

#[tokio::test]
async fn a_container_lives_and_its_events_come_in_order() {
    let host = Host::new().await;
    let shim = host.created("web", &["/bin/sh", "-c", "exit 7"], &[]).await;
    let state = shim.state("").await.unwrap();
    assert_eq!((state.status.unwrap(), state.id.as_str()), (Status::CREATED, "web"));
    assert!(lives(state.pid));
    assert_eq!(shim.connected().await.task_pid, state.pid);
    assert_eq!(shim.start("").await.unwrap(), state.pid);
    assert_eq!(shim.wait("").await.unwrap(), 7);
    let state = shim.state("").await.unwrap();
    assert_eq!((state.status.unwrap(), state.exit_status), (Status::STOPPED, 7));
    // A containerd that is restarted now must find it.
    assert_eq!(shim.pids().await.len(), 1);
    let pid = shim.connected().await.shim_pid;
    assert_eq!(shim.delete("").await.unwrap(), 7);
    let told = host.events.until("delete web").await;
    assert_eq!(told, ["create web", "start web", "exit web 7", "delete web"]);
    assert_eq!(shim.delete("").await.unwrap_err().0, Code::NOT_FOUND);
    shim.shutdown().await;
    host.delete("web");
    until("the shim ends", || !lives(pid)).await;
    assert_eq!(host.residue(), Vec::<std::path::PathBuf>::new());
    // Done again, it does nothing.
    assert_eq!(host.delete("web").exit_status, 137);
}

#[tokio::test]
async fn the_machine_ends_with_its_only_container() {
    let host = Host::new().await;
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    let vmm = shim.state("").await.unwrap().pid;
    shim.kill("", SIGTERM).await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 128 + SIGTERM);
    until("the VMM ends", || !lives(vmm)).await;
    assert_eq!(
        shim.kill("", SIGKILL).await.unwrap_err(),
        (Code::NOT_FOUND, "process already finished: not found".into())
    );
    shim.finish(&host).await;
}

#[tokio::test]
async fn a_container_that_was_never_started_can_be_killed_or_deleted() {
    let host = Host::new().await;
    let shim = host.created("killed", &["/bin/true"], &[]).await;
    shim.kill("", SIGKILL).await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 137);
    shim.finish(&host).await;
    let shim = host.created("deleted", &["/bin/true"], &[]).await;
    shim.finish(&host).await;
    let told = host.events.until("delete deleted").await;
    assert_eq!(told[4..], ["exit deleted 137", "delete deleted"].map(str::to_owned), "{told:?}");
}

#[tokio::test]
async fn execs_end_before_their_container() {
    let host = Host::new().await;
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    shim.exec(&shim.exec_request("one", &["/bin/sh", "-c", "exit 3"])).await.unwrap();
    assert_eq!(shim.status("one").await, Status::CREATED);
    assert_eq!(shim.kill("one", SIGTERM).await.unwrap_err().0, Code::FAILED_PRECONDITION);
    shim.start("one").await.unwrap();
    assert_eq!(shim.wait("one").await.unwrap(), 3);
    assert_eq!(shim.delete("one").await.unwrap(), 3);
    assert_eq!(shim.state("one").await.unwrap_err().0, Code::NOT_FOUND);
    for id in ["two", "three"] {
        shim.exec(&shim.exec_request(id, &["/bin/sleep", "600"])).await.unwrap();
    }
    shim.start("two").await.unwrap();
    assert_eq!(shim.pids().await.len(), 2);
    let taken = shim.exec(&shim.exec_request("two", &["/bin/true"])).await;
    assert_eq!(taken.unwrap_err(), (Code::ALREADY_EXISTS, "id two: already exists".into()));
    assert_eq!(shim.delete("two").await.unwrap_err().1, "cannot delete a running process");
    shim.kill("", SIGKILL).await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 137);
    let (code, text) = shim.start("three").await.unwrap_err();
    assert_eq!(code, Code::FAILED_PRECONDITION, "{text}");
    let late = shim.exec(&shim.exec_request("late", &["/bin/true"])).await.unwrap_err();
    assert_eq!(late, (Code::UNKNOWN, "cannot exec in a stopped state".into()));
    let told = host.events.until("exit web 137").await;
    assert_eq!(
        told,
        [
            "create web",
            "start web",
            "exec-added one",
            "exec-started one",
            "exit one 3",
            "exec-added two",
            "exec-added three",
            "exec-started two",
            "exit two 137",
            "exit web 137"
        ]
    );
    shim.finish(&host).await;
}

#[tokio::test]
async fn programs_that_do_not_start_are_told_in_runcs_words() {
    let host = Host::new().await;
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    shim.exec(&shim.exec_request("missing", &["nonsense"])).await.unwrap();
    let (code, text) = shim.start("missing").await.unwrap_err();
    assert_eq!(code, Code::UNKNOWN);
    assert!(text.ends_with("exec: \"nonsense\": executable file not found in $PATH"), "{text}");
    // Whoever waits for it does not do so for ever.
    assert_eq!(shim.wait("missing").await.unwrap(), 127);
    shim.exec(&shim.exec_request("denied", &["/etc"])).await.unwrap();
    let (_, text) = shim.start("denied").await.unwrap_err();
    assert!(text.ends_with("exec: \"/etc\": permission denied"), "{text}");
    shim.kill("", SIGKILL).await.unwrap();
    shim.wait("").await.unwrap();
    shim.finish(&host).await;
}

#[tokio::test]
async fn what_is_not_there_or_not_possible_is_refused_as_runcs_shim_does() {
    let host = Host::new().await;
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    assert_eq!(shim.create(&shim.request()).await.unwrap_err().0, Code::ALREADY_EXISTS);
    assert_eq!(shim.start("").await.unwrap_err(), (Code::UNKNOWN, "cannot start a running process".into()));
    assert_eq!(shim.delete("").await.unwrap_err(), (Code::UNKNOWN, "cannot delete a running process".into()));
    assert_eq!(shim.start("none").await.unwrap_err().0, Code::NOT_FOUND);
    assert_eq!(shim.kill("", 0).await.unwrap_err().0, Code::INVALID_ARGUMENT);
    assert_eq!(shim.kill("", 65).await.unwrap_err().0, Code::INVALID_ARGUMENT);
    let bad = shim
        .exec(&api::ExecProcessRequest { spec: MessageField::none(), ..shim.exec_request("e", &[]) })
        .await;
    assert_eq!(bad.unwrap_err().0, Code::INVALID_ARGUMENT);
    let checkpoint = api::CheckpointTaskRequest { id: "web".into(), ..Default::default() };
    let refused = answer(shim.client.checkpoint(ctx(), &checkpoint).await).unwrap_err();
    assert_eq!(refused.0, Code::UNIMPLEMENTED);

    let nobody = support::Shim {
        id: "nobody".into(),
        root: shim.root.clone(),
        bundle: shim.bundle.clone(),
        address: shim.address.clone(),
        client: connect(&shim.address).await,
    };
    assert_eq!(nobody.state("").await.unwrap_err().0, Code::NOT_FOUND);
    assert_eq!(nobody.start("").await.unwrap_err().0, Code::NOT_FOUND);
    assert_eq!(nobody.kill("", SIGKILL).await.unwrap_err().0, Code::NOT_FOUND);
    assert_eq!(nobody.wait("").await.unwrap_err().0, Code::NOT_FOUND);
    assert_eq!(nobody.delete("").await.unwrap_err().0, Code::NOT_FOUND);
    assert_eq!(nobody.exec(&nobody.exec_request("e", &["/bin/true"])).await.unwrap_err().0, Code::NOT_FOUND);
    assert_eq!(nobody.connected().await.task_pid, 0);
    let odd = api::CreateTaskRequest { id: "../odd".into(), ..shim.request() };
    assert_eq!(shim.create(&odd).await.unwrap_err().0, Code::INVALID_ARGUMENT);
    // None of that has harmed the container.
    assert_eq!(shim.status("").await, Status::RUNNING);
    shim.kill("", SIGKILL).await.unwrap();
    shim.wait("").await.unwrap();
    shim.finish(&host).await;
}

#[tokio::test]
async fn a_container_is_frozen_measured_and_given_other_limits() {
    let host = Host::new().await;
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    let pause = api::PauseRequest { id: "web".into(), ..Default::default() };
    answer(shim.client.pause(ctx(), &pause).await).unwrap();
    assert_eq!(shim.status("").await, Status::PAUSED);
    let again = answer(shim.client.pause(ctx(), &pause).await).unwrap_err();
    assert_eq!(again.1, "cannot pause a paused container");
    let exec = shim.exec(&shim.exec_request("e", &["/bin/true"])).await.unwrap_err();
    assert_eq!(exec.1, "cannot exec in a paused state");
    let resume = api::ResumeRequest { id: "web".into(), ..Default::default() };
    answer(shim.client.resume(ctx(), &resume).await).unwrap();
    assert_eq!(shim.status("").await, Status::RUNNING);
    assert!(answer(shim.client.resume(ctx(), &resume).await).is_err());

    let mut update = api::UpdateTaskRequest { id: "web".into(), ..Default::default() };
    update.resources = Some(containerd_shim_protos::protobuf::well_known_types::any::Any {
        value: json!({"memory": {"limit": 4096}}).to_string().into_bytes(),
        ..Default::default()
    })
    .into();
    answer(shim.client.update(ctx(), &update).await).unwrap();
    let stats = api::StatsRequest { id: "web".into(), ..Default::default() };
    let stats = answer(shim.client.stats(ctx(), &stats).await).unwrap().stats.unwrap();
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let metrics = Metrics::parse_from_bytes(&stats.value).unwrap();
    assert_eq!((metrics.memory.usage_limit, metrics.cpu.usage_usec), (4096, 7));
    update.resources.as_mut().unwrap().value = b"{".to_vec();
    let bad = answer(shim.client.update(ctx(), &update).await).unwrap_err();
    assert_eq!(bad.0, Code::INVALID_ARGUMENT);

    shim.kill("", SIGKILL).await.unwrap();
    shim.wait("").await.unwrap();
    let stats = api::StatsRequest { id: "web".into(), ..Default::default() };
    assert_eq!(answer(shim.client.stats(ctx(), &stats).await).unwrap_err().0, Code::NOT_FOUND);
    let told = host.events.until("exit web 137").await;
    assert_eq!(told, ["create web", "start web", "paused web", "resumed web", "exit web 137"]);
    shim.finish(&host).await;
}

#[tokio::test]
async fn all_execs_of_a_frozen_container_are_shown_as_frozen() {
    let host = Host::new().await;
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    for (exec_id, program) in [("runs", "/bin/sleep"), ("waits", "/bin/sleep"), ("ended", "/bin/true")] {
        shim.exec(&shim.exec_request(exec_id, &[program, "600"])).await.unwrap();
    }
    for exec_id in ["runs", "ended"] {
        shim.start(exec_id).await.unwrap();
    }
    assert_eq!(shim.wait("ended").await.unwrap(), 0);
    let pause = api::PauseRequest { id: "web".into(), ..Default::default() };
    answer(shim.client.pause(ctx(), &pause).await).unwrap();
    for exec_id in ["", "runs", "waits", "ended"] {
        assert_eq!(shim.status(exec_id).await, Status::PAUSED, "{exec_id}");
    }
    // How it ended is told all the same, and it can be deleted.
    shim.delete("ended").await.unwrap();
    let resume = api::ResumeRequest { id: "web".into(), ..Default::default() };
    answer(shim.client.resume(ctx(), &resume).await).unwrap();
    assert_eq!(shim.status("runs").await, Status::RUNNING);
    assert_eq!(shim.status("waits").await, Status::CREATED);
    shim.kill("", SIGKILL).await.unwrap();
    shim.wait("").await.unwrap();
    shim.finish(&host).await;
}

#[tokio::test]
async fn memory_that_runs_out_is_told_before_the_end_and_once() {
    let host = Host::new().await;
    let shim = host.created("web", &["/bin/sh", "-c", "exit 137"], &["FAKE_OOM=1"]).await;
    shim.start("").await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 137);
    let told = host.events.until("exit web 137").await;
    let of = |what: &str| told.iter().filter(|line| *line == what).count();
    assert_eq!(of("oom web"), 1, "{told:?}");
    assert_eq!(told.last().unwrap(), "exit web 137");
    shim.finish(&host).await;
}

#[tokio::test]
async fn the_containers_of_a_pod_share_one_shim_and_one_machine() {
    let host = Host::new().await;
    let pod = json!({"io.kubernetes.cri.sandbox-id": "pause"});
    host.bundle("pause", &["/bin/sleep", "600"], &[], &pod);
    host.bundle("app", &["/bin/sleep", "600"], &[], &pod);
    let pause = host.start("pause").await;
    pause.create(&pause.request()).await.unwrap();
    pause.start("").await.unwrap();
    let app = host.start("app").await;
    assert_eq!(app.address, pause.address);
    app.create(&app.request()).await.unwrap();
    app.start("").await.unwrap();
    let vmm = pause.state("").await.unwrap().pid;
    assert_eq!(app.state("").await.unwrap().pid, vmm);
    assert_eq!(app.connected().await.shim_pid, pause.connected().await.shim_pid);

    app.kill("", SIGKILL).await.unwrap();
    assert_eq!(app.wait("").await.unwrap(), 137);
    app.delete("").await.unwrap();
    // As containerd goes on after each container: neither may touch the others.
    app.shutdown().await;
    assert_eq!(host.delete("app").pid, vmm);
    assert_eq!(pause.status("").await, Status::RUNNING);
    assert!(lives(vmm));
    // Another one may come.
    app.create(&app.request()).await.unwrap();
    app.start("").await.unwrap();
    // containerd has lost this one: `delete` has the shim remove it.
    host.delete("app");
    until("the shim forgets the container", || !host_has(&host, "app")).await;
    assert_eq!(app.state("").await.unwrap_err().0, Code::NOT_FOUND);
    assert_eq!(pause.status("").await, Status::RUNNING);

    pause.kill("", SIGKILL).await.unwrap();
    pause.wait("").await.unwrap();
    pause.finish(&host).await;
    assert!(!lives(vmm));
}

#[tokio::test]
async fn a_machine_is_killed_for_memory_as_soon_as_any_of_its_containers_would_be() {
    let host = Host::new().await;
    let pod = json!({"io.kubernetes.cri.sandbox-id": "pause"});
    let mut shims = Vec::new();
    for (id, asked, expected) in [("pause", 100, "100"), ("app", 300, "300"), ("aside", 200, "300")] {
        let config = host.bundle(id, &["/bin/sleep", "600"], &[], &pod).join("config.json");
        let mut spec: serde_json::Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        spec["process"]["oomScoreAdj"] = asked.into();
        fs::write(&config, spec.to_string()).unwrap();
        let shim = host.start(id).await;
        shim.create(&shim.request()).await.unwrap();
        let vmm = shim.state("").await.unwrap().pid;
        let score = fs::read_to_string(format!("/proc/{vmm}/oom_score_adj")).unwrap();
        assert_eq!(score.trim(), expected);
        shims.push(shim);
    }
    for shim in &shims[1..] {
        shim.delete("").await.unwrap();
    }
    shims.swap_remove(0).finish(&host).await;
}

#[tokio::test]
async fn what_delete_cannot_wait_for_the_shim_does_by_itself() {
    let host = Host::new().await;
    let pod = json!({"io.kubernetes.cri.sandbox-id": "pause"});
    host.bundle("pause", &["/bin/sleep", "600"], &[], &pod);
    host.bundle("app", &["/bin/sh", "-c", "exec cat /dev/zero"], &[], &pod);
    let out = host.fifo("out");
    let pause = host.start("pause").await;
    pause.create(&pause.request()).await.unwrap();
    pause.start("").await.unwrap();
    let app = host.start("app").await;
    // Its output, which nobody reads, holds back its end for longer than `delete` waits.
    let stdout = out.to_str().unwrap().to_owned();
    app.create(&api::CreateTaskRequest { stdout, ..app.request() }).await.unwrap();
    app.start("").await.unwrap();
    let (vmm, pid) = (pause.state("").await.unwrap().pid, pause.connected().await.shim_pid);
    host.delete("app");
    host.delete("pause");
    until("shim and VMM end", || !lives(vmm) && !lives(pid)).await;
    until("nothing is left", || host.residue().is_empty()).await;
}

fn host_has(host: &Host, id: &str) -> bool {
    let pods = fs::read_dir(host.path("run/.pods")).unwrap();
    pods.flatten().any(|pod| pod.path().join("containers").join(id).exists())
}

#[tokio::test]
async fn a_containerd_that_comes_back_finds_everything() {
    let host = Host::new().await;
    let mut shim = host.running("web", &["/bin/sleep", "600"]).await;
    let vmm = shim.state("").await.unwrap().pid;
    shim.client = connect(&fs::read_to_string(shim.bundle.join("address")).unwrap()).await;
    assert_eq!(shim.connected().await.task_pid, vmm);
    assert_eq!(shim.pids().await, [vmm]);
    assert_eq!(shim.status("").await, Status::RUNNING);
    shim.kill("", SIGKILL).await.unwrap();
    assert_eq!(shim.wait("").await.unwrap(), 137);
    shim.finish(&host).await;
}

#[tokio::test]
async fn version_three_and_older_names_reach_the_same_service() {
    let host = Host::new().await;
    let shim = host.running("web", &["/bin/sleep", "600"]).await;
    let path = shim.address.strip_prefix("unix://").unwrap();
    let stream = tokio::net::UnixStream::connect(path).await.unwrap();
    let client = ttrpc::asynchronous::Client::new(stream.into());
    for service in ["containerd.task.v2.Task", "containerd.task.v3.Task"] {
        let request = api::StateRequest { id: "web".into(), ..Default::default() };
        let request = ttrpc::Request {
            service: service.into(),
            method: "State".into(),
            payload: request.write_to_bytes().unwrap(),
            ..Default::default()
        };
        let response = client.request(request).await.unwrap();
        let state = api::StateResponse::parse_from_bytes(&response.payload).unwrap();
        assert_eq!(state.status.unwrap(), Status::RUNNING);
    }
    shim.kill("", SIGKILL).await.unwrap();
    shim.wait("").await.unwrap();
    shim.finish(&host).await;
}
