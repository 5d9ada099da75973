//! A safetensors file is an 8-byte header length, the header, and as many bytes as its last tensor ends at.

use super::Stored;
use crate::error::{Result, TrainError};
use candle_core::DType;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Bytes of a header at most, as the format's own reader has it.
const HEADER: u64 = 100_000_000;

/// What a file's header says of its tensors.
///
/// # Errors
/// The file is cut off or its header broken.
pub(super) fn tensors(file: &Path) -> Result<BTreeMap<String, Stored>> {
    let broken = |problem: String| TrainError::model(file, problem, "download the file again");
    let mut reader = File::open(file).map_err(TrainError::io(file))?;
    let length = reader.metadata().map_err(TrainError::io(file))?.len();
    let mut prefix = [0; 8];
    reader
        .read_exact(&mut prefix)
        .map_err(|_| broken(format!("has {length} bytes, which is no safetensors")))?;
    let header_length = u64::from_le_bytes(prefix);
    if header_length > length.saturating_sub(8) {
        return Err(broken(format!(
            "is cut off: its header ends at byte {}, the file at {length}",
            header_length.saturating_add(8)
        )));
    }
    if header_length > HEADER {
        return Err(broken(format!("has a header of {header_length} bytes, above {HEADER}")));
    }
    let mut header = vec![0; header_length as usize];
    reader.read_exact(&mut header).map_err(TrainError::io(file))?;
    let header: Metadata =
        serde_json::from_slice(&header).map_err(|e| broken(format!("has a broken header ({e})")))?;
    let start = 8 + header_length;
    let need = start + header.data_len() as u64;
    if length < need {
        return Err(broken(format!("is cut off: {length} bytes of {need}")));
    }
    let stored = |(name, info): (String, &safetensors::tensor::TensorInfo)| {
        let start = start + info.data_offsets.0 as u64;
        (name, Stored { dtype: dtype(info.dtype), shape: info.shape.clone(), strides: None, start })
    };
    Ok(header.tensors().into_iter().map(stored).collect())
}

fn dtype(dtype: Dtype) -> std::result::Result<DType, String> {
    Ok(match dtype {
        Dtype::U8 => DType::U8,
        Dtype::U32 => DType::U32,
        Dtype::I16 => DType::I16,
        Dtype::I32 => DType::I32,
        Dtype::I64 => DType::I64,
        Dtype::BF16 => DType::BF16,
        Dtype::F16 => DType::F16,
        Dtype::F32 => DType::F32,
        Dtype::F64 => DType::F64,
        other => return Err(format!("{other:?}")),
    })
}
