//! Random numbers as CPython's `random.Random` draws them, from a seed on: the examples in a prompt are those that
//! its `sample` chooses, and the older harness's documents stand as its `shuffle` leaves them.

use rand_mt::Mt;

/// `random.Random(seed)`.
#[derive(Debug, Clone)]
pub struct PythonRandom(Mt);

impl PythonRandom {
    /// The stream of a seed.
    pub fn new(seed: u32) -> Self {
        Self(Mt::new_with_key([seed]))
    }

    /// `_randbelow(n)`: uniform in `0..n`, by drawing as many bits as `n` has until they are below it. `n` is above 0.
    fn below(&mut self, n: u32) -> u32 {
        let unused = n.leading_zeros();
        loop {
            let drawn = self.0.next_u32() >> unused;
            if drawn < n {
                return drawn;
            }
        }
    }

    /// `shuffle(things)`.
    pub fn shuffle(&mut self, things: &mut [usize]) {
        for last in (1..things.len()).rev() {
            things.swap(last, self.below(last as u32 + 1) as usize);
        }
    }

    /// `sample(range(population), k)`: the places of `k` of `population` things, in the order drawn; all of them if
    /// there are fewer.
    pub fn sample(&mut self, population: usize, k: usize) -> Vec<usize> {
        let k = k.min(population);
        // CPython's estimate of a set's size: above it, what is chosen is remembered, not what is left.
        let mut set = 21;
        if k > 5 {
            set += 4usize.pow(((3 * k) as f64).log(4.0).ceil() as u32);
        }
        if population <= set {
            let mut left: Vec<_> = (0..population).collect();
            let draw = |_| {
                let at = self.below(left.len() as u32) as usize;
                left.swap_remove(at)
            };
            return (0..k).map(draw).collect();
        }
        let mut drawn = Vec::with_capacity(k);
        while drawn.len() < k {
            let at = self.below(population as u32) as usize;
            if !drawn.contains(&at) {
                drawn.push(at);
            }
        }
        drawn
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What CPython 3.11 draws, sample after sample of one stream a seed:
    /// `r = random.Random(seed); r.sample(range(population), len(drawn))`.
    #[test]
    fn samples_are_cpythons() {
        #[derive(serde::Deserialize)]
        struct Row {
            seed: u32,
            population: usize,
            drawn: Vec<usize>,
        }
        let rows: Vec<Row> =
            serde_json::from_str(include_str!("../tests/fixtures/python_random.json")).unwrap();
        let mut stream = (None, PythonRandom::new(0));
        for row in rows {
            if stream.0 != Some(row.seed) {
                stream = (Some(row.seed), PythonRandom::new(row.seed));
            }
            let got = stream.1.sample(row.population, row.drawn.len());
            assert_eq!(got, row.drawn, "seed {}, {} of {}", row.seed, row.drawn.len(), row.population);
        }
        assert_eq!(PythonRandom::new(1).sample(2, 5).len(), 2);
    }
}
