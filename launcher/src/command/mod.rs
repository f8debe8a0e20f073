//! Every command but `run`.

pub(crate) mod check;
pub(crate) mod config;
pub(crate) mod end;
pub(crate) mod exec;
pub(crate) mod image;
pub(crate) mod logs;
pub(crate) mod ps;
mod table;
pub(crate) mod version;
