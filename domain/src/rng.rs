//! Counter-based random numbers: a value depends on a key and an index alone, so that any element of any
//! mask, of any trial, at any step can be made again, in any order and on any machine.

/// SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection that mixes all bits.
pub fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The key of the stream that `name` has under `seed`.
pub fn key(seed: u64, name: &str) -> u64 {
    name.bytes().fold(mix(seed), |key, byte| mix(key ^ u64::from(byte)))
}

/// The stream's `index`-th 64 bits.
pub fn bits(key: u64, index: u64) -> u64 {
    mix(key ^ mix(index))
}

/// The stream's `index`-th number, uniform in [0, 1) with 53 bits.
pub fn uniform(key: u64, index: u64) -> f64 {
    (bits(key, index) >> 11) as f64 / (1u64 << 53) as f64
}

/// The `index`-th number of a stream that is normal with mean 0 and standard deviation 1 (Box and Muller 1958).
pub fn normal(key: u64, index: u64) -> f64 {
    // 1 − u lies in (0, 1]: its logarithm is finite.
    let radius = (-2.0 * (1.0 - uniform(key, 2 * index)).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(key, 2 * index + 1)).cos()
}

/// A permutation of `0..n`, drawn from the stream by Fisher and Yates' shuffle.
pub fn permutation(key: u64, n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        order.swap(i, (uniform(key, i as u64) * (i + 1) as f64) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_repeat_and_differ() {
        let (a, b) = (key(1, "a"), key(1, "b"));
        assert_ne!(a, b);
        assert_ne!(a, key(2, "a"));
        assert_eq!(bits(a, 7), bits(key(1, "a"), 7));
    }

    #[test]
    fn uniform_fills_its_range_evenly() {
        let n = 20_000;
        let mut bins = [0u32; 10];
        (0..n).for_each(|i| bins[(uniform(key(3, "x"), i) * 10.0) as usize] += 1);
        // 2000 expected, standard deviation 42: six of them.
        assert!(bins.iter().all(|b| b.abs_diff(2000) < 260), "{bins:?}");
    }

    #[test]
    fn a_permutation_holds_each_number_once() {
        for n in [0, 1, 2, 57] {
            let mut order = permutation(key(4, "epoch"), n);
            order.sort_unstable();
            assert_eq!(order, (0..n).collect::<Vec<_>>());
        }
    }
}
