//! How large the files are that every guest is made from.

use bulkhead_tests::vm::{Plan, Result};

use crate::report::{Bar, Row};

pub(crate) fn measure() -> Result<Vec<Row>> {
    let Plan { kernel, root, .. } = Plan::default();
    let (kernel, root) = (std::fs::metadata(kernel)?.len(), std::fs::metadata(root)?.len());
    Ok(vec![
        Row::mib("guest image: the agent's binary, nothing else", &[root]).bar(Bar::AtMost(8.0)),
        Row::mib("guest kernel", &[kernel]).bar(Bar::AtMost(20.0)),
    ])
}
