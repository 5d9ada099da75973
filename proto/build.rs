//! Compiles the protobuf definitions without protoc, and keeps their descriptors for gRPC reflection.

use prost::Message;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files =
        ["sweep", "trial", "adapter", "fleet", "agent", "data"].map(|f| format!("lorafleet/v1/{f}.proto"));
    let descriptors = protox::compile(&files, ["."])?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".lorafleet.v1.UploadCheckpointRequest.data")
        .bytes(".lorafleet.v1.DownloadCheckpointResponse.data")
        .bytes(".lorafleet.v1.UploadFileRequest.data")
        .bytes(".lorafleet.v1.DownloadFileResponse.data")
        .compile_fds(descriptors)?;
    println!("cargo::rerun-if-changed=lorafleet");
    Ok(())
}
