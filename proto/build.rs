//! Compiles `kvkeep/v1/*.proto` with protox: no protoc on the machine.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let files: Vec<_> =
        ["types", "blocks", "sessions", "wire", "admin"].iter().map(|f| format!("kvkeep/v1/{f}.proto")).collect();
    println!("cargo:rerun-if-changed=kvkeep");
    let descriptors = protox::compile(&files, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("kvkeep_v1.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure().bytes(".").compile_fds(descriptors)?;
    Ok(())
}
