//! NF4, the 4-bit numbers of QLoRA (Dettmers et al. 2023), bit for bit as bitsandbytes has them.
//!
//! A matrix is read row by row in blocks of [`BLOCK`] elements. A block keeps its largest magnitude, `absmax`, and
//! for each element the nearest of [`CODE`]'s 16 values to `x · (1/absmax)`; a midpoint goes to the lower one. Two
//! codes make a byte, the first in the high half. With double quantisation the magnitudes, less their mean, are
//! themselves kept in 8 bits ([`dynamic`]), in blocks of [`NESTED_BLOCK`]: 4 + 8/64 + 32/(64 · 256) = 4.127 bits a
//! parameter; without it 4.5.

pub mod dynamic;

use crate::error::Result;
use crate::memory;
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use rayon::prelude::*;

/// Elements that share a magnitude.
pub const BLOCK: usize = 64;
/// Magnitudes that share one of their own, with double quantisation.
pub const NESTED_BLOCK: usize = 256;

/// The values of the 16 codes: quantiles of N(0, 1), scaled to ±1, with an exact zero.
pub const CODE: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Midpoints between neighbouring values: what lies above the i-th has a code above i.
pub(crate) const THRESHOLDS: [f32; 15] = {
    let mut thresholds = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        thresholds[i] = ((CODE[i] as f64 + CODE[i + 1] as f64) / 2.0) as f32;
        i += 1;
    }
    thresholds
};

/// The code of a number in ±1.
fn code(x: f32) -> u8 {
    THRESHOLDS.iter().map(|threshold| u8::from(x > *threshold)).sum()
}

/// A matrix in NF4.
#[derive(Debug, Clone)]
pub struct Nf4 {
    pub(crate) shape: [usize; 2],
    /// `[⌈elements / 2⌉]`, u8.
    pub(crate) codes: Tensor,
    pub(crate) absmax: Absmax,
    /// What a GPU's kernels look values up in; none on the CPU.
    #[cfg_attr(
        not(any(feature = "cuda", test)),
        expect(dead_code, reason = "read by the GPU's kernels alone")
    )]
    pub(crate) tables: Option<Tensor>,
}

/// Magnitudes with double quantisation: 8-bit codes, the magnitudes of their blocks, and the offset.
pub type Nested = (Vec<u8>, Vec<f32>, f32);

/// The blocks' largest magnitudes.
#[derive(Debug, Clone)]
pub(crate) enum Absmax {
    /// `[blocks]`, f32.
    Plain(Tensor),
    /// `table[codes[i]] · absmax[i / 256] + offset`.
    Nested {
        /// `[blocks]`, u8.
        codes: Tensor,
        /// `[⌈blocks / 256⌉]`, f32.
        absmax: Tensor,
        /// The magnitudes' mean, `[1]`, f32.
        offset: Tensor,
    },
}

impl Nf4 {
    /// Quantises a float32 matrix where it lies.
    ///
    /// # Errors
    /// The tensor has another type or number of dimensions; the device runs out of memory.
    pub fn quantize(matrix: &Tensor, double_quant: bool) -> Result<Self> {
        let shape = <[usize; 2]>::from(matrix.dims2()?);
        #[cfg(any(feature = "cuda", test))]
        if crate::ops::on_gpu(matrix.device()) {
            return crate::ops::nf4::quantize(matrix, double_quant);
        }
        let values = matrix.flatten_all()?.to_vec1::<f32>()?;
        let mut codes = vec![0u8; values.len().div_ceil(2)];
        let mut absmax = vec![0f32; values.len().div_ceil(BLOCK)];
        let blocks = values.par_chunks(BLOCK).zip(codes.par_chunks_mut(BLOCK / 2)).zip(&mut absmax);
        blocks.for_each(|((values, codes), absmax)| {
            *absmax = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            // A block of zeros has no magnitude to divide by; each of its codes means 0 all the same.
            let scale = if *absmax > 0.0 { 1.0 / *absmax } else { 0.0 };
            for (byte, pair) in codes.iter_mut().zip(values.chunks(2)) {
                let low = pair.get(1).map_or(0, |x| code(x * scale));
                *byte = code(pair[0] * scale) << 4 | low;
            }
        });
        let absmax = match double_quant {
            true => Absmax::nested(absmax)?,
            false => Absmax::Plain(vector(absmax)?),
        };
        Ok(Self { shape, codes: vector(codes)?, absmax, tables: None })
    }

