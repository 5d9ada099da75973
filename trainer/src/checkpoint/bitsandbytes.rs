//! Matrices that bitsandbytes quantised to NF4, under the names that transformers' `save_pretrained` gives their parts.
//!
//! | tensor | elements | holds |
//! |---|---|---|
//! | `X` | u8, ⌈n / 2⌉ | codes, two a byte, the first in the high half |
//! | `X.absmax` | f32, ⌈n / 64⌉ | the blocks' magnitudes; with double quantisation u8, their codes |
//! | `X.quant_map` | f32, 16 | the values of the codes |
//! | `X.nested_absmax` | f32, ⌈blocks / 256⌉ | with double quantisation, the magnitudes of the magnitudes' blocks |
//! | `X.nested_quant_map` | f32, 256 | with double quantisation, the values of their codes |
//! | `X.quant_state.bitsandbytes__nf4` | u8 | a JSON object: type, block sizes, shape, offset of the magnitudes |
//!
//! They are taken as they are: nothing is quantised again.

use super::Checkpoint;
use crate::error::{Result, TrainError};
use crate::new_model::Entry;
use crate::quant::{BLOCK, CODE, NESTED_BLOCK, Nf4, dynamic};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The parts' names behind that of their matrix.
const ABSMAX: &str = ".absmax";
const QUANT_MAP: &str = ".quant_map";
const NESTED_ABSMAX: &str = ".nested_absmax";
const NESTED_QUANT_MAP: &str = ".nested_quant_map";
const STATE: &str = ".quant_state.bitsandbytes__nf4";

/// Bytes of a state's JSON at most; it has some 150.
const STATE_BYTES: usize = 1 << 16;

/// Bytes that we write one in.
const WRITTEN_STATE_BYTES: usize = 256;

/// How far a table may be off from ours, relative to a value: other versions of torch round its values otherwise.
const TABLE_ROUNDING: f32 = 1e-6;

const REMEDY: &str =
    "write it anew with transformers and bitsandbytes (nf4), or use the model that it was made of";

/// `X.quant_state.bitsandbytes__nf4`, in bitsandbytes' names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct State {
    quant_type: String,
    blocksize: u64,
    /// The type that it is dequantised to.
    dtype: String,
    shape: Vec<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_blocksize: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_dtype: Option<String>,
    /// The magnitudes' mean.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    nested_offset: Option<f64>,
}

/// A quantised matrix of a checkpoint whose parts are there and fit together; none of its numbers is read yet.
#[derive(Debug)]
pub struct Quantized<'a> {
    checkpoint: &'a Checkpoint,
    name: &'a str,
    shape: [usize; 2],
    dtype: DType,
    /// With double quantisation, the magnitudes' mean.
    offset: Option<f32>,
}

impl Checkpoint {
    /// A matrix of that name and shape as bitsandbytes quantised it; `None` if it was not quantised.
    ///
    /// # Errors
    /// It is in other numbers than NF4 in blocks of 64; a part is missing, cannot be read, or does not fit the shape.
    pub fn quantized<'a>(&'a self, name: &'a str, shape: &[usize]) -> Result<Option<Quantized<'a>>> {
        let (file, _) = self.get(name)?;
        let wrong = |problem: String| TrainError::model(file, problem, REMEDY);
        let scales = format!("{}.SCB", name.trim_end_matches(".weight"));
        if self.tensors.contains_key(&scales) {
            return Err(wrong(format!("{name} is in LLM.int8() (it has {scales}), which cannot be read")));
        }
        if !self.is_quantized(name) {
            return Ok(None);
        }
        let kind = format!("{name}.quant_state.bitsandbytes__");
        let mut kinds = self.names().filter_map(|part| part.strip_prefix(&kind));
        if let Some(kind) = kinds.find(|kind| *kind != "nf4") {
            return Err(wrong(format!("{name} is in {kind}, which cannot be read; nf4 can be")));
        }
        let state = self.state(name)?;
        let [rows, columns] = *state.shape.as_slice() else {
            return Err(wrong(format!("{name}{STATE} says shape {:?}, which is no matrix's", state.shape)));
        };
        if state.shape != shape {
            let problem = format!("{name} has shape {:?}, but config.json says {shape:?}", state.shape);
            return Err(TrainError::model(
                file,
                problem,
                "config.json and the weights belong to different models",
            ));
        }
        let nested = self.tensors.contains_key(&format!("{name}{NESTED_ABSMAX}"));
        if nested && state.nested_offset.is_none() {
            return Err(wrong(format!("{name} has nested magnitudes, but {name}{STATE} no nested_offset")));
        }
        for (key, found, want) in [
            ("quant_type", state.quant_type.clone(), "nf4".to_string()),
            ("blocksize", state.blocksize.to_string(), BLOCK.to_string()),
            (
                "nested_blocksize",
                state.nested_blocksize.unwrap_or(NESTED_BLOCK as u64).to_string(),
                NESTED_BLOCK.to_string(),
            ),
            (
                "nested_dtype",
                state.nested_dtype.clone().unwrap_or_else(|| "float32".into()),
                "float32".to_string(),
            ),
        ] {
            if found != want {
                return Err(wrong(format!("{name} has {key} {found}; {want} can be read")));
            }
        }
        let dtype = match state.dtype.as_str() {
            "float32" => DType::F32,
            "bfloat16" => DType::BF16,
            "float16" => DType::F16,
            other => return Err(wrong(format!("{name} has dtype {other}, which cannot be read"))),
        };
        let offset = state.nested_offset.map(|offset| offset as f32);
        if offset.is_some_and(|offset| !offset.is_finite()) {
            return Err(wrong(format!("{name} has a nested_offset beyond float32")));
        }
        let elements = rows.checked_mul(columns).ok_or_else(|| wrong(format!("{name} is too large")))?;
        let blocks = elements.div_ceil(BLOCK);
        let quantized = Quantized { checkpoint: self, name, shape: [rows, columns], dtype, offset };
        quantized.part("", DType::U8, elements.div_ceil(2))?;
        quantized.table(QUANT_MAP, &CODE)?;
        if offset.is_some() {
            quantized.part(ABSMAX, DType::U8, blocks)?;
            quantized.part(NESTED_ABSMAX, DType::F32, blocks.div_ceil(NESTED_BLOCK))?;
            quantized.table(NESTED_QUANT_MAP, &*dynamic::TABLE)?;
        } else {
            quantized.part(ABSMAX, DType::F32, blocks)?;
        }
        Ok(Some(quantized))
    }

