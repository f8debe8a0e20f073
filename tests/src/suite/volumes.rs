//! Files and directories of the host in containers of `bulkhead run`: `-v`, `--mount`, and the bind mounts of bundles.

use std::fs::{create_dir, create_dir_all, read_to_string, write};
use std::path::Path;

use bulkhead_tests::bulkhead::{
    bulkhead, detach, eventually, expect_code, expect_refusal, run, stderr, stdout,
};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;
use serde_json::json;

use crate::roots::Bundle;
use crate::trial;

/// Tries to change all that is at `/ro` and `/ro.file`, and says what is there in the end.
const TRY_TO_CHANGE: &str = "for try in 'echo x >/ro/file' 'echo x >/ro/new' 'rm /ro/file' 'echo x >>/ro.file'; do \
    sh -c \"$try\" 2>&1; done; cat /ro/file /ro.file";

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("volumes: a directory is shared both ways while the container runs", shared),
        trial("volumes: files and directories can be read-only", read_only),
        trial("volumes: they hide what is in the image, the outer ones first", nested),
        trial("volumes: what cannot be had is refused before anything starts", refused),
        trial("bundle: it has the files and directories of the host that it binds", bundle_binds),
        trial("bundle: its root is the directory itself, which can be read-only", bundle_root),
        trial("bundle: what a virtual machine cannot do is refused", bundle_refused),
    ]
}

fn mapping(source: &Path, destination: &str) -> String {
    format!("{}:{destination}", source.display())
}

fn expect_text(path: &Path, expected: &str) -> Result {
    let text = read_to_string(path)?;
    ensure(text == expected, || format!("{}: {text:?}", path.display()))
}

/// A directory with a file in it, and a file.
fn things() -> Result<tempfile::TempDir> {
    let things = tempfile::tempdir()?;
    create_dir(things.path().join("directory"))?;
    write(things.path().join("directory/file"), "in directory\n")?;
    write(things.path().join("file"), "single\n")?;
    Ok(things)
}

fn shared() -> Result {
    let things = things()?;
    let directory = things.path().join("directory");
    detach("sharing", &["--rm", "-v", &mapping(&directory, "/data")], &["sleep", "1000"])?;
    let inside = |script: &str| bulkhead(["exec", "sharing", "sh", "-c", script]).output();
    let output = inside("cat /data/file && echo guest >/data/new && chown 12:34 /data/new")?;
    ensure(stdout(&output) == "in directory\n", || format!("{output:?}"))?;
    expect_text(&directory.join("new"), "guest\n")?;
    let owner = std::os::unix::fs::MetadataExt::uid(&directory.join("new").metadata()?);
    ensure(owner == 12, || format!("owner {owner}"))?;
    write(directory.join("new"), "changed by the host\n")?;
    eventually("the container sees what the host has written", || {
        Ok(stdout(&inside("cat /data/new")?) == "changed by the host\n")
    })?;
    expect_code(&bulkhead(["rm", "-f", "sharing"]).output()?, 0)
}

fn read_only() -> Result {
    let things = things()?;
    let (directory, file) = (things.path().join("directory"), things.path().join("file"));
    let mount = format!("type=bind,source={},target=/ro.file,readonly", file.display());
    let options = ["-v", &mapping(&directory, "/ro:ro"), "--mount", &mount];
    expect_unchanged(&stdout(&run(&options, &["sh", "-c", TRY_TO_CHANGE])?), &directory, &file)
}

fn expect_unchanged(said: &str, directory: &Path, file: &Path) -> Result {
    let refusals = said.matches("Read-only file system").count();
    ensure(refusals == 4 && said.ends_with("in directory\nsingle\n"), || said.to_owned())?;
    expect_text(&directory.join("file"), "in directory\n")?;
    expect_text(file, "single\n")?;
    ensure(!directory.join("new").exists(), || "a read-only directory has a new file".into())
}