    /// A matrix of that shape that holds no numbers, to count its bytes.
    pub(crate) fn outline(shape: [usize; 2], double_quant: bool) -> Result<Self> {
        let view = |count: usize, dtype| -> Result<Tensor> {
            Ok(Tensor::zeros((), dtype, &Device::Cpu)?.broadcast_as(count)?)
        };
        let elements = shape[0] * shape[1];
        let blocks = elements.div_ceil(BLOCK);
        let absmax = if double_quant {
            let absmax = view(blocks.div_ceil(NESTED_BLOCK), DType::F32)?;
            Absmax::Nested { codes: view(blocks, DType::U8)?, absmax, offset: view(1, DType::F32)? }
        } else {
            Absmax::Plain(view(blocks, DType::F32)?)
        };
        Ok(Self { shape, codes: view(elements.div_ceil(2), DType::U8)?, absmax, tables: None })
    }

    /// A matrix from numbers that were quantised elsewhere: codes, and either the nested magnitudes (codes, their
    /// magnitudes, offset) or the plain ones.
    ///
    /// # Errors
    /// There are not as many as the shape asks for.
    pub fn from_parts(
        shape: [usize; 2],
        codes: Vec<u8>,
        nested: Option<Nested>,
        plain: Vec<f32>,
    ) -> Result<Self> {
        let outline = Self::outline(shape, nested.is_some())?;
        let absmax = match nested {
            Some((codes, absmax, offset)) => Absmax::Nested {
                codes: vector(codes)?,
                absmax: vector(absmax)?,
                offset: vector(vec![offset])?,
            },
            None => Absmax::Plain(vector(plain)?),
        };
        let matrix = Self { shape, codes: vector(codes)?, absmax, tables: None };
        let counts = |matrix: &Self| match &matrix.absmax {
            Absmax::Plain(absmax) => [matrix.codes.elem_count(), absmax.elem_count(), 0],
            Absmax::Nested { codes, absmax, .. } => {
                [matrix.codes.elem_count(), codes.elem_count(), absmax.elem_count()]
            }
        };
        if counts(&matrix) != counts(&outline) {
            let problem =
                format!("{shape:?} in NF4 has {:?} numbers, not {:?}", counts(&outline), counts(&matrix));
            return Err(candle_core::Error::Msg(problem).into());
        }
        Ok(matrix)
    }

