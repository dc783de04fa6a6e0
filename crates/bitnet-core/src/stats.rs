//! Error of quantization: streaming statistics of `(w, ŵ)` pairs and of codes.

use serde::{Deserialize, Serialize};

/// Sums over pairs of an original weight `w` and its reconstruction `ŵ`. All figures follow from
/// them.
///
/// Strips can be measured separately and joined with [`ErrorStats::merge`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct ErrorStats {
    /// Pairs.
    pub count: u64,
    /// Σ w².
    pub signal: f64,
    /// Σ (w − ŵ)².
    pub noise: f64,
    /// Σ |w − ŵ|.
    pub absolute: f64,
    /// max |w − ŵ|.
    pub max_error: f64,
    /// Σ w·ŵ.
    pub dot: f64,
    /// Σ ŵ².
    pub power: f64,
    /// Pairs with ŵ = 0.
    pub zeros: u64,
    /// Pairs whose signs differ, both non-zero.
    pub sign_flips: u64,
}

impl ErrorStats {
    /// Measures one strip. Slices of unequal length are measured up to the shorter one.
    pub fn measure(original: &[f32], quantized: &[f32]) -> Self {
        const LANES: usize = crate::ops::LANES;
        let mut lanes = [[0.0f64; LANES]; 5];
        let mut max = [0.0f32; LANES];
        let (mut zeros, mut flips) = ([0u32; LANES], [0u32; LANES]);
        let n = original.len().min(quantized.len());
        let mut add = |lane: usize, w: f32, v: f32| {
            let (x, y) = (f64::from(w), f64::from(v));
            let e = x - y;
            lanes[0][lane] += x * x;
            lanes[1][lane] += e * e;
            lanes[2][lane] += e.abs();
            lanes[3][lane] += x * y;
            lanes[4][lane] += y * y;
            max[lane] = max[lane].max((w - v).abs());
            zeros[lane] += u32::from(v == 0.0);
            flips[lane] += u32::from((w > 0.0 && v < 0.0) || (w < 0.0 && v > 0.0));
        };
        let (a, a_tail) = original[..n].as_chunks::<LANES>();
        let (b, b_tail) = quantized[..n].as_chunks::<LANES>();
        for (a, b) in a.iter().zip(b) {
            for lane in 0..LANES {
                add(lane, a[lane], b[lane]);
            }
        }
        for (lane, (&a, &b)) in a_tail.iter().zip(b_tail).enumerate() {
            add(lane, a, b);
        }
        let sum = |i: usize| lanes[i].iter().sum::<f64>();
        Self {
            count: n as u64,
            signal: sum(0),
            noise: sum(1),
            absolute: sum(2),
            max_error: max.into_iter().fold(0.0, |m, x| m.max(f64::from(x))),
            dot: sum(3),
            power: sum(4),
            zeros: zeros.iter().map(|&n| u64::from(n)).sum(),
            sign_flips: flips.iter().map(|&n| u64::from(n)).sum(),
        }
    }

    /// The statistics of these pairs and those of `next`.
    pub fn merge(self, next: Self) -> Self {
        Self {
            count: self.count + next.count,
            signal: self.signal + next.signal,
            noise: self.noise + next.noise,
            absolute: self.absolute + next.absolute,
            max_error: self.max_error.max(next.max_error),
            dot: self.dot + next.dot,
            power: self.power + next.power,
            zeros: self.zeros + next.zeros,
            sign_flips: self.sign_flips + next.sign_flips,
        }
    }

    fn share(&self, x: f64) -> f64 {
        if self.count == 0 {
            0.0
        } else {
            x / self.count as f64
        }
    }

    /// Mean squared error.
    pub fn mse(&self) -> f64 {
        self.share(self.noise)
    }

    /// Mean absolute error.
    pub fn mae(&self) -> f64 {
        self.share(self.absolute)
    }

    /// `10·log10(Σw² / Σ(w − ŵ)²)` in dB; +∞ without any error.
    pub fn sqnr_db(&self) -> f64 {
        if self.noise == 0.0 {
            f64::INFINITY
        } else {
            10.0 * (self.signal / self.noise).log10()
        }
    }

    /// `Σwŵ / √(Σw²·Σŵ²)`; 1 if both are all zero, 0 if one is.
    pub fn cosine(&self) -> f64 {
        let norm = (self.signal * self.power).sqrt();
        match norm > 0.0 {
            true => self.dot / norm,
            false if self.signal == self.power => 1.0,
            false => 0.0,
        }
    }

    /// Share of reconstructed weights that are 0.
    pub fn sparsity(&self) -> f64 {
        self.share(self.zeros as f64)
    }

    /// Share of weights whose sign changed.
    pub fn sign_flip_share(&self) -> f64 {
        self.share(self.sign_flips as f64)
    }
}

/// How often each value occurs.
#[derive(Debug, Clone, PartialEq)]
pub struct CodeHistogram(Box<[u64; 256]>);

impl Default for CodeHistogram {
    fn default() -> Self {
        Self(Box::new([0; 256]))
    }
}

impl CodeHistogram {
    /// Counts `values`.
    pub fn add(&mut self, values: &[i8]) {
        // Four tables: in a run of equal values each increment would wait for the previous store.
        let mut tables = [[0u32; 256]; 4];
        for part in values.chunks(1 << 30) {
            let (quads, tail) = part.as_chunks::<4>();
            for quad in quads {
                for (table, &v) in tables.iter_mut().zip(quad) {
                    table[usize::from(v as u8)] += 1;
                }
            }
            for &v in tail {
                tables[0][usize::from(v as u8)] += 1;
            }
            for table in &mut tables {
                for (sum, n) in self.0.iter_mut().zip(std::mem::replace(table, [0; 256])) {
                    *sum += u64::from(n);
                }
            }
        }
    }

    /// Adds the counts of another histogram.
    pub fn merge(&mut self, other: &Self) {
        self.0
            .iter_mut()
            .zip(other.0.iter())
            .for_each(|(a, b)| *a += b);
    }

    /// How often `value` occurs.
    pub fn count(&self, value: i8) -> u64 {
        self.0[usize::from(value as u8)]
    }

    /// Order-0 entropy in bits per value: the lower bound of coding value by value.
    pub fn entropy_bits(&self) -> f64 {
        let n: u64 = self.0.iter().sum();
        self.0
            .iter()
            .filter(|&&c| c > 0)
            .map(|&c| c as f64 / n as f64)
            .map(|p| -p * p.log2())
            .sum::<f64>()
            .max(0.0)
    }
}
