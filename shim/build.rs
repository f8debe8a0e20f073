//! Generates the messages of `proto/runtimeoptions.proto`.

use std::path::Path;
use std::{env, fs};

use ttrpc_codegen::{Codegen, ProtobufCustomize};

fn main() {
    println!("cargo::rerun-if-changed=proto/runtimeoptions.proto");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/runtimeoptions.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()
        .expect("proto/runtimeoptions.proto compiles");
    // A file that `include!` takes in may not have attributes of its whole self; options.rs puts those on the module instead.
    let file = Path::new(&out).join("runtimeoptions.rs");
    let text = fs::read_to_string(&file).expect("the generator wrote it");
    let lines = text.lines().filter(|line| !line.starts_with("#![") && !line.starts_with("//!"));
    fs::write(file, lines.collect::<Vec<_>>().join("\n")).expect("OUT_DIR is writable");
}
