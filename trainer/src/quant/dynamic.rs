//! The signed 8-bit numbers in which double quantisation keeps magnitudes: bitsandbytes' dynamic map (Dettmers
//! 2015), seven decades of tenths with ever fewer steps, the upper ones finer.

use std::sync::LazyLock;

/// The values of the 256 codes, ascending.
pub static TABLE: LazyLock<[f32; 256]> = LazyLock::new(table);

/// In decade i, from 10⁻⁶ up to 1, the middles of 2ⁱ equal steps from a tenth of it to its end; each with its
/// negative; and 0 and 1.
fn table() -> [f32; 256] {
    let mut values = vec![0.0, 1.0];
    for decade in 0..7 {
        let steps = 1usize << decade;
        // As torch's linspace rounds: the first half counted from the start, the second from the end, both fused.
        let step = (1.0 - 0.1f32) / steps as f32;
        let edge = |i: usize| {
            if i < steps.div_ceil(2) {
                step.mul_add(i as f32, 0.1)
            } else {
                (-step).mul_add((steps - i) as f32, 1.0)
            }
        };
        let power = 10f64.powi(decade - 6) as f32;
        for i in 0..steps {
            let value = power * ((edge(i) + edge(i + 1)) / 2.0);
            values.extend([value, -value]);
        }
    }
    values.sort_by(f32::total_cmp);
    let mut table = [0.0; 256];
    table.copy_from_slice(&values);
    table
}

/// The code of the value nearest to `x`; of two as near the lower.
fn code(x: f32) -> u8 {
    let table = &*TABLE;
    let above = table.partition_point(|value| *value < x).clamp(1, 255);
    let (low, high) = (table[above - 1], table[above]);
    (if x - low <= high - x { above - 1 } else { above }) as u8
}

/// Codes, and the largest magnitude of each block.
pub fn quantize(values: &[f32], block: usize) -> (Vec<u8>, Vec<f32>) {
    let mut codes = Vec::with_capacity(values.len());
    let mut absmax = Vec::with_capacity(values.len().div_ceil(block));
    for values in values.chunks(block) {
        let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let scale = if largest > 0.0 { 1.0 / largest } else { 0.0 };
        codes.extend(values.iter().map(|x| code(x * scale)));
        absmax.push(largest);
    }
    (codes, absmax)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_has_its_own_code() {
        for (i, value) in TABLE.iter().enumerate() {
            assert_eq!(usize::from(code(*value)), i, "{value}");
        }
        assert_eq!((TABLE[0], TABLE[127], TABLE[255]), (-0.992_968_74, 0.0, 1.0));
        assert_eq!((code(-3.0), code(3.0)), (0, 255));
    }
}
