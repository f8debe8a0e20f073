//! What cannot be done is refused, in the words and with the codes that clients know.

use bulkhead_tests::bulkhead::{expect_code, stderr};
use bulkhead_tests::ctr::{
    Bundle, Code, CreateTaskRequest, IMAGE, Mount, Shim, ctr, in_background, is_runc, run,
};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("refused: a program that is not there, in runc's words", missing_program),
        trial("refused: a program that cannot be run, in runc's words", not_executable),
        trial("refused: a container or an exec with a name that is taken", taken),
        trial("refused: a task is created once", created_twice),
        trial("refused: what is done to a task that has ended", ended),
        trial("refused: what is done to a task that was deleted or never was", unknown),
        trial("refused: a bundle that is not there", missing_bundle),
        trial("refused: a config.json that is none", broken_config),
        trial("refused: a root of a type that nobody knows", unknown_mount),
        trial("refused: namespaces that nobody knows or that are not there", namespaces),
        trial("refused: a hook that fails", failing_hook),
        trial("refused: what the host's kernel says of itself, as a directory to share", kernel_mounts),
        trial("shim: it says what it is, and its cleanup may be run again and again", cleanup),
    ]
}

fn expect_words(said: &str, words: &[&str]) -> Result {
    let missing: Vec<_> = words.iter().filter(|word| !said.contains(**word)).collect();
    ensure(missing.is_empty(), || format!("{missing:?} is not in: {said}"))
}

fn missing_program() -> Result {
    let words = ["exec: \"nothing-like-it\": executable file not found in $PATH"];
    let output = run(&[], &["nothing-like-it"])?;
    expect_code(&output, 1)?;
    expect_words(&stderr(&output), &words)?;
    let output = run(&[], &["/bin/nothing-like-it"])?;
    expect_code(&output, 1)?;
    expect_words(&stderr(&output), &["exec: \"/bin/nothing-like-it\"", "no such file or directory"])?;
    let container = in_background("host", &[], &["sleep", "1000"])?;
    let output = container.exec(&["nothing-like-it"])?;
    expect_code(&output, 1)?;
    expect_words(&stderr(&output), &words)?;
    // The container is as good as before.
    expect_code(&container.exec(&["true"])?, 0)?;
    container.end()
}

fn not_executable() -> Result {
    let output = run(&[], &["/etc/passwd"])?;
    expect_code(&output, 1)?;
    expect_words(&stderr(&output), &["exec: \"/etc/passwd\": permission denied"])?;
    let container = in_background("host", &[], &["sleep", "1000"])?;
    let output = container.exec(&["/etc/passwd"])?;
    expect_code(&output, 1)?;
    expect_words(&stderr(&output), &["exec: \"/etc/passwd\": permission denied"])?;
    container.end()
}

fn taken() -> Result {
    let container = in_background("host", &[], &["sleep", "1000"])?;
    let output = ctr(["run", "--rm", IMAGE, "host", "true"]).output()?;
    expect_code(&output, 1)?;
    expect_words(&stderr(&output), &["already exists"])?;
    let output = container.task("start", &[]).output()?;
    expect_code(&output, 1)?;
    expect_words(&stderr(&output), &["already exists"])?;
    container.exec_in_background("extra", &["sleep", "2000"])?;
    let output = container.exec(&["true"])?;
    expect_code(&output, 1)?;
    expect_words(&stderr(&output), &["already exists"])?;
    container.end()
}

/// A task that was created, and its shim.
fn created(id: &str, program: &[&str]) -> Result<(Bundle, Shim)> {
    let bundle = Bundle::new(id, program)?;
    let shim = bundle.start_shim()?;
    shim.create(&bundle.request()).map_err(|error| format!("create: {error}; {}", bundle.log()))?;
    Ok((bundle, shim))
}

/// Ends shim and bundle, whose task is gone.
fn finish(bundle: &Bundle, shim: &Shim) -> Result {
    shim.shutdown(bundle.id())?;
    bundle.clean_up()
}

fn created_twice() -> Result {
    let (bundle, shim) = created("twice", &["sleep", "1000"])?;
    ensure(shim.create(&bundle.request()).is_err(), || "it was created twice".to_owned())?;
    // The first one has not suffered.
    shim.start("twice", "")?;
    shim.kill("twice", "", 9)?;
    let code = shim.wait("twice", "")?;
    ensure(code == 137, || format!("exit code {code}"))?;
    shim.delete("twice", "")?;
    finish(&bundle, &shim)
}

fn ended() -> Result {
    let (bundle, shim) = created("ended", &["true"])?;
    shim.start("ended", "")?;
    let code = shim.wait("ended", "")?;
    ensure(code == 0, || format!("exit code {code}"))?;
    let state = shim.state("ended", "")?;
    ensure(state.exited_at.seconds > 0, || format!("{state:?}"))?;
    Shim::expect("kill", shim.kill("ended", "", 9), Code::NOT_FOUND)?;
    let again = shim.start("ended", "");
    ensure(again.is_err(), || "it was started again".to_owned())?;
    let exec = shim.exec("ended", "late", &["true"], std::path::Path::new(""));
    let exec = exec.and_then(|()| shim.start("ended", "late").map(drop));
    ensure(exec.is_err(), || "a process was started in it".to_owned())?;
    shim.delete("ended", "")?;
    finish(&bundle, &shim)
}