    /// The same matrix on another device.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let absmax = match &self.absmax {
            Absmax::Plain(absmax) => Absmax::Plain(absmax.to_device(device)?),
            Absmax::Nested { codes, absmax, offset } => Absmax::Nested {
                codes: codes.to_device(device)?,
                absmax: absmax.to_device(device)?,
                offset: offset.to_device(device)?,
            },
        };
        let tables = None;
        #[cfg(any(feature = "cuda", test))]
        let tables =
            crate::ops::on_gpu(device).then(|| crate::ops::nf4::tables(device)).transpose()?.or(tables);
        Ok(Self { shape: self.shape, codes: self.codes.to_device(device)?, absmax, tables })
    }

    /// The codes, and with double quantisation the nested magnitudes.
    ///
    /// # Errors
    /// The numbers cannot be read from the device.
    pub fn parts(&self) -> Result<(Vec<u8>, Option<Nested>)> {
        let nested = match &self.absmax {
            Absmax::Plain(_) => None,
            Absmax::Nested { codes, absmax, offset } => {
                Some((codes.to_vec1()?, absmax.to_vec1()?, offset.get(0)?.to_scalar()?))
            }
        };
        Ok((self.codes.to_vec1()?, nested))
    }

    /// `[out_features, in_features]`
    pub fn dims(&self) -> [usize; 2] {
        self.shape
    }

    /// Whether its magnitudes are quantised too.
    pub fn double_quant(&self) -> bool {
        matches!(self.absmax, Absmax::Nested { .. })
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        self.codes.device()
    }

    /// Bytes of codes and magnitudes.
    pub fn bytes(&self) -> u64 {
        let absmax = match &self.absmax {
            Absmax::Plain(absmax) => memory::bytes(absmax),
            Absmax::Nested { codes, absmax, offset } => {
                [codes, absmax, offset].map(memory::bytes).iter().sum()
            }
        };
        memory::bytes(&self.codes) + absmax
    }

    /// The matrix in float32.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn dequantize(&self) -> Result<Tensor> {
        let [rows, columns] = self.shape;
        #[cfg(any(feature = "cuda", test))]
        if crate::ops::on_gpu(self.device()) {
            return crate::ops::nf4::dequantize(self, DType::F32);
        }
        self.read(|view| {
            let mut out = vec![0f32; rows * columns];
            let chunk = BLOCK * 1024;
            out.par_chunks_mut(chunk).enumerate().for_each(|(i, out)| view.fill(i * chunk, out));
            Ok(Tensor::from_vec(out, (rows, columns), &Device::Cpu)?)
        })
    }

    /// The blocks' magnitudes as products use them.
    ///
    /// # Errors
    /// The matrix is on another device.
    pub fn magnitudes(&self) -> Result<Vec<f32>> {
        let blocks = (self.shape[0] * self.shape[1]).div_ceil(BLOCK);
        self.read(|view| Ok((0..blocks).map(|block| view.magnitude(block)).collect()))
    }

    /// Reads the codes and magnitudes on the CPU.
    pub(crate) fn read<T>(&self, f: impl FnOnce(Nf4View) -> Result<T>) -> Result<T> {
        let (codes, _) = self.codes.storage_and_layout();
        match &self.absmax {
            Absmax::Plain(absmax) => {
                let (absmax, _) = absmax.storage_and_layout();
                let scale = Magnitudes::Plain(cpu(&absmax)?.as_slice()?);
                f(Nf4View { codes: cpu(&codes)?.as_slice()?, scale })
            }
            Absmax::Nested { codes: scales, absmax, offset } => {
                let ((scales, _), (absmax, _)) = (scales.storage_and_layout(), absmax.storage_and_layout());
                let (codes, scales) = (cpu(&codes)?.as_slice()?, cpu(&scales)?.as_slice()?);
                let (absmax, offset) = (cpu(&absmax)?.as_slice()?, offset.get(0)?.to_scalar()?);
                f(Nf4View { codes, scale: Magnitudes::Nested { codes: scales, absmax, offset } })
            }
        }
    }
}

impl Absmax {
    fn nested(mut magnitudes: Vec<f32>) -> Result<Self> {
        // The sum block by block: a GPU, which makes the blocks' sums side by side, comes to the same bits.
        let sum = |block: &[f32]| block.iter().map(|x| f64::from(*x)).sum::<f64>();
        let count = magnitudes.len().max(1) as f64;
        let offset = (magnitudes.chunks(NESTED_BLOCK).map(sum).sum::<f64>() / count) as f32;
        magnitudes.iter_mut().for_each(|x| *x -= offset);
        let (codes, absmax) = dynamic::quantize(&magnitudes, NESTED_BLOCK);
        Ok(Self::Nested { codes: vector(codes)?, absmax: vector(absmax)?, offset: vector(vec![offset])? })
    }
}

fn vector<T: candle_core::WithDType>(values: Vec<T>) -> Result<Tensor> {
    let count = values.len();
    Ok(Tensor::from_vec(values, count, &Device::Cpu)?)
}

fn cpu(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => Err(candle_core::Error::Msg("a CPU kernel got a matrix of another device".into()))?,
    }
}

/// A quantised matrix's numbers on the CPU.
#[derive(Clone, Copy)]
pub(crate) struct Nf4View<'a> {
    codes: &'a [u8],
    scale: Magnitudes<'a>,
}

