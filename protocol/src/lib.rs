//! The interface of the guest agent: its calls ([`agent`], [`agent_ttrpc`]), the header of its streams ([`stream`]), its
//! status bytes ([`status`]) and what bounds it all ([`limits`]). `docs/protocol.md` explains how they are used.

pub mod limits;
pub mod status;
pub mod stream;

/// The messages of `proto/agent.proto`.
#[allow(missing_docs, unreachable_pub, unused, non_upper_case_globals)]
#[allow(clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod agent {
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

/// The ttrpc client and server of `proto/agent.proto`.
#[allow(missing_docs, unreachable_pub, unused, non_upper_case_globals)]
#[allow(clippy::all, clippy::pedantic, clippy::unwrap_used)]
pub mod agent_ttrpc {
    use super::agent;

    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}
