//! Images: what is not as it should be does not get into the store, and what does appears as it should.

use std::fs::{create_dir, create_dir_all, hard_link, write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use bulkhead_tests::bulkhead::{bulkhead, eventually, expect_code, expect_refusal, logs, stderr, stdout};
use bulkhead_tests::files::busybox_tree;
use bulkhead_tests::layout::{Image, archive};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;
use serde_json::json;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("image: one that is not there is refused, by name and by digest", unknown),
        trial("image: what is damaged, no archive or for another machine stays out of the store", refused),
        trial("image: where it says no command, one must be given", no_command),
        trial("image: its user, environment, directory, command and stop signal hold", config),
        trial("image: layers, whiteouts, opaque directories and hard links make one tree", layers),
    ]
}

fn unknown() -> Result {
    for name in ["no-such-image", "sha256:0123456789abcdef", "0123456789ab"] {
        let output = bulkhead(["run", "--rm", name, "--", "true"]).output()?;
        expect_refusal(&output, 125, &["there is no image", name, "bulkhead image import"])?;
    }
    let output = bulkhead(["image", "import", "/no/such/file"]).output()?;
    expect_refusal(&output, 125, &["/no/such/file", "give an OCI layout"])
}

/// A small layer.
fn small() -> Result<Vec<u8>> {
    let tree = tempfile::tempdir()?;
    write(tree.path().join("file"), "content\n")?;
    archive(tree.path())
}

fn import(layout: &Path) -> Result<std::process::Output> {
    Ok(bulkhead(["image", "import"]).arg(layout).output()?)
}

fn refused() -> Result {
    let listed = || Ok::<_, std::io::Error>(stdout(&bulkhead(["image", "ls", "--json"]).output()?));
    let before = listed()?;
    let layer = small()?;
    let image = |architecture, layer: &[u8]| Image {
        name: "broken:1",
        architecture,
        config: json!({ "Cmd": ["/bin/sh"] }),
        layers: vec![layer.to_vec()],
    };
    let flipped = tempfile::tempdir()?;
    let blob = image("amd64", &layer).write(flipped.path())?.remove(0);
    let mut byte = [0];
    let file = std::fs::File::options().read(true).write(true).open(&blob)?;
    file.read_exact_at(&mut byte, 600)?;
    file.write_all_at(&[byte[0] ^ 1], 600)?;
    expect_refusal(&import(flipped.path())?, 125, &["cannot be imported", "digest"])?;

    let no_archive = tempfile::tempdir()?;
    image("amd64", &b"this is no archive\n".repeat(1000)).write(no_archive.path())?;
    expect_refusal(&import(no_archive.path())?, 125, &["cannot be imported", "archive"])?;

    let foreign = tempfile::tempdir()?;
    image("arm64", &layer).write(foreign.path())?;
    expect_refusal(&import(foreign.path())?, 125, &["linux/arm64", "needs linux/amd64"])?;

    let after = listed()?;
    ensure(before == after, || format!("before: {before}; after: {after}"))
}

fn no_command() -> Result {
    let layout = tempfile::tempdir()?;
    let image = Image { name: "silent:1", architecture: "amd64", config: json!({}), layers: vec![small()?] };
    image.write(layout.path())?;
    expect_code(&import(layout.path())?, 0)?;
    let output = bulkhead(["run", "--rm", "silent:1"]).output()?;
    expect_refusal(&output, 125, &["no command", "give one"])?;
    expect_code(&bulkhead(["image", "rm", "silent:1"]).output()?, 0)
}