fn unknown() -> Result {
    let (bundle, shim) = created("known", &["true"])?;
    let id = "stranger";
    Shim::expect("state", shim.state(id, ""), Code::NOT_FOUND)?;
    Shim::expect("start", shim.start(id, ""), Code::NOT_FOUND)?;
    Shim::expect("kill", shim.kill(id, "", 9), Code::NOT_FOUND)?;
    Shim::expect("delete", shim.delete(id, ""), Code::NOT_FOUND)?;
    Shim::expect("wait", shim.wait(id, ""), Code::NOT_FOUND)?;
    Shim::expect("state of an exec", shim.state("known", id), Code::NOT_FOUND)?;
    Shim::expect("delete of an exec", shim.delete("known", id), Code::NOT_FOUND)?;
    shim.start("known", "")?;
    shim.wait("known", "")?;
    shim.delete("known", "")?;
    Shim::expect("start of a deleted task", shim.start("known", ""), Code::NOT_FOUND)?;
    Shim::expect("second delete", shim.delete("known", ""), Code::NOT_FOUND)?;
    Shim::expect("state of a deleted task", shim.state("known", ""), Code::NOT_FOUND)?;
    finish(&bundle, &shim)
}

/// A create that fails, in a shim that is ended then.
fn refuse(bundle: &Bundle, change: impl FnOnce(&mut CreateTaskRequest)) -> Result {
    refuse_in(bundle, &bundle.start_shim()?, change)
}

fn refuse_in(bundle: &Bundle, shim: &Shim, change: impl FnOnce(&mut CreateTaskRequest)) -> Result {
    let mut request = bundle.request();
    change(&mut request);
    let created = shim.create(&request);
    ensure(created.is_err(), || "it was created".to_owned())?;
    Shim::expect("state", shim.state(bundle.id(), ""), Code::NOT_FOUND)?;
    finish(bundle, shim)
}

fn missing_bundle() -> Result {
    let bundle = Bundle::new("nowhere", &["true"])?;
    refuse(&bundle, |request| "/nothing/like/it".clone_into(&mut request.bundle))
}

fn broken_config() -> Result {
    for broken in
        [json!("{"), json!([]), json!({ "ociVersion": 1 }), json!({ "ociVersion": "1.0.2", "process": [] })]
    {
        let bundle = Bundle::new("broken", &["true"])?;
        // containerd has the shim read its annotations before it is to create anything.
        let shim = bundle.start_shim()?;
        bundle.configure(&broken)?;
        let created = shim.create(&bundle.request());
        ensure(created.is_err(), || format!("{broken} was taken"))?;
        finish(&bundle, &shim)?;
    }
    Ok(())
}

fn unknown_mount() -> Result {
    let bundle = Bundle::new("strange", &["true"])?;
    refuse(&bundle, |request| {
        request.rootfs.push(Mount {
            type_: "no-such-type".into(),
            source: "none".into(),
            ..Mount::default()
        });
    })
}

/// A create with another configuration fails.
fn refuse_spec(change: impl FnOnce(&mut Value)) -> Result {
    let bundle = Bundle::new("odd", &["true"])?;
    // As containerd would not let everything through, the shim is there before.
    let shim = bundle.start_shim()?;
    let mut spec = bundle.spec()?;
    change(&mut spec);
    bundle.configure(&spec)?;
    refuse_in(&bundle, &shim, |_| {})
}

fn namespaces() -> Result {
    for odd in [
        json!({ "type": "nonsense" }),
        json!({ "type": "network", "path": "/nothing/like/it" }),
        json!({ "type": "ipc", "path": "/proc/1/cmdline" }),
    ] {
        refuse_spec(|spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().expect("a list");
            namespaces.retain(|namespace| namespace["type"] != odd["type"]);
            namespaces.push(odd.clone());
        })
        .map_err(|error| format!("{odd}: {error}"))?;
    }
    Ok(())
}

fn failing_hook() -> Result {
    refuse_spec(|spec| spec["hooks"] = json!({ "createRuntime": [{ "path": "/bin/false" }] }))
}

fn kernel_mounts() -> Result {
    for source in ["/proc", "/sys/kernel", "/dev", "/dev/pts", "/sys/fs/cgroup"] {
        let mount = format!("type=bind,src={source},dst=/host,options=rbind:ro");
        let output = run(&["--mount", &mount], &["true"])?;
        // A container of runc's has the kernel of the host for its own.
        if is_runc() {
            expect_code(&output, 0)?;
            continue;
        }
        expect_code(&output, 1)?;
        let said = stderr(&output);
        expect_words(&said, &[&format!("{source} cannot be mounted at /host"), "which has its own"])?;
    }
    // As Kubernetes has it for every pod.
    let output = run(&["--mount", "type=bind,src=/dev/shm,dst=/shm,options=rbind:rw"], &["ls", "/shm"])?;
    expect_code(&output, 0)
}

fn cleanup() -> Result {
    let (bundle, shim) = created("nobody", &["true"])?;
    shim.delete("nobody", "")?;
    shim.shutdown("nobody")?;
    for _ in 0..2 {
        bundle.clean_up()?;
    }
    let output = bundle.shim_command("-v")?.output()?;
    expect_code(&output, 0)?;
    ensure(!output.stdout.is_empty(), || format!("{output:?}"))
}
