//! The calls of `agent.proto`: each checks its bounds here, at the edge, and passes on what it was asked.

use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use bulkhead_protocol::agent::{
    AddEntropyRequest, BindSlotRequest, BindSlotResponse, Empty, GetGuestDetailsRequest, GuestDetails,
    OnlineCpusRequest, OnlineCpusResponse, SetClockRequest, SetClockResponse, SetHostnameRequest,
    UnbindSlotRequest,
};
use bulkhead_protocol::agent_ttrpc::Agent;
use bulkhead_protocol::limits::{HOSTNAME_MAX, SEED_MAX};
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, get_status};

use crate::{chain, guest};

/// The agent as the host sees it.
pub(crate) struct Service {
    ready_after_boot_ns: AtomicU64,
}

impl Service {
    pub(crate) fn new() -> Self {
        Self { ready_after_boot_ns: AtomicU64::new(0) }
    }

    /// Notes when the agent said that it is ready.
    pub(crate) fn ready(&self, after_boot_ns: u64) {
        self.ready_after_boot_ns.store(after_boot_ns, Ordering::Relaxed);
    }
}

fn status(code: Code, text: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, text.into()))
}

fn invalid(text: impl Into<String>) -> ttrpc::Error {
    status(Code::INVALID_ARGUMENT, text)
}

impl From<guest::Error> for ttrpc::Error {
    fn from(error: guest::Error) -> Self {
        let code = match error {
            guest::Error::NoSlot(_) | guest::Error::NoCpu(..) | guest::Error::NoPartition(..) => {
                Code::INVALID_ARGUMENT
            }
            guest::Error::NoDevice(_) | guest::Error::SlotInUse(_) => Code::FAILED_PRECONDITION,
            _ => Code::INTERNAL,
        };
        status(code, chain(&error))
    }
}

type Answer<T> = ttrpc::Result<T>;

#[async_trait]
impl Agent for Service {
    async fn get_guest_details(&self, _: &TtrpcContext, _: GetGuestDetailsRequest) -> Answer<GuestDetails> {
        Ok(guest::details(self.ready_after_boot_ns.load(Ordering::Relaxed))?)
    }

    async fn set_clock(&self, _: &TtrpcContext, request: SetClockRequest) -> Answer<SetClockResponse> {
        let (offset_ns, stepped) = guest::set_clock(request.realtime_ns)?;
        Ok(SetClockResponse { offset_ns, stepped, ..SetClockResponse::default() })
    }

    async fn add_entropy(&self, _: &TtrpcContext, request: AddEntropyRequest) -> Answer<Empty> {
        if request.seed.is_empty() || request.seed.len() > SEED_MAX {
            return Err(invalid(format!("a seed has 1 to {SEED_MAX} bytes, not {}", request.seed.len())));
        }
        guest::add_entropy(&request.seed)?;
        Ok(Empty::default())
    }

    async fn set_hostname(&self, _: &TtrpcContext, request: SetHostnameRequest) -> Answer<Empty> {
        if request.hostname.is_empty() || request.hostname.len() > HOSTNAME_MAX {
            let length = request.hostname.len();
            return Err(invalid(format!("a hostname has 1 to {HOSTNAME_MAX} bytes, not {length}")));
        }
        guest::set_hostname(&request.hostname)?;
        Ok(Empty::default())
    }

    async fn bind_slot(&self, _: &TtrpcContext, request: BindSlotRequest) -> Answer<BindSlotResponse> {
        let block_device = guest::bind_slot(request.slot)?.unwrap_or_default();
        Ok(BindSlotResponse { block_device, ..BindSlotResponse::default() })
    }

    async fn unbind_slot(&self, _: &TtrpcContext, request: UnbindSlotRequest) -> Answer<Empty> {
        guest::unbind_slot(request.slot)?;
        Ok(Empty::default())
    }

    async fn online_cpus(&self, _: &TtrpcContext, request: OnlineCpusRequest) -> Answer<OnlineCpusResponse> {
        if request.count == 0 {
            return Err(invalid("a guest has at least one CPU online"));
        }
        let cpus_online = guest::online_cpus(request.count)?;
        Ok(OnlineCpusResponse { cpus_online, ..OnlineCpusResponse::default() })
    }
}