fn config() -> Result {
    let directory = tempfile::tempdir()?;
    let (tree, layout) = (directory.path().join("tree"), directory.path().join("layout"));
    busybox_tree(&tree)?;
    for name in ["etc", "srv"] {
        create_dir_all(tree.join(name))?;
    }
    write(tree.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nwww:x:1234:1234::/srv:/bin/sh\n")?;
    write(tree.join("etc/group"), "root:x:0:\nstaff:x:50:\n")?;
    let script =
        "echo $(id -u):$(id -g) $FROM $PWD $HOME; trap 'echo quit; exit 7' QUIT; while :; do sleep 0.1; done";
    let config = json!({
        "User": "www:staff", "Env": ["PATH=/bin", "FROM=image"], "WorkingDir": "/srv",
        "Entrypoint": ["sh", "-c"], "Cmd": [script], "StopSignal": "SIGQUIT"
    });
    let image = Image { name: "configured:1", architecture: "amd64", config, layers: vec![archive(&tree)?] };
    create_dir(&layout)?;
    image.write(&layout)?;
    expect_code(&import(&layout)?, 0)?;

    expect_code(&bulkhead(["run", "-d", "--name", "configured", "configured:1"]).output()?, 0)?;
    eventually("it says who and where it is", || Ok(logs("configured")? == "1234:50 image /srv /srv\n"))
        .map_err(|error| format!("{error}: {:?}", logs("configured")))?;
    expect_code(&bulkhead(["stop", "configured"]).output()?, 0)?;
    ensure(logs("configured")?.ends_with("\nquit\n"), || format!("{:?}", logs("configured")))?;
    let listed = stdout(&bulkhead(["ps", "-a", "--json"]).output()?);
    ensure(listed.contains("\"exit_code\": 7"), || listed)?;
    expect_code(&bulkhead(["rm", "configured"]).output()?, 0)?;

    let other = bulkhead(["run", "--rm", "-u", "root", "configured:1", "--", "id -u; id -g"]).output()?;
    ensure(stdout(&other) == "0\n0\n", || format!("{}{}", stdout(&other), stderr(&other)))?;
    expect_code(&bulkhead(["image", "rm", "configured:1"]).output()?, 0)
}

/// The lowest layer: busybox, and files of which the layers above take some away.
fn bottom(tree: &Path) -> Result<Vec<u8>> {
    busybox_tree(tree)?;
    let data = tree.join("data");
    create_dir_all(data.join("opaque/below"))?;
    create_dir_all(data.join("thin"))?;
    create_dir(data.join("was-directory"))?;
    for name in ["gone", "replaced", "kept", "opaque/hidden", "opaque/below/hidden", "thin/gone", "thin/kept"]
    {
        write(data.join(name), "bottom\n")?;
    }
    write(data.join("was-directory/hidden"), "bottom\n")?;
    hard_link(data.join("kept"), data.join("kept-too"))?;
    archive(tree)
}

fn middle(tree: &Path) -> Result<Vec<u8>> {
    let data = tree.join("data");
    create_dir_all(data.join("opaque"))?;
    for name in [".wh.gone", "opaque/.wh..wh..opq"] {
        write(data.join(name), "")?;
    }
    write(data.join("opaque/new"), "middle\n")?;
    write(data.join("replaced"), "middle\n")?;
    archive(tree)
}

fn top(tree: &Path) -> Result<Vec<u8>> {
    let data = tree.join("data");
    create_dir_all(data.join("thin"))?;
    write(data.join("thin/.wh.gone"), "")?;
    write(data.join("was-directory"), "top\n")?;
    write(data.join("linked"), "top\n")?;
    hard_link(data.join("linked"), data.join("linked-too"))?;
    archive(tree)
}

fn layers() -> Result {
    let directory = tempfile::tempdir()?;
    let at = |name: &str| directory.path().join(name);
    for name in ["middle", "top", "layout"] {
        create_dir(at(name))?;
    }
    let layers = vec![bottom(&at("bottom"))?, middle(&at("middle"))?, top(&at("top"))?];
    let config = json!({ "Env": ["PATH=/bin"], "WorkingDir": "/data", "Entrypoint": ["sh", "-c"] });
    Image { name: "layered:1", architecture: "amd64", config, layers }.write(&at("layout"))?;
    expect_code(&import(&at("layout"))?, 0)?;

    let script = "find . -type f | sort | xargs grep -H .; \
                  [ kept -ef kept-too ] && [ linked -ef linked-too ] && stat -c %h kept linked; \
                  rm replaced opaque/new; mkdir opaque/again; ls -A . opaque";
    let output = bulkhead(["run", "--rm", "layered:1", "--", script]).output()?;
    expect_code(&output, 0)?;
    let expected = "./kept:bottom\n./kept-too:bottom\n./linked:top\n./linked-too:top\n./opaque/new:middle\n\
                    ./replaced:middle\n./thin/kept:bottom\n./was-directory:top\n2\n2\n\
                    .:\nkept\nkept-too\nlinked\nlinked-too\nopaque\nthin\nwas-directory\n\nopaque:\nagain\n";
    ensure(stdout(&output) == expected, || format!("{}{}", stdout(&output), stderr(&output)))?;
    expect_code(&bulkhead(["image", "rm", "layered:1"]).output()?, 0)
}
