//! Compiles the CUDA kernels to PTX, for the GPU that `CUDA_COMPUTE_CAP` names or that this machine has, as candle's
//! own are compiled. Without the feature `cuda` there is nothing to do.

#[cfg(feature = "cuda")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    let capability = cudaforge::detect_compute_cap()?.base();
    println!("cargo::rustc-env=LORAFLEET_COMPUTE_CAP={capability}");
    let kernels = cudaforge::KernelBuilder::new().source_dir("kernels").arg("-std=c++17").arg("-O3");
    kernels.build_ptx()?.write(out.join("ptx.rs"))?;
    Ok(())
}

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
}
