//! `bulkhead-fs`: the file server of one guest, steered over a control socket by the process that started it. Not for use by hand.

use std::process::ExitCode;

const USAGE: &str = "usage: bulkhead-fs --requests-fd N --control-fd M [--root DIR] [--nofile N]\n       bulkhead-fs --version";

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("--version") => {
            println!("bulkhead-fs {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
