//! Messages in containerd's envelopes: their type is a bare name (`containerd.events.TaskExit`), never a URL, because containerd
//! compares it as a whole.

use protobuf::MessageFull;
use protobuf::well_known_types::any::Any;

/// Puts a message into an envelope.
pub(crate) fn pack(message: &impl MessageFull) -> Any {
    // A message in memory has all that it needs: proto3 has no required fields.
    let value = message.write_to_bytes().unwrap_or_default();
    Any { type_url: name(message), value, ..Default::default() }
}

fn name<M: MessageFull>(_: &M) -> String {
    M::descriptor().full_name().to_owned()
}

/// The bare name of the type of what is in an envelope, whatever comes before it.
pub(crate) fn kind(any: &Any) -> &str {
    match any.type_url.strip_prefix("type.googleapis.com/") {
        Some(name) => name,
        None => &any.type_url,
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::events::task::TaskExit;
    use containerd_shim_protos::shim::oci::ProcessDetails;

    use super::*;

    #[test]
    fn types_are_bare_names() {
        let exit = pack(&TaskExit { container_id: "a".into(), ..Default::default() });
        assert_eq!(exit.type_url, "containerd.events.TaskExit");
        assert_eq!(pack(&ProcessDetails::new()).type_url, "containerd.runc.v1.ProcessDetails");
        let metrics = pack(&containerd_shim_protos::cgroups_v2::metrics::Metrics::new());
        assert_eq!(metrics.type_url, "io.containerd.cgroups.v2.Metrics");
        let url = Any { type_url: "type.googleapis.com/x.Y".into(), ..Default::default() };
        assert_eq!(kind(&url), "x.Y");
    }
}
