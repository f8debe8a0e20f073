//! A machine boots, says ready, and ends in ways that are told apart.

use libtest_mimic::Trial;

use crate::trial;
use crate::vm::{Plan, Result, Vm};

pub(crate) fn tests() -> Vec<Trial> {
    vec![trial("boot: the agent says ready", ready)]
}

fn ready() -> Result {
    let vm = Vm::ready(&Plan::default())?;
    println!("{}", vm.console()?);
    Ok(())
}
