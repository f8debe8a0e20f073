//! `ctr events`: what containerd tells everybody.

use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use serde_json::Value;

use super::command::{IMAGE, ctr, image};
use crate::files::tool;
use crate::vm::{Result, ensure};

/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_mins(2);
/// How often it is tried whether the subscription is there.
const AGAIN: Duration = Duration::from_millis(500);

/// A subscription.
pub struct Events {
    listener: Child,
    lines: Receiver<String>,
}

impl Events {
    /// Subscribes, and returns when events arrive.
    pub fn listen() -> Result<Self> {
        image()?;
        let mut listener = ctr(["events"]).stdout(Stdio::piped()).spawn()?;
        let output = BufReader::new(listener.stdout.take().ok_or("no standard output")?);
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(std::result::Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let events = Self { listener, lines };
        // containerd does not say when a subscription has begun; that of a label's change arrives tells.
        for attempt in 0..PATIENCE.as_millis() / AGAIN.as_millis() {
            tool(&mut ctr(["image", "label", IMAGE, &format!("heard={attempt}")]))?;
            match events.lines.recv_timeout(AGAIN) {
                Ok(_) => return Ok(events),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        Err("no event arrives".into())
    }

    /// The events of tasks up to the first one of `topic`, each with its content.
    pub fn until(&self, topic: &str) -> Result<Vec<(String, Value)>> {
        let mut seen = Vec::new();
        loop {
            let line =
                self.lines.recv_timeout(PATIENCE).map_err(|_| format!("no event {topic}, but {seen:?}"))?;
            let Some((name, content)) = parse(&line) else { continue };
            let last = name == topic;
            seen.push((name, content));
            if last {
                return Ok(seen);
            }
        }
    }

    /// Checks the topics of what [`Events::until`] gave.
    pub fn expect_topics(events: &[(String, Value)], expected: &[&str]) -> Result {
        let topics: Vec<&str> = events.iter().map(|(topic, _)| topic.trim_start_matches("/tasks/")).collect();
        ensure(topics == expected, || format!("{topics:?}, not {expected:?}: {events:?}"))
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.listener.kill();
        let _ = self.listener.wait();
    }
}

/// Topic and content of a line, if it is of a task.
fn parse(line: &str) -> Option<(String, Value)> {
    let (before, rest) = line.split_once(" /tasks/")?;
    // A path in the content of another event is no topic.
    if before.contains('{') {
        return None;
    }
    let (topic, content) = rest.split_once(' ')?;
    Some((format!("/tasks/{topic}"), serde_json::from_str(content).ok()?))
}