fn nested() -> Result {
    let things = things()?;
    let (directory, file) = (things.path().join("directory"), things.path().join("file"));
    create_dir(directory.join("inner"))?;
    // The inner one is named first.
    let options = [
        "-v",
        &mapping(&things.path().join("file"), "/etc/inner/passwd"),
        "-v",
        &mapping(&directory, "/etc"),
        "--mount",
        &format!("type=bind,src={},dst=/made/for/it", file.display()),
    ];
    let output =
        run(&options, &["sh", "-c", "ls /etc; cat /etc/inner/passwd /made/for/it; test ! -e /etc/passwd"])?;
    expect_code(&output, 0)?;
    ensure(stdout(&output) == "file\ninner\nsingle\nsingle\n", || stdout(&output))
}

fn refused() -> Result {
    for (option, value, words) in [
        ("-v", "/nothing/like/it:/data", &["/nothing/like/it", "does not exist"][..]),
        ("-v", "/dev/null:/data", &["/dev/null", "devices of the host"]),
        (
            "--mount",
            "type=bind,source=/nothing/like/it,target=/data",
            &["/nothing/like/it", "does not exist"],
        ),
    ] {
        expect_refusal(&run(&[option, value], &["true"])?, 125, words)?;
    }
    for value in ["data:/data", "/etc:data", "/etc:/data:z", "/etc", "/etc:/proc"] {
        let output = run(&["-v", value], &["true"])?;
        expect_code(&output, 125)?;
        ensure(stderr(&output).starts_with(&format!("error: invalid value '{value}'")), || stderr(&output))?;
    }
    Ok(())
}

fn bundle_binds() -> Result {
    let things = things()?;
    let (directory, file) = (things.path().join("directory"), things.path().join("file"));
    let shared = things.path().join("shared");
    create_dir_all(shared.join("below"))?;
    let script = format!("{TRY_TO_CHANGE}; echo written >/rw/below/file; echo more >>/relative");
    let bundle = Bundle::new(&script, |config| {
        config["mounts"].as_array_mut().expect("an array").extend([
            json!({ "destination": "/ro", "type": "bind", "source": directory, "options": ["rbind", "ro"] }),
            json!({ "destination": "/ro.file", "type": "none", "source": file, "options": ["bind", "ro"] }),
            json!({ "destination": "/rw", "type": "bind", "source": shared, "options": ["rbind", "rw"] }),
            json!({ "destination": "/relative", "source": "beside", "options": ["bind"] }),
        ]);
    })?;
    write(bundle.path().join("beside"), "one\n")?;
    let output = bundle.run(&[])?;
    expect_code(&output, 0)?;
    // What the script says last.
    expect_unchanged(&stdout(&output), &directory, &file)?;
    expect_text(&shared.join("below/file"), "written\n")?;
    expect_text(&bundle.path().join("beside"), "one\nmore\n")
}

fn bundle_root() -> Result {
    let script = "echo changed >/marker; mkdir -p /made/in/it; echo x >/made/file; cat /marker";
    let bundle = Bundle::new(script, |_| {})?;
    let output = bundle.run(&[])?;
    ensure(stdout(&output) == "changed\n", || format!("{output:?}"))?;
    expect_text(&bundle.root().join("marker"), "changed\n")?;
    ensure(bundle.root().join("made/in/it").is_dir(), || "what was made is not there".into())?;
    let bundle = Bundle::new(script, |config| config["root"]["readonly"] = json!(true))?;
    let output = bundle.run(&[])?;
    ensure(stdout(&output) == "original\n", || format!("{output:?}"))?;
    expect_text(&bundle.root().join("marker"), "original\n")
}

fn bundle_refused() -> Result {
    let elsewhere = json!([{ "destination": "/x", "type": "bind", "source": "/nothing/like/it" }]);
    for (key, value, words) in [
        ("hooks", json!({ "poststop": [{ "path": "/bin/true" }] }), &["poststop hooks"][..]),
        ("mounts", elsewhere, &["/nothing/like/it", "No such file"]),
        ("linux", json!({ "namespaces": [] }), &["network of the host"]),
        ("root", json!({ "path": "elsewhere" }), &["elsewhere", "No such file"]),
        (
            "annotations",
            json!({ "io.bulkhead.vm.memory": "4G" }),
            &["io.bulkhead.vm.memory", "annotations.allow"],
        ),
    ] {
        let output = Bundle::new("true", |config| config[key] = value)?.run(&[])?;
        expect_refusal(&output, 125, words).map_err(|error| format!("{key}: {error}"))?;
    }
    Ok(())
}