    /// Whether a tensor has parts beside it, or is of bytes, as no weight is.
    pub fn is_quantized(&self, name: &str) -> bool {
        let parts = format!("{name}.");
        let is_part = |(part, _): (&String, _)| part.starts_with(&parts);
        self.tensors.range(parts.clone()..).next().is_some_and(is_part)
            || self.tensors.get(name).is_some_and(|(_, stored)| stored.dtype == Ok(DType::U8))
    }

    /// Whether a tensor is a part of a quantised one beside its codes.
    pub fn is_part(&self, name: &str) -> bool {
        let parts = [ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP, STATE];
        let whole = parts.into_iter().find_map(|part| name.strip_suffix(part));
        whole.is_some_and(|whole| self.tensors.contains_key(whole))
    }

    fn state(&self, name: &str) -> Result<State> {
        let part = format!("{name}{STATE}");
        let (file, stored) = self.part(name, &part)?;
        let broken = |problem: String| TrainError::model(file, format!("{part} {problem}"), REMEDY);
        if stored.dtype != Ok(DType::U8) || stored.elements() > STATE_BYTES {
            return Err(broken(format!("is no text of at most {STATE_BYTES} bytes")));
        }
        let text = self.read(&part, &Device::Cpu)?.flatten_all()?.to_vec1::<u8>()?;
        serde_json::from_slice(&text).map_err(|e| broken(format!("is no state of a matrix ({e})")))
    }

    /// A part of a quantised matrix.
    fn part(&self, name: &str, part: &str) -> Result<(&Path, &super::Stored)> {
        if self.tensors.contains_key(part) {
            return self.get(part);
        }
        let (file, _) = self.get(name)?;
        Err(TrainError::model(file, format!("{name} is quantised, but {part} is missing"), REMEDY))
    }
}

