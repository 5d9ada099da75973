//! A safetensors file is an 8-byte header length, the header, and as many bytes as its last tensor ends at.

use super::{PIECE, Stored};
use crate::error::{Result, TrainError};
use crate::new_model::Entry;
use candle_core::{DType, Tensor};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, View};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

/// Bytes of a header at most, as the format's own reader has it.
const HEADER: u64 = 100_000_000;

/// The first bytes of a file of these tensors, marked as torch's layout as PEFT marks its own, and each tensor's place
/// behind them. Brings the tensors into the order in which the format's own writer has them: the widest elements first, so
/// that each is aligned, and those by name.
///
/// # Errors
/// Two have one name.
pub(crate) fn header(entries: &mut [&Entry]) -> Result<(Vec<u8>, Vec<TensorInfo>)> {
    entries.sort_by(|a, b| {
        let size = |entry: &Entry| entry.dtype.size_in_bytes();
        size(b).cmp(&size(a)).then_with(|| a.name.cmp(&b.name))
    });
    let (mut at, mut infos) = (0, Vec::with_capacity(entries.len()));
    for entry in entries.iter() {
        let end = at + entry.bytes() as usize;
        let (dtype, shape) = (Dtype::from(entry.dtype), entry.shape.clone());
        infos.push(TensorInfo { dtype, shape, data_offsets: (at, end) });
        at = end;
    }
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let named = entries.iter().map(|entry| entry.name.clone()).zip(infos.clone()).collect();
    let header = Metadata::new(Some(metadata), named).map_err(candle_core::Error::from)?;
    let mut header = serde_json::to_vec(&header).map_err(candle_core::Error::wrap)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let length = (header.len() as u64).to_le_bytes();
    Ok(([&length[..], &header].concat(), infos))
}

/// Writes a tensor's elements, row by row, so that a large one is not held a second time.
///
/// # Errors
/// The system refuses.
pub(crate) fn write_elements(tensor: &Tensor, out: &mut impl Write) -> io::Result<()> {
    let rows = tensor.dims().first().copied().unwrap_or(1);
    let row_bytes = tensor.elem_count() * tensor.dtype().size_in_bytes() / rows.max(1);
    let step = (PIECE / row_bytes.max(1)).clamp(1, rows.max(1));
    for row in (0..rows).step_by(step) {
        let piece = match tensor.rank() {
            0 => tensor.clone(),
            _ => tensor.narrow(0, row, step.min(rows - row)).map_err(io::Error::other)?,
        };
        out.write_all(&piece.data())?;
    }
    Ok(())
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// A file is the one that the format's own writer makes, byte by byte.
    #[test]
    fn files_are_those_of_the_formats_own_writer() {
        let tensor = |shape: &[usize], dtype| {
            let values = Tensor::arange(0f32, shape.iter().product::<usize>() as f32, &Device::Cpu).unwrap();
            values.reshape(shape).unwrap().to_dtype(dtype).unwrap()
        };
        let transposed = tensor(&[5, 3], DType::F32).t().unwrap();
        let tensors = BTreeMap::from([
            ("b".to_string(), tensor(&[7], DType::F32)),
            ("a.half".to_string(), tensor(&[3], DType::BF16)),
            ("a".to_string(), transposed),
            // More than one piece.
            ("c".to_string(), tensor(&[3, PIECE / 8], DType::F32)),
        ]);
        let entry = |(name, tensor): (&String, &Tensor)| {
            let (dtype, shape) = (tensor.dtype(), tensor.dims().to_vec());
            Entry { name: name.clone(), dtype, shape }
        };
        let entries: Vec<_> = tensors.iter().map(entry).collect();
        let mut sorted: Vec<_> = entries.iter().collect();
        let (mut file, infos) = header(&mut sorted).unwrap();
        let start = file.len();
        for (entry, info) in sorted.iter().zip(infos) {
            assert_eq!(file.len(), start + info.data_offsets.0);
            write_elements(&tensors[&entry.name], &mut file).unwrap();
        }
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        assert!(file == safetensors::serialize(&tensors, Some(metadata)).unwrap());
    }
}
