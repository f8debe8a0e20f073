//! How a machine came to its end, told from the guest's last words, from the VMM's and from the kind of its death.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use bulkhead_protocol::status;
use bulkhead_vmm::control::message::Exit;

use crate::console::excerpt;

/// What a violated seccomp filter kills with, on x86 and ARM.
const SIGSYS: i32 = 31;

/// How a machine came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// The agent had stopped everything and reset the machine.
    Stopped,
    /// The agent found that it could not go on.
    AgentFailed,
    /// The guest's kernel panicked.
    Panic,
    /// The guest's kernel lost control: a triple fault.
    TripleFault,
    /// KVM could not go on, in the VMM's words, fit for a terminal.
    Kvm(String),
    /// The VMM was killed.
    VmmKilled {
        /// The signal that did it.
        signal: i32,
        /// What it had written to its standard error, fit for a terminal: a panic's message, say.
        message: String,
    },
    /// The VMM ended without saying why.
    VmmEnded {
        /// Its exit code. Unknown of one that is still being torn down, which may also have been killed.
        code: Option<i32>,
        /// The last that it wrote to its standard error, fit for a terminal.
        message: String,
    },
}

/// What is known of a machine that has ended.
#[derive(Debug, Default)]
pub(crate) struct Evidence {
    /// The last status byte.
    pub(crate) last_status: Option<u8>,
    /// The VMM's last event.
    pub(crate) exit: Option<Exit>,
}

impl Evidence {
    /// Draws the conclusion. `vmm` gives the VMM's exit status and what it wrote to its standard error.
    pub(crate) fn conclude(self, vmm: (Option<ExitStatus>, String)) -> End {
        match (self.exit, self.last_status) {
            (Some(Exit::Reset), Some(status::STOPPED)) => End::Stopped,
            (Some(Exit::Reset | Exit::TripleFault), Some(status::FAILED)) => End::AgentFailed,
            (Some(Exit::Reset), _) => End::Panic,
            (Some(Exit::TripleFault), _) => End::TripleFault,
            (Some(Exit::Kvm(text)), _) => End::Kvm(excerpt(&text)),
            (None, _) => {
                let (status, message) = vmm;
                match status.and_then(|status| status.signal()) {
                    Some(signal) => End::VmmKilled { signal, message },
                    None => End::VmmEnded { code: status.and_then(|status| status.code()), message },
                }
            }
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stopped => f.write_str("the virtual machine was shut down from inside"),
            Self::AgentFailed => f.write_str("the agent in the guest failed"),
            Self::Panic => f.write_str("the guest's kernel panicked"),
            Self::TripleFault => f.write_str("the guest's kernel lost control (triple fault)"),
            Self::Kvm(text) => write!(f, "KVM could not run the guest any further: {text}"),
            Self::VmmKilled { signal: SIGSYS, .. } => f.write_str(
                "the VMM was killed because it made a system call that it has no use for (SIGSYS): either Bulkhead has a bug, or \
                 the guest has taken the VMM over; the kernel's log names the call (type=1326)",
            ),
            Self::VmmKilled { signal, message } if message.is_empty() => {
                write!(f, "the VMM was killed by signal {signal}")
            }
            Self::VmmKilled { signal, message } => {
                write!(f, "the VMM was killed by signal {signal}: {message}")
            }
            Self::VmmEnded { code: Some(code), message } if message.is_empty() => {
                write!(f, "the VMM ended with code {code}")
            }
            Self::VmmEnded { code: None, message } if message.is_empty() => {
                f.write_str("the VMM ended without a word; if it was killed, the kernel's log may tell why")
            }
            Self::VmmEnded { message, .. } => write!(f, "the VMM ended: {message}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conclude(exit: Option<Exit>, last_status: Option<u8>) -> End {
        Evidence { last_status, exit }.conclude((Some(ExitStatus::from_raw(9)), String::new()))
    }

    #[test]
    fn shutdown_panic_agent_failure_and_triple_fault_are_told_apart() {
        assert_eq!(conclude(Some(Exit::Reset), Some(status::STOPPED)), End::Stopped);
        assert_eq!(conclude(Some(Exit::Reset), Some(status::FAILED)), End::AgentFailed);
        assert_eq!(conclude(Some(Exit::Reset), Some(status::READY)), End::Panic);
        assert_eq!(conclude(Some(Exit::Reset), None), End::Panic);
        assert_eq!(conclude(Some(Exit::TripleFault), Some(status::READY)), End::TripleFault);
        assert_eq!(conclude(Some(Exit::Kvm("x".into())), None), End::Kvm("x".into()));
    }

    #[test]
    fn a_vmm_that_was_taken_over_cannot_write_to_the_terminal() {
        let text = format!("\x1b[2J{}", "x".repeat(1 << 20));
        let End::Kvm(shown) = conclude(Some(Exit::Kvm(text)), None) else { panic!("another end") };
        assert!(shown.starts_with("\\x1b[2Jxxx") && shown.len() < 5000, "{} bytes", shown.len());
    }

    #[test]
    fn a_vmm_that_says_nothing_is_judged_by_its_death() {
        let killed = conclude(None, Some(status::READY));
        assert_eq!(killed, End::VmmKilled { signal: 9, message: String::new() });
        assert_eq!(killed.to_string(), "the VMM was killed by signal 9");
        let panicked = (Some(ExitStatus::from_raw(11)), "thread 'devices' panicked".to_owned());
        let panicked = Evidence::default().conclude(panicked);
        assert_eq!(panicked.to_string(), "the VMM was killed by signal 11: thread 'devices' panicked");
        let confined = Evidence::default().conclude((Some(ExitStatus::from_raw(31)), String::new()));
        assert!(confined.to_string().contains("SIGSYS"), "{confined}");
        let ended = Evidence::default().conclude((Some(ExitStatus::from_raw(1 << 8)), "no /dev/kvm".into()));
        assert_eq!(ended.to_string(), "the VMM ended: no /dev/kvm");
        let unknown = Evidence::default().conclude((None, String::new())).to_string();
        assert!(unknown.starts_with("the VMM ended without a word"), "{unknown}");
    }
}
