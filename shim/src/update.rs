//! Update: limits that change while a container runs. They hold in the guest; the host's group of the machine follows with what is about
//! the host's CPUs and disks.

use std::sync::atomic::Ordering;

use bulkhead_sandbox::handover::translate_limits;
use oci_spec::runtime::{Linux, LinuxResources, Spec};

use crate::errors::TaskError;
use crate::shim::{Shim, explain};

impl Shim {
    /// Changes a container's limits. `resources` is the JSON of `linux.resources` of the OCI runtime specification.
    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Result<(), TaskError> {
        let task = self.task(id)?;
        let state = task.init.state();
        if state.exit().is_some() {
            return Err(TaskError::state("update", &state));
        }
        let invalid = |error: &dyn std::fmt::Display| TaskError::Invalid(format!("the resources: {error}"));
        let resources: LinuxResources = serde_json::from_slice(resources).map_err(|error| invalid(&error))?;
        let machine = task.machine()?;
        let guests =
            for_guest(resources.clone(), machine.pod().size().cpus).map_err(|error| invalid(&error))?;
        if let Err(error) = machine.agent().update(&task.id, guests).await {
            return Err(explain(machine, error.into()).await);
        }
        // Of several containers, none speaks for the machine.
        let is_alone = !self.grouped.load(Ordering::Relaxed);
        if let (true, Some(cgroup)) = (is_alone, machine.pod().cgroup()) {
            cgroup.place(&resources).map_err(|error| invalid(&crate::errors::chain(&error)))?;
        }
        Ok(())
    }
}

/// The same with the numbers of the guest's CPUs and without the host's disks, as at the container's creation.
fn for_guest(resources: LinuxResources, cpus: u8) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let (mut spec, mut linux) = (Spec::default(), Linux::default());
    linux.set_resources(Some(resources));
    spec.set_linux(Some(linux));
    translate_limits(&mut spec, cpus)?;
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    Ok(serde_json::to_vec(&resources)?)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn what_speaks_of_the_host_does_not_reach_the_guest() {
        let resources = json!({"memory": {"limit": 4096}, "cpu": {"shares": 512, "cpus": "4-5", "mems": "1"}, "blockIO": {
            "weight": 100,
            "weightDevice": [{"major": 8, "minor": 0, "weight": 10}],
            "throttleWriteIOPSDevice": [{"major": 8, "minor": 0, "rate": 10}],
        }});
        let guests = for_guest(serde_json::from_value(resources).unwrap(), 2).unwrap();
        let guests: Value = serde_json::from_slice(&guests).unwrap();
        let expected = json!({"memory": {"limit": 4096}, "cpu": {"shares": 512, "cpus": "0-1"}, "blockIO": {"weight": 100}});
        assert_eq!(guests, expected);
        let damaged = json!({"cpu": {"cpus": "5-4"}});
        assert!(for_guest(serde_json::from_value(damaged).unwrap(), 2).is_err());
    }
}
