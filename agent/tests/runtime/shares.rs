//! Shares as roots and as bind mounts, whose place `in-lab.sh` has made of a tmpfs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use bulkhead_protocol::agent::rootfs::Upper;
use bulkhead_protocol::agent::{Rootfs, Stdio};
use serde_json::{Value, json};
use ttrpc::Code;

use super::output;
use crate::support::{self, Container, agent_pid, code, run, shell};

/// Where the host has a share, seen from here.
fn host(name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{}/root/run/bulkhead/shares", agent_pid())).join(name)
}

fn share(name: &str) -> Rootfs {
    Rootfs { share: name.into(), ..Rootfs::default() }
}

fn bind(spec: &mut Value, name: &str, destination: &str, options: &[&str]) {
    let mount = json!({
        "destination": destination, "source": format!("share:{name}"), "type": "bind", "options": options
    });
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

/// Run by itself, before there is anything in the device's place.
#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn nothing_is_shared_without_a_device() {
    run(async {
        let mut spec = shell("true");
        let error = Container::create_on("nodevice", &spec, output(), share("root")).await.err().unwrap();
        assert!(error.to_string().contains("no file system device"), "{error}");
        assert_eq!(code(Err::<(), _>(error)), Code::FAILED_PRECONDITION);
        bind(&mut spec, "volume", "/v", &["bind"]);
        assert_eq!(code(Container::create("nodevice", &spec, output()).await), Code::FAILED_PRECONDITION);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_share_is_a_root() {
    run(async {
        let script = "cat /layer; echo more >/written && echo written; mount | grep -c ' on / '";
        let container =
            Container::create_on("share1", &shell(script), output(), share("root")).await.unwrap();
        let finished = container.finish().await;
        assert_eq!(finished.stdout, "base\nwritten\n1\n", "{}", finished.stderr);
        assert_eq!(fs::read_to_string(host("root/written")).unwrap(), "more\n");

        let mut spec = shell("touch /x 2>&1; touch /tmp/x && echo writable");
        spec["root"] = json!({"path": "ignored", "readonly": true});
        let container = Container::create_on("share2", &spec, output(), share("root")).await.unwrap();
        let finished = container.finish().await;
        assert_eq!(finished.stdout, "touch: /x: Read-only file system\nwritable\n", "{}", finished.stderr);
        // The share is as it was, for others and for the next container.
        fs::write(host("root/y"), "").unwrap();
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", agent_pid())).unwrap();
        assert!(!mounts.contains("/containers/share"), "{mounts}");
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_share_that_is_no_root_is_refused() {
    run(async {
        fs::write(host("plain"), "").unwrap();
        for (rootfs, expected) in [
            (share("nonesuch"), Code::FAILED_PRECONDITION),
            (share("plain"), Code::INVALID_ARGUMENT),
            (share("../containers"), Code::INVALID_ARGUMENT),
            (Rootfs { upper: Some(Upper::TmpfsBytes(1 << 20)), ..share("root") }, Code::INVALID_ARGUMENT),
        ] {
            let error = Container::create_on("noshare", &shell("true"), output(), rootfs).await;
            assert_eq!(code(error), expected);
        }
        assert!(!std::path::Path::new("/sys/fs/cgroup/bulkhead/noshare").exists());
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn directories_and_files_are_bind_mounted() {
    run(async {
        fs::create_dir(host("volume")).unwrap();
        fs::write(host("volume/in"), "from the host\n").unwrap();
        fs::write(host("hosts"), "127.0.0.1 me\n").unwrap();
        let mut spec =
            shell("cat /new/vol/in /etc/hosts /made/file; echo out >/new/vol/out; echo x >>/etc/hosts");
        bind(&mut spec, "volume", "/new/vol", &["rbind", "rprivate", "rw"]);
        bind(&mut spec, "hosts", "/etc/hosts", &["rbind", "rprivate"]);
        bind(&mut spec, "hosts", "/made/file", &["bind", "ro"]);
        let finished = Container::create("bind1", &spec, output()).await.unwrap().finish().await;
        assert_eq!(finished.stdout, "from the host\n127.0.0.1 me\n127.0.0.1 me\n", "{}", finished.stderr);
        assert_eq!(fs::read_to_string(host("volume/out")).unwrap(), "out\n");
        assert_eq!(fs::read_to_string(host("hosts")).unwrap(), "127.0.0.1 me\nx\n");
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn options_of_bind_mounts_hold() {
    run(async {
        fs::create_dir(host("options")).unwrap();
        fs::copy("/bin/busybox", host("options/id")).unwrap();
        let script = "grep ' /v[0-9] ' /proc/mounts | cut -d' ' -f2,4 | cut -d, -f1-3; \
                      for n in 1 2 3; do touch /v$n/x 2>&1; done; touch /v4/x && echo written; /v4/id -u 2>&1";
        let mut spec = shell(script);
        bind(&mut spec, "options", "/v1", &["rbind", "ro"]);
        bind(&mut spec, "options", "/v2", &["bind", "rro", "rslave"]);
        bind(&mut spec, "options", "/v3", &["bind", "rw", "ro", "nosuid", "nodev"]);
        bind(&mut spec, "options", "/v4", &["bind", "noexec"]);
        let finished = Container::create("bind2", &spec, output()).await.unwrap().finish().await;
        let (mounts, rest) = finished.stdout.split_at(finished.stdout.find("touch").unwrap());
        assert_eq!(
            mounts,
            "/v1 ro,relatime,mode=755\n/v2 ro,relatime,mode=755\n/v3 ro,nosuid,nodev\n/v4 rw,noexec,relatime\n"
        );
        assert_eq!(
            rest,
            "touch: /v1/x: Read-only file system\ntouch: /v2/x: Read-only file system\n\
             touch: /v3/x: Read-only file system\nwritten\nsh: /v4/id: Permission denied\n",
            "{}",
            finished.stderr
        );
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn links_lead_nowhere_out_of_the_root() {
    run(async {
        // A share's entry that is a link, one whose content has links, and mount points that are links of the root.
        symlink("/etc", host("link")).unwrap();
        fs::create_dir(host("evil")).unwrap();
        symlink("/tmp", host("evil/up")).unwrap();
        symlink("../../../../../../../../tmp", host("evil/dots")).unwrap();
        fs::write(host("mark"), "mark\n").unwrap();

        let mut spec = shell("true");
        bind(&mut spec, "link", "/v", &["bind"]);
        assert_eq!(code(Container::create("links1", &spec, output()).await), Code::INVALID_ARGUMENT);

        let mut spec = shell("cat /tmp/link-up /tmp/link-dots; ls /v");
        bind(&mut spec, "evil", "/v", &["rbind"]);
        bind(&mut spec, "mark", "/v/up/link-up", &["bind"]);
        bind(&mut spec, "mark", "/v/dots/link-dots", &["bind"]);
        let finished = Container::create("links2", &spec, output()).await.unwrap().finish().await;
        // They were followed from the container's root.
        assert_eq!(finished.stdout, "mark\nmark\ndots\nup\n", "{}", finished.stderr);
        let outside = PathBuf::from(format!("/proc/{}/root/tmp", agent_pid()));
        assert!(!outside.join("link-up").exists() && !outside.join("link-dots").exists());

        for (destination, id) in [("/proc/sys", "links3"), ("/proc", "links4"), ("/to-proc/sys", "links5")] {
            let mut spec = shell("true");
            bind(&mut spec, "evil", destination, &["bind"]);
            let error = Container::create(id, &spec, output()).await.err().unwrap();
            assert!(error.to_string().contains("/proc"), "{error}");
            assert_eq!(code(Err::<(), _>(error)), Code::INVALID_ARGUMENT, "{destination}");
        }
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_share_that_is_missing_is_told_apart_from_what_is_no_share() {
    run(async {
        let mut spec = shell("true");
        bind(&mut spec, "nonesuch", "/v", &["bind"]);
        let error = Container::create("missing", &spec, output()).await.err().unwrap();
        assert!(error.to_string().contains("nonesuch"), "{error}");
        assert_eq!(code(Err::<(), _>(error)), Code::FAILED_PRECONDITION);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_user_namespace_sees_shares_too() {
    run(async {
        fs::write(host("shown"), "shown\n").unwrap();
        let mut spec = shell("true");
        support::add_namespace(&mut spec, "user");
        support::without_mounts(&mut spec, "/sys");
        spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        // The root belongs to somebody else, so the mount point is made where this one may make it.
        bind(&mut spec, "shown", "/tmp/shown", &["bind", "ro"]);
        spec["process"]["args"] = json!(["cat", "/tmp/shown"]);
        let finished = Container::create("usershare", &spec, output()).await.unwrap().finish().await;
        assert_eq!(finished.stdout, "shown\n", "{}", finished.stderr);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn containers_on_one_share_are_made_side_by_side() {
    run(async {
        let makers = (0..8).map(|n| {
            tokio::spawn(async move {
                let id = format!("beside{n}");
                let rootfs = share("root");
                Container::create_on(&id, &shell("sleep 100"), Stdio::default(), rootfs).await.unwrap()
            })
        });
        for maker in makers.collect::<Vec<_>>() {
            maker.await.unwrap().remove(true).await.unwrap();
        }
        let mounts = fs::read_to_string(format!("/proc/{}/mounts", agent_pid())).unwrap();
        assert_eq!(mounts.matches("/run/bulkhead/shares ").count(), 1, "{mounts}");
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_missing_working_directory_is_made_in_the_share_that_it_is_in() {
    run(async {
        fs::create_dir(host("work")).unwrap();
        let mut spec = shell("pwd; stat -c '%u %a' .; touch file");
        bind(&mut spec, "work", "/v", &["rbind"]);
        spec["process"]["cwd"] = json!("/v/a/b");
        let container = Container::create_on("work1", &spec, output(), share("root")).await.unwrap();
        let finished = container.finish().await;
        assert_eq!(finished.stdout, "/v/a/b\n0 755\n", "{}", finished.stderr);
        assert!(host("work/a/b/file").exists());
        assert!(host("root/v").is_dir() && !host("root/v/a").exists());

        let mut spec = shell("true");
        bind(&mut spec, "work", "/v", &["rbind", "ro"]);
        spec["process"]["cwd"] = json!("/v/c");
        assert!(Container::create("work2", &spec, output()).await.is_err());
        assert!(!host("work/c").exists());
    });
}
