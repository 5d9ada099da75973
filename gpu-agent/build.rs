//! Notes the CUDA that this program is built with, so that it can tell a driver that is too old for it.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let roots = ["CUDA_HOME", "CUDA_PATH", "CUDA_ROOT", "CUDA_TOOLKIT_ROOT_DIR"];
    for name in roots.iter().chain(&["NVCC", "PATH"]) {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let of_root = |name: &&str| Some(PathBuf::from(std::env::var_os(name)?).join("bin/nvcc"));
    let named = std::env::var_os("NVCC").map(PathBuf::from);
    let usual = ["nvcc", "/usr/local/cuda/bin/nvcc"].map(PathBuf::from);
    let mut compilers = named.into_iter().chain(roots.iter().filter_map(of_root)).chain(usual);
    // Without an answer no driver is taken for too old: that the kernels compile is seen to elsewhere.
    if let Some(version) = compilers.find_map(|nvcc| release(&nvcc)) {
        println!("cargo:rustc-env=LORAFLEET_CUDA={version}");
    }
}

/// `12.9` of `Cuda compilation tools, release 12.9, V12.9.86`.
fn release(nvcc: &PathBuf) -> Option<String> {
    let output = Command::new(nvcc).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (_, rest) = text.split_once("release ")?;
    Some(rest.split_once(',')?.0.trim().to_string())
}