impl Quantized<'_> {
    /// Whether its magnitudes are quantised too.
    pub fn double_quant(&self) -> bool {
        self.offset.is_some()
    }

    /// The type that transformers dequantises it to.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of its parts in the files.
    pub fn bytes(&self) -> u64 {
        let parts = ["", ABSMAX, QUANT_MAP, NESTED_ABSMAX, NESTED_QUANT_MAP, STATE];
        let bytes = |part| self.checkpoint.bytes(&format!("{}{part}", self.name)).unwrap_or_default();
        parts.into_iter().map(bytes).sum()
    }

    /// Its codes and magnitudes.
    ///
    /// # Errors
    /// Those of [`Checkpoint::read`].
    pub fn read(&self, device: &Device) -> Result<Nf4> {
        let codes = self.bytes_of("")?;
        let matrix = match self.offset {
            Some(offset) => {
                let nested = (self.bytes_of(ABSMAX)?, self.floats(NESTED_ABSMAX)?, offset);
                Nf4::from_parts(self.shape, codes, Some(nested), Vec::new())?
            }
            None => Nf4::from_parts(self.shape, codes, None, self.floats(ABSMAX)?)?,
        };
        matrix.to_device(device)
    }

    fn bytes_of(&self, part: &str) -> Result<Vec<u8>> {
        let tensor = self.checkpoint.read(&format!("{}{part}", self.name), &Device::Cpu)?;
        Ok(tensor.flatten_all()?.to_vec1()?)
    }

    fn floats(&self, part: &str) -> Result<Vec<f32>> {
        let tensor = self.checkpoint.read(&format!("{}{part}", self.name), &Device::Cpu)?;
        Ok(tensor.flatten_all()?.to_vec1()?)
    }

    /// Checks a part's type and number of elements.
    fn part(&self, part: &str, dtype: DType, elements: usize) -> Result<()> {
        let part = format!("{}{part}", self.name);
        let (file, stored) = self.checkpoint.part(self.name, &part)?;
        let found = stored.dtype.as_ref().map_or_else(Clone::clone, |dtype| format!("{dtype:?}"));
        if stored.dtype == Ok(dtype) && stored.elements() == elements {
            return Ok(());
        }
        let [rows, columns] = self.shape;
        let problem = format!(
            "{part} has {} elements of type {found}, but a matrix of {rows} x {columns} needs {elements} of type {dtype:?}",
            stored.elements(),
        );
        Err(TrainError::model(file, problem, REMEDY))
    }

    /// Checks that codes mean what ours mean.
    fn table(&self, part: &str, want: &[f32]) -> Result<()> {
        self.part(part, DType::F32, want.len())?;
        let near = |(found, want): (&f32, &f32)| (found - want).abs() <= TABLE_ROUNDING * want.abs();
        if self.floats(part)?.iter().zip(want).all(near) {
            return Ok(());
        }
        let (name, (file, _)) = (self.name, self.checkpoint.get(self.name)?);
        Err(TrainError::model(file, format!("{name}{part} has other values than bitsandbytes'"), REMEDY))
    }
}

/// The tensors that a matrix in NF4 is written as.
pub(crate) fn entries(name: &str, shape: [usize; 2], double_quant: bool) -> Vec<Entry> {
    let elements = shape[0] * shape[1];
    let blocks = elements.div_ceil(BLOCK);
    let mut parts = vec![
        ("", DType::U8, vec![elements.div_ceil(2), 1]),
        (ABSMAX, if double_quant { DType::U8 } else { DType::F32 }, vec![blocks]),
        (QUANT_MAP, DType::F32, vec![CODE.len()]),
        (STATE, DType::U8, vec![WRITTEN_STATE_BYTES]),
    ];
    if double_quant {
        parts.push((NESTED_ABSMAX, DType::F32, vec![blocks.div_ceil(NESTED_BLOCK)]));
        parts.push((NESTED_QUANT_MAP, DType::F32, vec![dynamic::TABLE.len()]));
    }
    let entry = |(part, dtype, shape)| Entry { name: format!("{name}{part}"), dtype, shape };
    parts.into_iter().map(entry).collect()
}

/// What stands in them; `dtype` is that of the numbers that the matrix was made of.
///
/// # Errors
/// The numbers cannot be read from the device.
pub(crate) fn parts(name: &str, matrix: &Nf4, dtype: DType) -> Result<Vec<(String, Tensor)>> {
    let [rows, columns] = matrix.dims();
    let (codes, nested) = matrix.parts()?;
    let mut state = State {
        quant_type: "nf4".into(),
        blocksize: BLOCK as u64,
        dtype: match dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        }
        .into(),
        shape: vec![rows, columns],
        nested_blocksize: None,
        nested_dtype: None,
        nested_offset: None,
    };
    let floats = |values: &[f32]| Tensor::new(values, &Device::Cpu);
    let codes = Tensor::new(codes, &Device::Cpu)?.unsqueeze(1)?;
    let mut parts = vec![("", codes), (QUANT_MAP, floats(&CODE)?)];
    match nested {
        None => parts.push((ABSMAX, floats(&matrix.magnitudes()?)?)),
        Some((scales, absmax, offset)) => {
            state.nested_blocksize = Some(NESTED_BLOCK as u64);
            state.nested_dtype = Some("float32".into());
            state.nested_offset = Some(f64::from(offset));
            parts.push((ABSMAX, Tensor::new(scales, &Device::Cpu)?));
            parts.push((NESTED_ABSMAX, floats(&absmax)?));
            parts.push((NESTED_QUANT_MAP, floats(&*dynamic::TABLE)?));
        }
    }
    let mut text = serde_json::to_vec(&state).map_err(candle_core::Error::wrap)?;
    // Spaces behind a JSON text mean nothing; with them its length is known before the offset is.
    text.resize(WRITTEN_STATE_BYTES.max(text.len()), b' ');
    parts.push((STATE, Tensor::new(text, &Device::Cpu)?));
    Ok(parts.into_iter().map(|(part, tensor)| (format!("{name}{part}"), tensor)).collect())
}
