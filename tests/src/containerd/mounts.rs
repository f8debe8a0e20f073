//! Directories and files of the host in a container.

use std::fs::{create_dir, read_to_string, write};
use std::path::Path;

use bulkhead_tests::bulkhead::{eventually, expect_code, stderr, stdout};
use bulkhead_tests::ctr::{in_background, run};
use bulkhead_tests::vm::{Result, ensure};
use libtest_mimic::Trial;

use crate::trial;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        trial("mounts: a directory is shared both ways while the container runs", directory),
        trial("mounts: a read-only directory can be read, not written", read_only_directory),
        trial("mounts: a single file is shared both ways", file),
        trial("mounts: a read-only file can be read, not written", read_only_file),
        trial("mounts: a large file is read whole in pieces of any size, and as it is by then", large_file),
        trial("mounts: several mounts are each in their place", several),
        trial("mounts: a source that is not there is an error that names it", missing),
    ]
}

fn bind(source: &Path, destination: &str, options: &str) -> String {
    format!("type=bind,src={},dst={destination},options={options}", source.display())
}

fn directory() -> Result {
    let shared = tempfile::tempdir()?;
    write(shared.path().join("before"), "host\n")?;
    let mount = bind(shared.path(), "/shared", "rbind:rw");
    let container = in_background("sharing", &["--mount", &mount], &["sleep", "1000"])?;
    let output = container.exec(&[
        "sh",
        "-c",
        "cat /shared/before && mkdir /shared/d && echo guest >/shared/d/new",
    ])?;
    ensure(stdout(&output) == "host\n", || format!("{output:?}"))?;
    let written = read_to_string(shared.path().join("d/new"))?;
    ensure(written == "guest\n", || written)?;
    // What the host changes may be seen a second later.
    write(shared.path().join("before"), "host has changed it\n")?;
    write(shared.path().join("after"), "")?;
    std::fs::remove_dir_all(shared.path().join("d"))?;
    eventually("the container sees what the host does", || {
        let script = "test -e /shared/after && test ! -e /shared/d && cat /shared/before";
        Ok(stdout(&container.exec(&["sh", "-c", script])?) == "host has changed it\n")
    })?;
    container.end()
}

fn read_only_directory() -> Result {
    let shared = tempfile::tempdir()?;
    write(shared.path().join("file"), "host\n")?;
    let mount = bind(shared.path(), "/shared", "rbind:ro");
    let script =
        "cat /shared/file; echo x >/shared/file; echo x >/shared/new; rm /shared/file; chmod 0 /shared";
    let output = run(&["--mount", &mount], &["sh", "-c", script])?;
    ensure(stdout(&output) == "host\n", || format!("{output:?}"))?;
    ensure(stderr(&output).matches("Read-only file system").count() == 4, || stderr(&output))?;
    let kept = read_to_string(shared.path().join("file"))?;
    ensure(kept == "host\n", || kept)
}

fn file() -> Result {
    let directory = tempfile::tempdir()?;
    let shared = directory.path().join("shared");
    write(&shared, "host\n")?;
    let mount = bind(&shared, "/etc/shared", "bind:rw");
    let container = in_background("sharing", &["--mount", &mount], &["sleep", "1000"])?;
    let output = container.exec(&["sh", "-c", "cat /etc/shared && echo guest >>/etc/shared"])?;
    ensure(stdout(&output) == "host\n", || format!("{output:?}"))?;
    let written = read_to_string(&shared)?;
    ensure(written == "host\nguest\n", || written)?;
    write(&shared, "host again\n")?;
    eventually("the container sees what the host has written", || {
        Ok(stdout(&container.exec(&["cat", "/etc/shared"])?) == "host again\n")
    })?;
    container.end()
}

fn read_only_file() -> Result {
    let directory = tempfile::tempdir()?;
    let shared = directory.path().join("shared");
    write(&shared, "host\n")?;
    let mount = bind(&shared, "/etc/shared", "bind:ro");
    let output = run(&["--mount", &mount], &["sh", "-c", "cat /etc/shared; echo x >/etc/shared"])?;
    ensure(stdout(&output) == "host\n", || format!("{output:?}"))?;
    ensure(stderr(&output).contains("Read-only file system"), || stderr(&output))?;
    let kept = read_to_string(&shared)?;
    ensure(kept == "host\n", || kept)
}

/// Large reads and small ones do not take the same way, and one must not see less than the other.
fn large_file() -> Result {
    let shared = tempfile::tempdir()?;
    let file = shared.path().join("file");
    let mut data: Vec<u8> =
        (0..2_500_000u32).map(|number| number.wrapping_mul(0x9e37_79b1).to_le_bytes()[3]).collect();
    write(&file, &data)?;
    let mount = bind(shared.path(), "/shared", "rbind:rw");
    let container = in_background("reading", &["--mount", &mount], &["sleep", "1000"])?;
    let reads = [
        "dd bs=1M",
        "dd bs=128k",
        "{ dd bs=300001 count=2; dd bs=4k count=3; dd bs=1M; }",
        "dd bs=4k",
        "{ dd bs=4k count=3; dd bs=1M; }",
    ];
    let expect = |script: &str, data: &[u8]| {
        let output = container.exec(&["sh", "-c", &format!("{script} </shared/file")])?;
        ensure(output.stdout == data, || {
            format!("{script}: {} bytes, {}", output.stdout.len(), stderr(&output))
        })
    };
    for script in reads {
        expect(script, &data)?;
    }
    // In the container it is seen at once, from the host a second later.
    let script = "printf guest | dd of=/shared/file bs=1 seek=1500000 conv=notrunc";
    expect_code(&container.exec(&["sh", "-c", script])?, 0)?;
    data[1_500_000..1_500_005].copy_from_slice(b"guest");
    expect(reads[0], &data)?;
    data.truncate(2_000_000);
    data[700_000..700_004].copy_from_slice(b"host");
    write(&file, &data)?;
    eventually("the container reads what the host has written", || {
        Ok(container.exec(&["dd", "if=/shared/file", "bs=1M"])?.stdout == data)
    })?;
    for script in reads {
        expect(script, &data)?;
    }
    container.end()
}

fn several() -> Result {
    let directory = tempfile::tempdir()?;
    let mut words = Vec::new();
    for name in ["a", "b", "c"] {
        let source = directory.path().join(name);
        create_dir(&source)?;
        write(source.join("name"), format!("{name}\n"))?;
        // One below the other, in an order that makes a difference.
        words.extend([
            "--mount".to_owned(),
            bind(&source, &format!("/mnt/{}", ["x", "x/y", "z"][words.len() / 2]), "rbind:rw"),
        ]);
        if name == "a" {
            create_dir(source.join("y"))?;
        }
    }
    let options: Vec<&str> = words.iter().map(String::as_str).collect();
    let output = run(&options, &["cat", "/mnt/x/name", "/mnt/x/y/name", "/mnt/z/name"])?;
    expect_code(&output, 0)?;
    ensure(stdout(&output) == "a\nb\nc\n", || format!("{output:?}"))
}

fn missing() -> Result {
    let mount = bind(Path::new("/nothing/like/it"), "/mnt", "rbind:rw");
    let output = run(&["--mount", &mount], &["true"])?;
    expect_code(&output, 1)?;
    let said = stderr(&output);
    ensure(said.contains("/nothing/like/it") && said.contains("no such file or directory"), || said)
}
