//! `ps`: lists containers.

use bulkhead_sandbox::paths::Paths;
use serde::Serialize;

use super::table::{ago, shortened, table};
use crate::cli::PsArgs;
use crate::container::record::{Outcome, now_ns};
use crate::container::registry::{Container, Registry, State};
use crate::failure::Failure;
use crate::message;

/// One container for programs.
#[derive(Serialize)]
struct Row<'a> {
    id: &'a str,
    name: &'a str,
    image: &'a str,
    command: &'a [String],
    created_at_ns: u64,
    status: &'static str,
    vmm_pid: Option<u32>,
    outcome: Option<&'a Outcome>,
}

impl<'a> From<&'a Container> for Row<'a> {
    fn from(container: &'a Container) -> Self {
        let record = &container.record;
        let (status, vmm_pid, outcome) = match &container.state {
            State::Live(running) if running.vmm_pid.is_none() => ("creating", None, None),
            State::Live(running) => ("running", running.vmm_pid, None),
            State::Exited(outcome) => ("exited", None, Some(outcome)),
        };
        Self {
            id: &record.id,
            name: &record.name,
            image: &record.image,
            command: &record.command,
            created_at_ns: record.created_at_ns,
            status,
            vmm_pid,
            outcome,
        }
    }
}

/// Shows the containers that run, or all.
pub(crate) fn ps(args: &PsArgs) -> Result<u8, Failure> {
    let mut containers = Registry::open(&Paths::from_environment())?.list()?;
    containers.retain(|container| args.all || matches!(container.state, State::Live(_)));
    let rows: Vec<Row<'_>> = containers.iter().map(Row::from).collect();
    if args.json {
        message::result(&format!("{}\n", serde_json::to_string_pretty(&rows)?));
    } else {
        message::result(&text(&rows, now_ns()));
    }
    Ok(0)
}

fn text(rows: &[Row<'_>], now_ns: u64) -> String {
    let head = ["ID", "NAME", "IMAGE", "COMMAND", "CREATED", "STATUS"].map(str::to_owned);
    let mut lines = vec![head.to_vec()];
    for row in rows {
        let status = match row.outcome {
            Some(Outcome { exit_code, finished_at_ns, error }) => {
                let error =
                    error.as_ref().map(|error| format!(": {}", shortened(error, 60))).unwrap_or_default();
                format!("exited ({exit_code}) {}{error}", ago(*finished_at_ns, now_ns))
            }
            None => row.status.to_owned(),
        };
        lines.push(vec![
            row.id.to_owned(),
            row.name.to_owned(),
            shortened(row.image, 40),
            shortened(&row.command.join(" ").escape_debug().to_string(), 40),
            ago(row.created_at_ns, now_ns),
            status,
        ]);
    }
    table(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::record::new_record;
    use crate::container::record::{Record, Running};

    #[test]
    fn a_line_says_what_a_container_is_and_does() {
        let record = Record {
            id: "0123".into(),
            image: "debian:13".into(),
            command: vec!["sh".into(), "-c".into(), "echo\n\x1b[31m".into()],
            created_at_ns: 0,
            ..new_record(Some("web")).unwrap()
        };
        let live = |vmm_pid| State::Live(Running { supervisor_pid: 1, vmm_pid });
        let exited = State::Exited(Outcome { exit_code: 3, finished_at_ns: 0, error: Some("why".into()) });
        let containers =
            [live(None), live(Some(2)), exited].map(|state| Container { record: record.clone(), state });
        let rows: Vec<Row<'_>> = containers.iter().map(Row::from).collect();
        let text = text(&rows, 1_000_000_000);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].ends_with("creating") && lines[2].ends_with("running"), "{text}");
        assert!(lines[3].ends_with("exited (3) 1 second ago: why"), "{text}");
        assert!(
            !text.contains('\x1b') && lines[1].contains("web") && lines[1].contains("debian:13"),
            "{text}"
        );
        let json = serde_json::to_value(&rows).unwrap();
        assert_eq!((&json[1]["vmm_pid"], &json[2]["outcome"]["exit_code"]), (&2.into(), &3.into()));
    }
}
