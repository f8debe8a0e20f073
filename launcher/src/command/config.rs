//! `config`: what the configuration files amount to.

use std::path::PathBuf;

use bulkhead_sandbox::config::{CONFIG_FILE, CONFIG_VARIABLE, Config};

use super::table::table;
use crate::cli::ConfigCommand;
use crate::failure::Failure;
use crate::message;

/// Shows every value with where it came from.
pub(crate) fn config(command: &ConfigCommand) -> Result<u8, Failure> {
    match command {
        ConfigCommand::Explain => {
            let file = std::env::var_os(CONFIG_VARIABLE).map_or_else(|| CONFIG_FILE.into(), PathBuf::from);
            let mut rows = vec![["KEY", "VALUE", "FROM"].map(String::from).to_vec()];
            for setting in Config::explain(&file)? {
                rows.push(vec![setting.key.into(), setting.value, setting.origin.to_string()]);
            }
            message::result(&table(&rows));
            Ok(0)
        }
    }
}
