//! What the host sees of a running agent, call by call. The tests need one with the slots that `guest.sh` prepares, which
//! builds, starts and ends it: `agent/tests/guest.sh`.

#![allow(clippy::unwrap_used)]

mod runtime;
mod support;

use std::time::Duration;

use bulkhead_protocol::agent::rootfs::Upper;
use bulkhead_protocol::agent::{
    AddEntropyRequest, BlockSource, CloseStdinRequest, GetGuestDetailsRequest, ResizeTerminalRequest, Rootfs,
    SetClockRequest, SetHostnameRequest, Stdio,
};
use bulkhead_protocol::limits::PROTOCOL_VERSION;
use bulkhead_protocol::stream::Stream;
use serde_json::json;
use support::{BASE, Container, HOSTILE, MANY, SCRATCH, TOP, code, connect, run, shell, spec};
use ttrpc::Code;

/// Standard output and error, no input.
fn output() -> Stdio {
    Stdio { stdout: true, stderr: true, ..Stdio::default() }
}

fn interactive() -> Stdio {
    Stdio { stdin: true, ..output() }
}

fn terminal() -> Stdio {
    Stdio { terminal: true, rows: 24, columns: 80, stdin: true, stdout: true, ..Stdio::default() }
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn the_guest_tells_what_it_is() {
    run(async {
        let agent = connect().await;
        let details =
            agent.get_guest_details(support::context(), &GetGuestDetailsRequest::default()).await.unwrap();
        assert_eq!(details.protocol_version, PROTOCOL_VERSION);
        assert!(details.cpus_online > 0 && details.memory_total_bytes > 0 && details.ready_after_boot_ns > 0);

        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let realtime_ns = u64::try_from(now.as_nanos()).unwrap() + 3_600_000_000_000;
        let set = |realtime_ns| SetClockRequest { realtime_ns, ..SetClockRequest::default() };
        let answer = agent.set_clock(support::context(), &set(realtime_ns)).await.unwrap();
        assert!(answer.stepped && answer.offset_ns > 3_500_000_000_000);
        let answer =
            agent.set_clock(support::context(), &set(realtime_ns - 3_600_000_000_000)).await.unwrap();
        assert!(answer.stepped && answer.offset_ns < -3_500_000_000_000);

        let seed = |length| AddEntropyRequest { seed: vec![7; length], ..AddEntropyRequest::default() };
        agent.add_entropy(support::context(), &seed(64)).await.unwrap();
        assert_eq!(code(agent.add_entropy(support::context(), &seed(513)).await), Code::INVALID_ARGUMENT);
        let name = |hostname: &str| SetHostnameRequest { hostname: hostname.into(), ..Default::default() };
        agent.set_hostname(support::context(), &name("tester")).await.unwrap();
        assert_eq!(code(agent.set_hostname(support::context(), &name("")).await), Code::INVALID_ARGUMENT);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_container_runs_and_its_output_and_status_arrive() {
    run(async {
        let container =
            Container::create("plain", &shell("echo out; echo err >&2; exit 3"), output()).await.unwrap();
        let finished = container.finish().await;
        assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("out\n", "err\n"));
        assert_eq!((finished.status, finished.oom_killed), (3, false));
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_process_that_a_signal_ends_has_128_and_its_number() {
    run(async {
        let container =
            Container::create("signalled", &shell("kill -9 $$; sleep 100"), output()).await.unwrap();
        container.start().await.unwrap();
        // Process 1 of a namespace cannot kill itself; the host can.
        container.signal("", 9, false).await.unwrap();
        assert_eq!(container.wait("").await.exit_status, 137);
        assert_eq!(code(container.signal("", 9, false).await), Code::NOT_FOUND);
        container.remove(false).await.unwrap();
        assert_eq!(code(container.signal("", 9, false).await), Code::NOT_FOUND);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn namespaces_are_the_containers_own() {
    run(async {
        let script = "echo $$; hostname; ls /sys/class/net; cat /proc/self/cgroup";
        let mut spec = shell(script);
        spec["hostname"] = json!("inner");
        let finished = Container::create("spaces", &spec, output()).await.unwrap().finish().await;
        // Process 1, its name, the loopback device alone, the root of the cgroups.
        assert_eq!(finished.stdout, "1\ninner\nlo\n0::/\n", "{}", finished.stderr);

        let script = "ip addr show lo | grep -oE 'LOOPBACK,UP|inet[6]? [0-9.:/]+'";
        let finished = Container::create("loopback", &shell(script), output()).await.unwrap().finish().await;
        assert!(finished.stdout.starts_with("LOOPBACK,UP\ninet 127.0.0.1/8\n"), "{}", finished.stdout);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_container_without_a_network_namespace_has_the_guests() {
    run(async {
        let mut spec = shell("ip link show lo | grep -c UP; readlink /proc/self/ns/net");
        support::without_namespace(&mut spec, "network");
        let first = Container::create("net1", &spec, output()).await.unwrap().finish().await;
        let second = Container::create("net2", &spec, output()).await.unwrap().finish().await;
        assert!(first.stdout.starts_with("1\nnet:["), "{} {}", first.stdout, first.stderr);
        assert_eq!(first.stdout, second.stdout);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn parameters_of_the_guests_network_are_set_or_named() {
    run(async {
        let mut spec = shell("cd /proc/sys/net/ipv4; cat ping_group_range ip_unprivileged_port_start");
        support::without_namespace(&mut spec, "network");
        spec["linux"]["sysctl"] =
            json!({"net.ipv4.ping_group_range": "7 4711", "net/ipv4/ip_unprivileged_port_start": "81"});
        let finished = Container::create("sysctl1", &spec, output()).await.unwrap().finish().await;
        assert_eq!(finished.stdout, "7\t4711\n81\n", "{}", finished.stderr);
        for (id, name, value) in [
            ("sysctl2", "net.ipv4.nonesuch", "1"),
            ("sysctl3", "net.ipv4.ping_group_range", "many"),
            ("sysctl4", "net/../kernel/panic", "1"),
        ] {
            spec["linux"]["sysctl"] = json!({name: value});
            let error = Container::create(id, &spec, output()).await.err().unwrap();
            assert!(error.to_string().contains(name), "{error}");
            assert_eq!(code(Err::<(), _>(error)), Code::INVALID_ARGUMENT, "{name}");
        }
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn input_ends_in_band_and_by_call() {
    run(async {
        let container = Container::create("cat", &spec(&["cat"]), interactive()).await.unwrap();
        let mut input = container.stream("", Stream::Stdin).await;
        container.start().await.unwrap();
        input.send(b"through the pipe").await;
        input.shutdown();
        assert_eq!(container.finish_started().await.stdout, "through the pipe");

        let container = Container::create("cat2", &spec(&["cat"]), interactive()).await.unwrap();
        let mut input = container.stream("", Stream::Stdin).await;
        container.start().await.unwrap();
        input.send(b"closed by a call").await;
        let close = CloseStdinRequest { container_id: container.id.clone(), ..CloseStdinRequest::default() };
        // What was sent is in the socket before the call is made, but in order only with itself.
        tokio::time::sleep(Duration::from_millis(50)).await;
        container.agent.close_stdin(support::context(), &close).await.unwrap();
        assert_eq!(container.finish_started().await.stdout, "closed by a call");
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn much_output_arrives_whole_after_the_process_is_gone() {
    run(async {
        let script = "dd if=/dev/zero bs=64k count=512 2>/dev/null | tr '\\0' x; echo end";
        let container = Container::create("much", &shell(script), output()).await.unwrap();
        let mut stdout = container.stream("", Stream::Stdout).await;
        container.start().await.unwrap();
        let read = tokio::spawn(async move { stdout.read_to_end().await });
        let status = container.wait("").await.exit_status;
        container.remove(false).await.unwrap();
        let bytes = read.await.unwrap();
        assert_eq!((status, bytes.len()), (0, 32 * 1024 * 1024 + 4));
        assert!(bytes.ends_with(b"xend\n"));
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_child_that_keeps_the_output_open_does_not_delay_the_end() {
    run(async {
        // Without a namespace of its own for process ids, the child outlives the exec that made it.
        let container = Container::create("keeper", &shell("sleep 100"), Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        container.exec("x", &["sh", "-c", "(sleep 5; echo late) & echo early"], output(), "").await.unwrap();
        let mut stdout = container.stream("x", Stream::Stdout).await;
        let status = container.wait("x").await;
        assert_eq!(status.exit_status, 0);
        assert_eq!(stdout.read_to_end().await, b"early\nlate\n");
        container.remove(true).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn output_to_a_host_that_hangs_up_ends_the_process() {
    run(async {
        let container = Container::create("yes", &spec(&["yes"]), output()).await.unwrap();
        let mut stdout = container.stream("", Stream::Stdout).await;
        container.start().await.unwrap();
        stdout.read_some().await;
        drop(stdout);
        // yes is process 1, which a signal without a handler does not end: it sees EPIPE.
        assert_ne!(container.wait("").await.exit_status, 0);
        container.remove(false).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn dev_stdout_can_be_opened_by_the_user() {
    run(async {
        let mut spec = shell("echo one >/dev/stdout; echo two >/dev/stderr; id -u");
        spec["process"]["user"] = json!({"uid": 33, "gid": 33});
        let finished = Container::create("devout", &spec, output()).await.unwrap().finish().await;
        assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("one\n33\n", "two\n"));
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn users_are_those_of_the_image() {
    run(async {
        let script = "id -u; id -g; id -G; echo $HOME";
        let spec = shell(script);
        let finished = Container::create_as("user", &spec, output(), "web").await.unwrap().finish().await;
        assert_eq!(finished.stdout, "33\n33\n33 4\n/var/www\n", "{}", finished.stderr);
        let finished =
            Container::create_as("user2", &spec, output(), "4711:log").await.unwrap().finish().await;
        assert_eq!(finished.stdout, "4711\n4\n4\n/\n", "{}", finished.stderr);

        let error = Container::create_as("user3", &spec, output(), "nobodyhere").await.err().unwrap();
        assert!(error.to_string().contains("nobodyhere"), "{error}");
        assert_eq!(code(Err::<(), _>(error)), Code::INVALID_ARGUMENT);

        let container = Container::create("user4", &shell("sleep 100"), Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        container.exec("x", &["sh", "-c", script], output(), "web").await.unwrap();
        assert_eq!(container.finish_exec("x").await.stdout, "33\n33\n33 4\n/var/www\n");
        let error = container.exec("y", &["id"], output(), "nobodyhere").await.unwrap_err();
        assert_eq!(code(Err::<(), _>(error)), Code::INVALID_ARGUMENT);
        container.remove(true).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn programs_that_cannot_be_run_are_told_apart() {
    run(async {
        for (id, program, expected) in [
            ("p1", "nonesuch", Code::NOT_FOUND),
            ("p2", "/bin/nonesuch", Code::NOT_FOUND),
            ("p3", "/etc/passwd", Code::PERMISSION_DENIED),
            ("p4", "/etc", Code::PERMISSION_DENIED),
        ] {
            let error = Container::create(id, &spec(&[program]), output()).await.err().unwrap();
            assert!(error.to_string().contains(program), "{error}");
            assert_eq!(code(Err::<(), _>(error)), expected, "{program}");
        }
        // These are there and executable; only their execution shows that they are no programs.
        for (id, program, expected) in
            [("p5", "/bin/garbage", Code::PERMISSION_DENIED), ("p6", "/bin/orphan", Code::NOT_FOUND)]
        {
            let container = Container::create(id, &spec(&[program]), output()).await.unwrap();
            assert_eq!(code(container.start().await), expected, "{program}");
            container.remove(true).await.unwrap();
        }
        let container = Container::create("p7", &shell("sleep 100"), Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        for (program, expected) in [
            ("nonesuch", Code::NOT_FOUND),
            ("/etc/passwd", Code::PERMISSION_DENIED),
            ("/bin/garbage", Code::PERMISSION_DENIED),
            ("/bin/orphan", Code::NOT_FOUND),
        ] {
            assert_eq!(code(container.exec("x", &[program], output(), "").await), expected, "{program}");
        }
        container.remove(true).await.unwrap();
        // Here "not found" would mean the program.
        assert_eq!(code(container.start().await), Code::FAILED_PRECONDITION);
        assert_eq!(code(container.exec("x", &["true"], output(), "").await), Code::FAILED_PRECONDITION);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn terminals_have_a_size_and_a_console() {
    run(async {
        let script = "stty size; tty; echo >/dev/console written; read line; stty size";
        let mut spec = shell(script);
        spec["process"]["terminal"] = json!(true);
        let container = Container::create("tty", &spec, terminal()).await.unwrap();
        let mut input = container.stream("", Stream::Stdin).await;
        let mut screen = container.stream("", Stream::Stdout).await;
        container.start().await.unwrap();
        let before = screen.read_until("written\r\n").await;
        assert!(
            before.contains("24 80\r\n/dev/pts/0\r\n") || before.contains("24 80\r\n/dev/console\r\n"),
            "{before}"
        );
        let size = ResizeTerminalRequest {
            container_id: container.id.clone(),
            rows: 50,
            columns: 132,
            ..ResizeTerminalRequest::default()
        };
        container.agent.resize_terminal(support::context(), &size).await.unwrap();
        input.send(b"\n").await;
        let after = String::from_utf8(screen.read_to_end().await).unwrap();
        assert!(after.contains("50 132"), "{after}");
        assert_eq!(container.wait("").await.exit_status, 0);
        container.remove(false).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_terminal_is_its_users() {
    run(async {
        let script = "echo >/dev/stdout $(stat -c %u:%g $(tty))";
        let mut spec = shell(script);
        spec["process"]["user"] = json!({"uid": 33, "gid": 33});
        let container = Container::create("ttyuser", &spec, terminal()).await.unwrap();
        let mut screen = container.stream("", Stream::Stdout).await;
        container.start().await.unwrap();
        // The group is that of the option of devpts.
        assert_eq!(String::from_utf8(screen.read_to_end().await).unwrap(), "33:5\r\n");
        container.remove(true).await.unwrap();

        let mut spec = shell("sleep 100");
        support::add_namespace(&mut spec, "user");
        support::without_mounts(&mut spec, "/sys");
        spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        let container = Container::create("ttyuser2", &spec, Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        container.exec("x", &["sh", "-c", script], terminal(), "web").await.unwrap();
        let mut screen = container.stream("x", Stream::Stdout).await;
        assert_eq!(String::from_utf8(screen.read_to_end().await).unwrap(), "33:5\r\n");
        container.remove(true).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_terminal_that_its_process_closes_and_opens_again_goes_on() {
    run(async {
        let container = Container::create("reopen", &shell("sleep 100"), Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        let script = "t=$(tty); echo one; exec <&- >&- 2>&-; sleep 0.3; echo two >$t; sleep 0.3; \
                      exec >$t; echo three; exit 7";
        container.exec("x", &["sh", "-c", script], terminal(), "").await.unwrap();
        let mut screen = container.stream("x", Stream::Stdout).await;
        assert_eq!(String::from_utf8(screen.read_to_end().await).unwrap(), "one\r\ntwo\r\nthree\r\n");
        assert_eq!(container.wait("x").await.exit_status, 7);
        container.remove(true).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_terminal_outlives_the_end_of_its_input_but_not_its_host() {
    run(async {
        let container = Container::create("hang", &shell("sleep 100"), Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        let script = "trap 'exit 7' HUP; echo ready; while :; do sleep 0.05; done";
        container.exec("x", &["sh", "-c", script], terminal(), "").await.unwrap();
        let input = container.stream("x", Stream::Stdin).await;
        let mut screen = container.stream("x", Stream::Stdout).await;
        screen.read_until("ready").await;
        drop(input);
        let ended = tokio::time::timeout(Duration::from_millis(500), container.wait("x")).await;
        assert!(ended.is_err(), "the end of the input has ended the process");
        drop(screen);
        assert_eq!(container.wait("x").await.exit_status, 7);
        container.remove(true).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn execs_have_rights_of_their_own_within_the_containers_filter() {
    run(async {
        let mut spec = shell("sleep 100");
        // mkdir(2) and mkdirat(2) fail in the whole container.
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]
        });
        let container = Container::create("rights", &spec, Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        let script =
            "grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; ulimit -n; pwd; echo $A; mkdir /tmp/x";
        let process = json!({
            "args": ["sh", "-c", script], "cwd": "/var", "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/bin", "A=b"], "noNewPrivileges": true,
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}]
        });
        container.exec_process("x", &process, output(), "").await.unwrap();
        let finished = container.finish_exec("x").await;
        assert_eq!(
            finished.stdout, "CapEff:\t0000000000000020\nNoNewPrivs:\t1\nSeccomp:\t2\n77\n/var\nb\n",
            "{}",
            finished.stderr
        );
        assert!(finished.stderr.contains("not supported"), "{}", finished.stderr);

        let error = container
            .exec_process(
                "y",
                &json!({"args": ["true"], "cwd": "/nonesuch", "user": {"uid": 0, "gid": 0}}),
                output(),
                "",
            )
            .await;
        assert_eq!(code(error), Code::INVALID_ARGUMENT);
        container.remove(true).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn what_the_configuration_says_of_the_process_holds() {
    run(async {
        let mut spec = shell(
            "grep -E '^(Cap(Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs|Seccomp|Umask|Groups)' /proc/self/status; \
             cat /proc/self/oom_score_adj; ulimit -n; ulimit -l; pwd; cat /proc/sys/kernel/shmmax",
        );
        spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_CHOWN", "CAP_KILL"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]
        });
        spec["process"]["user"] = json!({"uid": 0, "gid": 0, "umask": 63, "additionalGids": [5, 6]});
        spec["process"]["oomScoreAdj"] = json!(321);
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 512, "hard": 1024}]);
        spec["process"]["cwd"] = json!("/made/by/../for/me");
        spec["linux"]["sysctl"] = json!({"kernel.shmmax": "4242424"});
        let finished = Container::create("holds", &spec, output()).await.unwrap().finish().await;
        // Executing a program as root grants what the bounding set holds (capabilities(7)).
        let expected = "Umask:\t0077\nGroups:\t5 6 \nCapInh:\t0000000000000000\nCapPrm:\t0000000000000021\n\
                        CapEff:\t0000000000000021\nCapBnd:\t0000000000000021\nCapAmb:\t0000000000000000\n\
                        NoNewPrivs:\t0\nSeccomp:\t0\nSeccomp_filters:\t0\n321\n512\n";
        assert!(finished.stdout.starts_with(expected), "{} {}", finished.stdout, finished.stderr);
        assert!(finished.stdout.ends_with("/made/for/me\n4242424\n"), "{}", finished.stdout);
        // The limit for locked memory is not what the loading of the device filter needed.
        assert!(!finished.stdout.contains("\n131072\n"), "{}", finished.stdout);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_process_without_limits_of_its_own_may_open_many_files() {
    run(async {
        let script = "ulimit -Sn; ulimit -Hn; sleep 100";
        let container = Container::create("files", &shell(script), output()).await.unwrap();
        let mut stdout = container.stream("", Stream::Stdout).await;
        container.start().await.unwrap();
        stdout.read_until("1024\n1048576\n").await;
        container.exec("x", &["sh", "-c", "ulimit -Sn; ulimit -Hn"], output(), "").await.unwrap();
        assert_eq!(container.finish_exec("x").await.stdout, "1024\n1048576\n");
        container.remove(true).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn the_propagation_of_the_root_is_what_was_asked_for() {
    run(async {
        let script = "grep -oE ' / / .* (shared|unbindable)' /proc/self/mountinfo | grep -oE '[a-z]+$' || echo neither";
        for (id, word, expected) in [
            ("prop1", "rprivate", "neither\n"),
            ("prop2", "rslave", "neither\n"),
            ("prop3", "rshared", "shared\n"),
            ("prop4", "runbindable", "unbindable\n"),
        ] {
            let mut spec = shell(script);
            spec["linux"]["rootfsPropagation"] = json!(word);
            let finished = Container::create(id, &spec, output()).await.unwrap().finish().await;
            assert_eq!(finished.stdout, expected, "{word}: {}", finished.stderr);
        }
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_missing_working_directory_in_a_tmpfs_is_made() {
    run(async {
        let mut spec = shell("pwd; stat -c '%u %a' .; touch file && ls");
        spec["process"]["cwd"] = json!("/tmp/a/b");
        let finished = Container::create("late1", &spec, output()).await.unwrap().finish().await;
        assert_eq!(finished.stdout, "/tmp/a/b\n0 755\nfile\n", "{}", finished.stderr);
        // Only root may write to the root of /dev.
        spec["process"]["cwd"] = json!("/dev/a");
        spec["process"]["user"] = json!({"uid": 33, "gid": 33});
        let error = Container::create("late2", &spec, output()).await.err().unwrap();
        assert!(error.to_string().contains("/dev/a"), "{error}");
        assert_eq!(code(Err::<(), _>(error)), Code::INVALID_ARGUMENT);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn programs_are_found_although_access_cannot_be_asked_for() {
    run(async {
        let mut spec = shell("echo ran");
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["faccessat2"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]
        });
        let finished = Container::create("access", &spec, output()).await.unwrap().finish().await;
        assert_eq!(finished.stdout, "ran\n", "{}", finished.stderr);
        spec["process"]["args"] = json!(["/etc/passwd"]);
        assert_eq!(code(Container::create("access", &spec, output()).await), Code::PERMISSION_DENIED);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn seccomp_filters_work_with_and_without_new_privileges() {
    run(async {
        for (id, flag) in [("sec1", json!(true)), ("sec2", json!(false)), ("sec3", json!(null))] {
            let mut spec = shell("mkdir /tmp/x || echo refused; grep Seccomp: /proc/self/status");
            spec["linux"]["seccomp"] = json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]
            });
            if !flag.is_null() {
                spec["process"]["noNewPrivileges"] = flag;
            }
            let finished = Container::create(id, &spec, output()).await.unwrap().finish().await;
            assert_eq!(finished.stdout, "refused\nSeccomp:\t2\n", "{}", finished.stderr);
        }
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn masked_and_read_only_paths_are() {
    run(async {
        let mut spec = shell(
            "cat /proc/timer_list | wc -c; ls /proc/tty | wc -l; touch /ro/x 2>&1; touch /rw && echo writable",
        );
        spec["linux"]["maskedPaths"] = json!(["/proc/timer_list", "/proc/tty", "/nonesuch"]);
        spec["linux"]["readonlyPaths"] = json!(["/ro", "/nonesuch"]);
        let finished = Container::create("masked", &spec, output()).await.unwrap().finish().await;
        assert_eq!(
            finished.stdout, "0\n0\ntouch: /ro/x: Read-only file system\nwritable\n",
            "{}",
            finished.stderr
        );

        let mut spec = shell("touch /x 2>&1; touch /tmp/x && echo writable");
        spec["root"] = json!({"path": "ignored", "readonly": true});
        let finished = Container::create("readonly", &spec, output()).await.unwrap().finish().await;
        assert_eq!(finished.stdout, "touch: /x: Read-only file system\nwritable\n", "{}", finished.stderr);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_container_that_may_make_devices_cannot_open_the_guests_disks() {
    run(async {
        let script = "mknod /tmp/disk b 7 0 2>&1; cat /tmp/disk 2>&1 | head -c 100; \
                      mknod /tmp/kmsg c 1 11 && cat /tmp/kmsg 2>&1 | head -c 100; \
                      mknod /tmp/null c 1 3 && echo x >/tmp/null && echo null works";
        for (id, devices) in [
            ("dev1", json!(null)),
            ("dev2", json!([{"allow": false, "access": "rwm"}])),
            (
                "dev3",
                json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "r"}]),
            ),
        ] {
            let mut spec = shell(script);
            spec["process"]["capabilities"] = support::all_capabilities();
            if devices.is_null() {
                spec["linux"].as_object_mut().unwrap().remove("resources");
            } else {
                spec["linux"]["resources"] = json!({"devices": devices});
            }
            let finished = Container::create(id, &spec, output()).await.unwrap().finish().await;
            // Making nodes is allowed, opening them is not.
            assert_eq!(
                finished.stdout,
                "cat: can't open '/tmp/disk': Operation not permitted\n\
                 cat: can't open '/tmp/kmsg': Operation not permitted\nnull works\n",
                "{id}: {}",
                finished.stderr
            );
        }
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn limits_are_those_of_the_configuration() {
    run(async {
        let mut spec = shell(
            "cd /sys/fs/cgroup; cat pids.max memory.max memory.swap.max memory.low cpu.max cpu.weight cpuset.cpus io.max; \
             echo 1000 2>/dev/null >pids.max || echo refused",
        );
        spec["linux"]["resources"] = json!({
            "pids": {"limit": 20},
            "memory": {"limit": 67_108_864, "swap": 67_108_864, "reservation": 33_554_432},
            "cpu": {"shares": 512, "quota": 50000, "period": 100_000, "cpus": "0"},
            "blockIO": {"throttleReadBpsDevice": [{"major": 7, "minor": 0, "rate": 1_048_576}]}
        });
        support::writable_cgroups(&mut spec);
        let container = Container::create("limits", &spec, output()).await.unwrap();
        let stats = container.stats().await.unwrap();
        assert_eq!((stats.numbers["memory.max"], stats.numbers["pids.max"]), (67_108_864, 20));
        assert!(stats.numbers["memory.current"] > 0 && stats.numbers["pids.current"] == 1);
        assert!(stats.cpu.contains_key("usage_usec") && stats.memory.contains_key("anon"));
        let finished = container.finish().await;
        // The group is the root of a namespace that does not own it.
        assert_eq!(
            finished.stdout,
            "20\n67108864\n0\n33554432\n50000 100000\n59\n0\n7:0 rbps=1048576 wbps=max riops=max wiops=max\nrefused\n",
            "{}",
            finished.stderr
        );
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_memory_hog_is_killed_and_the_rest_lives() {
    run(async {
        let neighbour = Container::create("neighbour", &shell("sleep 100"), Stdio::default()).await.unwrap();
        neighbour.start().await.unwrap();
        let mut spec = shell("dd if=/dev/zero of=/dev/null bs=200M count=1");
        spec["process"]["args"] = json!(["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"]);
        spec["linux"]["resources"] = json!({"memory": {"limit": 33_554_432, "swap": 33_554_432}});
        let finished = Container::create("hog", &spec, output()).await.unwrap().finish().await;
        assert_eq!((finished.status, finished.oom_killed), (137, true), "{}", finished.stderr);
        assert!(neighbour.stats().await.is_ok());
        neighbour.remove(true).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_fork_bomb_stays_within_its_limit_and_can_be_killed() {
    run(async {
        let mut spec = shell("f() { f | f & }; (f) 2>/dev/null & exec sleep 100");
        spec["linux"]["resources"] = json!({"pids": {"limit": 64}});
        let container = Container::create("bomb", &spec, Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        tokio::time::sleep(Duration::from_secs(2)).await;
        let stats = container.stats().await.unwrap();
        assert!(stats.numbers["pids.current"] <= 64, "{}", stats.numbers["pids.current"]);
        let other = Container::create("calm", &shell("echo calm"), output()).await.unwrap();
        assert_eq!(other.finish().await.stdout, "calm\n");
        container.signal("", 9, true).await.unwrap();
        assert_eq!(container.wait("").await.exit_status, 137);
        container.remove(false).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_user_namespace_maps_root_and_is_joined_by_execs() {
    run(async {
        let mut spec = shell("cat /proc/self/uid_map | tr -s ' '; id -u; sleep 100");
        support::add_namespace(&mut spec, "user");
        // A user namespace may mount a sysfs only where none is partly covered, as guest.sh covers the lab's.
        support::without_mounts(&mut spec, "/sys");
        spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        spec["linux"]["gidMappings"] = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 5000, "hard": 6000}]);
        let container = Container::create("userns", &spec, output()).await.unwrap();
        let mut stdout = container.stream("", Stream::Stdout).await;
        container.start().await.unwrap();
        assert_eq!(stdout.read_until("65536\n0\n").await.trim_start(), "0 100000 65536\n0\n");
        container
            .exec("x", &["sh", "-c", "tr -s ' ' </proc/self/uid_map; echo >/dev/stdout ok"], output(), "")
            .await
            .unwrap();
        assert_eq!(container.finish_exec("x").await.stdout.trim_start(), "0 100000 65536\nok\n");
        container.remove(true).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn roots_are_layered_and_written_where_they_should() {
    run(async {
        let source = |slot| BlockSource { slot, ..BlockSource::default() };
        let script =
            "cat /layer; test -e /gone || echo gone; touch /new && echo new; ls /scratch 2>/dev/null";
        let root = |lower: &[u32], upper| Rootfs {
            lower: lower.iter().map(|&slot| source(slot)).collect(),
            upper,
            ..Rootfs::default()
        };
        for (id, rootfs, expected) in [
            ("root1", root(&[TOP, BASE], Some(Upper::TmpfsBytes(1 << 20))), "top\ngone\nnew\n"),
            ("root2", root(&[BASE], Some(Upper::TmpfsBytes(1 << 20))), "base\nnew\n"),
            ("root3", root(&[TOP, BASE], Some(Upper::Ext4(source(SCRATCH)))), "top\ngone\nnew\n"),
            ("root4", root(&[TOP, BASE], None), "top\ngone\n"),
            ("root5", root(&[BASE], None), "base\n"),
        ] {
            let finished =
                Container::create_on(id, &shell(script), output(), rootfs).await.unwrap().finish().await;
            assert_eq!(finished.stdout, expected, "{id}: {}", finished.stderr);
        }
        // More than mount(2) would have room for.
        let many: Vec<u32> = (MANY..MANY + 100).chain([BASE]).collect();
        let rootfs = root(&many, Some(Upper::TmpfsBytes(1 << 20)));
        let count = shell("ls /many | wc -l; cat /layer");
        let finished = Container::create_on("root6", &count, output(), rootfs).await.unwrap().finish().await;
        assert_eq!(finished.stdout, "100\nbase\n", "{}", finished.stderr);
        // The kernel takes a file system as a layer once, and says so.
        let rootfs = root(&[BASE, BASE], None);
        let error = Container::create_on("root8", &count, output(), rootfs).await.err().unwrap();
        assert!(error.to_string().contains("overlay of 2 layers"), "{error}");
        let full = root(&[BASE], Some(Upper::TmpfsBytes(1 << 20)));
        let script = "dd if=/dev/zero of=/big bs=1M count=2 2>&1 | grep -o 'No space left'";
        let finished =
            Container::create_on("root7", &shell(script), output(), full).await.unwrap().finish().await;
        assert_eq!(finished.stdout, "No space left\n", "{}", finished.stderr);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn a_hostile_root_is_refused() {
    run(async {
        let rootfs = Rootfs {
            lower: vec![BlockSource { slot: HOSTILE, ..BlockSource::default() }],
            upper: Some(Upper::TmpfsBytes(1 << 20)),
            ..Rootfs::default()
        };
        let error = Container::create_on("hostile", &shell("true"), output(), rootfs).await.err().unwrap();
        assert!(error.to_string().contains("dev of the image is not a directory"), "{error}");
        assert_eq!(code(Err::<(), _>(error)), Code::INVALID_ARGUMENT);
        let absent =
            Rootfs { lower: vec![BlockSource { slot: 9999, ..BlockSource::default() }], ..Rootfs::default() };
        let error = Container::create_on("absent", &shell("true"), output(), absent).await.err().unwrap();
        assert_eq!(code(Err::<(), _>(error)), Code::INVALID_ARGUMENT);
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn what_is_not_supported_is_refused_by_name() {
    run(async {
        for (id, path, value, word) in [
            ("ref1", "/hooks", json!({"prestart": [{"path": "/bin/true"}]}), "prestart"),
            ("ref2", "/hooks", json!({"poststop": [{"path": "/bin/true"}]}), "poststop"),
            ("ref3", "/linux/resources", json!({"memory": {"swappiness": 10}}), "swappiness"),
            ("ref4", "/linux/resources", json!({"unified": {"../memory.max": "max"}}), "../memory.max"),
            (
                "ref5",
                "/linux/devices",
                json!([{"path": "/dev/../x", "type": "c", "major": 1, "minor": 3}]),
                "/dev/../x",
            ),
            ("ref6", "/linux/namespaces", json!([{"type": "pid"}]), "mount namespace"),
            (
                "ref7",
                "/mounts",
                json!([{"destination": "/x", "source": "/run", "type": "bind", "options": ["rbind"]}]),
                "/x",
            ),
            ("ref8", "/linux/sysctl", json!({"kernel.panic": "1"}), "kernel.panic"),
            ("ref9", "/process/args", json!([]), "process.args"),
            ("ref10", "/linux/rootfsPropagation", json!("rhidden"), "rhidden"),
        ] {
            let mut spec = shell("true");
            let (parent, name) = path.rsplit_once('/').unwrap();
            spec.pointer_mut(parent).unwrap()[name] = value;
            let error = Container::create(id, &spec, output()).await.err().unwrap();
            assert!(error.to_string().contains(word), "{path}: {error}");
            assert_eq!(code(Err::<(), _>(error)), Code::INVALID_ARGUMENT, "{path}");
        }
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn calls_out_of_turn_are_refused() {
    run(async {
        assert_eq!(code(Container::create("../up", &shell("true"), output()).await), Code::INVALID_ARGUMENT);
        let container = Container::create("turn", &shell("sleep 100"), output()).await.unwrap();
        assert_eq!(code(Container::create("turn", &shell("true"), output()).await), Code::ALREADY_EXISTS);
        assert_eq!(code(container.exec("x", &["true"], output(), "").await), Code::FAILED_PRECONDITION);
        container.start().await.unwrap();
        assert_eq!(code(container.start().await), Code::FAILED_PRECONDITION);
        assert_eq!(code(container.remove(false).await), Code::FAILED_PRECONDITION);
        assert_eq!(code(container.signal("nonesuch", 15, false).await), Code::NOT_FOUND);
        assert_eq!(code(container.signal("", 65, false).await), Code::INVALID_ARGUMENT);
        container.exec("x", &["sleep", "100"], output(), "").await.unwrap();
        assert_eq!(code(container.exec("x", &["true"], output(), "").await), Code::ALREADY_EXISTS);
        container.remove(true).await.unwrap();
        assert_eq!(code(container.stats().await), Code::NOT_FOUND);
        // A container that was never started can be removed as it is, and its name used again.
        let container = Container::create("turn", &shell("true"), output()).await.unwrap();
        container.remove(false).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn many_execs_run_side_by_side() {
    run(async {
        let container = Container::create("many", &shell("sleep 100"), Stdio::default()).await.unwrap();
        container.start().await.unwrap();
        let execs = (0..40).map(|n| {
            let container = container.another();
            tokio::spawn(async move {
                let id = format!("x{n}");
                let script = format!("echo {n}; exit {n}");
                container.exec(&id, &["sh", "-c", &script], output(), "").await.unwrap();
                let finished = container.finish_exec(&id).await;
                assert_eq!((finished.stdout, finished.status), (format!("{n}\n"), n));
            })
        });
        for exec in execs.collect::<Vec<_>>() {
            exec.await.unwrap();
        }
        container.remove(true).await.unwrap();
    });
}

#[test]
#[ignore = "needs an agent: agent/tests/guest.sh"]
fn nothing_is_left_of_containers_that_were_removed() {
    run(async {
        let container = Container::create("left", &shell("sleep 100 & sleep 100"), output()).await.unwrap();
        container.start().await.unwrap();
        container.remove(true).await.unwrap();
        assert!(!std::path::Path::new("/sys/fs/cgroup/bulkhead/left").exists());
        // The tests run in the guest's process id namespace, so they see the agent's mounts.
        let mounts = std::fs::read_to_string(format!("/proc/{}/mounts", support::agent_pid())).unwrap();
        assert!(!mounts.contains("/run/bulkhead/containers/left"), "{mounts}");
    });
}