#[derive(Clone, Copy)]
enum Magnitudes<'a> {
    Plain(&'a [f32]),
    Nested { codes: &'a [u8], absmax: &'a [f32], offset: f32 },
}

impl Nf4View<'_> {
    fn magnitude(&self, block: usize) -> f32 {
        match self.scale {
            Magnitudes::Plain(absmax) => absmax[block],
            Magnitudes::Nested { codes, absmax, offset } => {
                dynamic::TABLE[usize::from(codes[block])] * absmax[block / NESTED_BLOCK] + offset
            }
        }
    }

    /// Fills `out` with the elements from `start` on, counted row by row.
    pub(crate) fn fill(&self, start: usize, mut out: &mut [f32]) {
        let mut at = start;
        while !out.is_empty() {
            let take = (BLOCK - at % BLOCK).min(out.len());
            let (now, rest) = out.split_at_mut(take);
            let magnitude = self.magnitude(at / BLOCK);
            let table = CODE.map(|value| value * magnitude);
            let value = |half: u8| table[usize::from(half & 15)];
            // A range may start or end in the middle of a byte.
            let (first, whole) = now.split_at_mut(at % 2);
            if let [element] = first {
                *element = value(self.codes[at / 2]);
            }
            let bytes = &self.codes[at.div_ceil(2)..];
            for (pair, byte) in whole.chunks_mut(2).zip(bytes) {
                pair[0] = value(byte >> 4);
                if let Some(second) = pair.get_mut(1) {
                    *second = value(*byte);
                }
            }
            at += take;
            out = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Any range of a matrix is that part of the whole, and no element is further off than half the widest gap.
        #[test]
        fn ranges_are_parts_of_the_whole(
            rows in 1usize..9, columns in 1usize..90, seed: u64, double: bool, cut in (0.0..1.0, 0.0..1.0),
        ) {
            let key = domain::rng::key(seed, "matrix");
            let n = rows * columns;
            let values: Vec<f32> = (0..n as u64).map(|i| (domain::rng::uniform(key, i) - 0.5) as f32).collect();
            let matrix = Tensor::from_vec(values.clone(), (rows, columns), &Device::Cpu).unwrap();
            let quantized = Nf4::quantize(&matrix, double).unwrap();
            let whole = quantized.dequantize().unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let at = |x: f64| (x * n as f64) as usize;
            let (start, end) = (at(cut.0).min(at(cut.1)), at(cut.0).max(at(cut.1)));
            let mut part = vec![0.0; end - start];
            quantized.read(|view| { view.fill(start, &mut part); Ok(()) }).unwrap();
            prop_assert_eq!(&part[..], &whole[start..end]);
            for (i, (x, y)) in values.iter().zip(&whole).enumerate() {
                let block = &values[i / BLOCK * BLOCK..(i / BLOCK * BLOCK + BLOCK).min(n)];
                let largest = block.iter().fold(0f32, |m, x| m.max(x.abs()));
                // The widest gap between codes is 0.304; a nested magnitude is off by less than 2 %.
                prop_assert!((x - y).abs() <= 0.16 * largest + 0.02, "element {}: {} for {}", i, y, x);
            }
        }
    }

    #[test]
    fn bytes_a_parameter() {
        // (double quantisation, bits)
        for (double, bits) in [(false, 4.5), (true, 4.127)] {
            let outline = Nf4::outline([4096, 11_008], double).unwrap();
            let got = outline.bytes() as f64 * 8.0 / (4096.0 * 11_008.0);
            assert!((got - bits).abs() < 0.0005, "{got}");
            let matrix = Tensor::zeros((33, 70), DType::F32, &Device::Cpu).unwrap();
            let quantized = Nf4::quantize(&matrix, double).unwrap();
            assert_eq!(Nf4::outline([33, 70], double).unwrap().bytes(), quantized.bytes());
            let zeros = quantized.dequantize().unwrap().abs().unwrap().max_all().unwrap();
            assert_eq!(zeros.to_scalar::<f32>().unwrap(), 0.0, "zeros stay zeros");
        }
    }
}
