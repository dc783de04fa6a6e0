//! Random numbers that depend on a seed alone: the same on every machine, in every version.
//!
//! [`Random`] is SplitMix64 (G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number
//! generators", 2014):
//!
//! ```text
//! state ← state + 0x9e3779b97f4a7c15;   z ← mix(state)
//! ```
//!
//! Number `i` of a stream is `mix(seed + (i + 1) · 0x9e37…)`, so it can also be computed alone
//! ([`nth`]), in any order and on any thread.

/// What each step adds to the state: 2⁶⁴ / golden ratio, odd.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

const fn mix(state: u64) -> u64 {
    let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Number `index` of the stream of a seed: the bits that [`Random::bits`] returns after `index`
/// other calls.
///
/// ```
/// use bitnet_core::random::{Random, nth};
/// let mut random = Random::new(7);
/// assert_eq!([random.bits(), random.bits()], [nth(7, 0), nth(7, 1)]);
/// ```
pub const fn nth(seed: u64, index: u64) -> u64 {
    mix(seed.wrapping_add(index.wrapping_add(1).wrapping_mul(STEP)))
}

/// A stream of random numbers.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The stream of a seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 uniform bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mix(self.0)
    }

    /// A number below `n`, each as likely as the others within n / 2⁶⁴.
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "no number is below 0");
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// Uniform in [0, 1), a multiple of 2⁻⁵³.
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Normally distributed with mean 0 and variance 1 (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// −1, 0 and 1, each as likely as the others.
    pub fn trit(&mut self) -> i8 {
        self.below(3) as i8 - 1
    }

    /// 0 … n − 1 in random order (Fisher and Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

/// The 32-bit linear congruential generator of "Numerical Recipes". The golden files were made with
/// it, by programs in C and Python. Use [`Random`] for everything else.
#[derive(Debug, Clone)]
pub struct GoldenStream(u32);

impl GoldenStream {
    /// The stream of a seed; the golden files use 1.
    pub const fn new(seed: u32) -> Self {
        Self(seed)
    }

    /// 32 bits; the upper ones are the most random.
    pub fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0
    }

    /// −1, 0 or 1: the upper 8 bits modulo 3, less 1.
    pub fn trit(&mut self) -> i8 {
        ((self.bits() >> 24) % 3) as i8 - 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers of the authors' C program for the seed 1234567.
    #[test]
    fn numbers_are_those_of_splitmix64() {
        let mut random = Random::new(1_234_567);
        for expected in [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
            4_593_380_528_125_082_431,
            16_408_922_859_458_223_821,
        ] {
            assert_eq!(random.bits(), expected);
        }
    }

    #[test]
    fn moments_are_those_of_the_distributions() {
        let mut random = Random::new(7);
        let n = 200_000;
        let (mut sum, mut squares, mut uniform) = (0.0, 0.0, 0.0);
        for _ in 0..n {
            let x = random.normal();
            (sum, squares, uniform) = (sum + x, squares + x * x, uniform + random.uniform());
        }
        // Four standard errors of each estimate.
        let bound = 4.0 / f64::from(n).sqrt();
        assert!(
            (sum / f64::from(n)).abs() < bound
                && (squares / f64::from(n) - 1.0).abs() < bound * 2f64.sqrt()
        );
        assert!((uniform / f64::from(n) - 0.5).abs() < bound * 12f64.sqrt().recip());
    }

    #[test]
    fn a_permutation_has_every_number_once() {
        let order = Random::new(1).permutation(1000);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<u32>>());
        assert_ne!(order, Random::new(2).permutation(1000));
        assert!(Random::new(0).permutation(0).is_empty());
    }
}
