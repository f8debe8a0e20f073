//! Generates the messages and the ttrpc client and server of `proto/agent.proto`.

use std::path::Path;
use std::{env, fs};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    println!("cargo::rerun-if-changed=proto/agent.proto");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/agent.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize { async_all: true, ..Default::default() })
        .run()
        .expect("proto/agent.proto compiles");
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        without_inner_attributes(&Path::new(&out).join(name));
    }
}

/// A file that `include!` takes in may not have attributes of its whole self; lib.rs puts those on the module instead.
fn without_inner_attributes(file: &Path) {
    let text = fs::read_to_string(file).expect("the generator wrote it");
    let lines = text.lines().filter(|line| !line.starts_with("#![") && !line.starts_with("//!"));
    fs::write(file, lines.collect::<Vec<_>>().join("\n")).expect("OUT_DIR is writable");
}
