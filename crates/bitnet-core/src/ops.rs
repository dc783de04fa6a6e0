//! The hot loops of quantization as a trait, and their oracle.
//!
//! Every loop fixes its order of floating-point operations: [`LANES`] strided partial results, reduced in lane order. An
//! implementation for a wider instruction set therefore returns the same bits, and so does every thread count, because callers
//! merge partial results in the order of the data.

use crate::scheme::Rounding;

/// Strided partial results of every reduction.
pub const LANES: usize = 16;

/// What one pass over weights tells about them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moments {
    /// Number of weights.
    pub count: u64,
    /// Σ w.
    pub sum: f64,
    /// Σ |w|.
    pub sum_abs: f64,
    /// Σ w².
    pub sum_sq: f64,
    /// Smallest weight; +∞ if there is none.
    pub min: f32,
    /// Largest weight; −∞ if there is none.
    pub max: f32,
    /// Smallest |w| other than 0; +∞ if all are 0.
    pub min_nonzero: f32,
    /// Whether no weight is NaN or infinite. If false, the other fields mean nothing.
    pub finite: bool,
}

impl Moments {
    /// The moments of nothing.
    pub const EMPTY: Self = Self {
        count: 0,
        sum: 0.0,
        sum_abs: 0.0,
        sum_sq: 0.0,
        min: f32::INFINITY,
        max: f32::NEG_INFINITY,
        min_nonzero: f32::INFINITY,
        finite: true,
    };

    /// The moments of these weights followed by those of `next`.
    pub fn then(self, next: Self) -> Self {
        Self {
            count: self.count + next.count,
            sum: self.sum + next.sum,
            sum_abs: self.sum_abs + next.sum_abs,
            sum_sq: self.sum_sq + next.sum_sq,
            min: self.min.min(next.min),
            max: self.max.max(next.max),
            min_nonzero: self.min_nonzero.min(next.min_nonzero),
            finite: self.finite && next.finite,
        }
    }

    /// max |w|, 0 if there is no weight.
    pub fn max_abs(&self) -> f32 {
        self.max.max(-self.min).max(0.0)
    }

    /// mean |w|, 0 if there is no weight.
    pub fn mean_abs(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum_abs / self.count as f64 }
    }

    /// Root mean square, 0 if there is no weight.
    pub fn rms(&self) -> f64 {
        if self.count == 0 { 0.0 } else { (self.sum_sq / self.count as f64).sqrt() }
    }

    /// `Some(s)` if every weight is −s, 0 or +s for one s > 0.
    pub fn ternary_magnitude(&self) -> Option<f32> {
        (self.finite && self.min_nonzero == self.max_abs()).then_some(self.min_nonzero)
    }
}

/// Weighted count and sum of the weights on one side of a threshold.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Above {
    /// Number of weights there.
    pub count: u64,
    /// Σ h, the importance there (the count, where there is no importance).
    pub weight: f64,
    /// Σ h·u, with u = |w| or w.
    pub sum: f64,
}

impl Above {
    /// This side followed by the same side of the next weights.
    pub fn then(self, next: Self) -> Self {
        Self { count: self.count + next.count, weight: self.weight + next.weight, sum: self.sum + next.sum }
    }

    /// Σhu / Σh; 0 where nothing is.
    pub fn mean(&self) -> f64 {
        if self.weight > 0.0 { self.sum / self.weight } else { 0.0 }
    }
}

/// Which key of a weight a threshold compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key {
    /// |w|.
    Magnitude,
    /// w.
    Signed,
}

impl Key {
    /// The key of one weight.
    #[inline(always)]
    pub fn of(self, w: f32) -> f32 {
        match self {
            Self::Magnitude => w.abs(),
            Self::Signed => w,
        }
    }
}

/// A uniform quantizer: `q = clip(round(w / scale) + zero, low, high)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Uniform {
    /// Step between two values; 0 encodes everything as `clip(zero)`.
    pub scale: f32,
    /// Zero point, an integer.
    pub zero: f32,
    /// Smallest value.
    pub low: i8,
    /// Largest value.
    pub high: i8,
    /// What happens at ties.
    pub rounding: Rounding,
}

impl Uniform {
    /// The value of one weight, as f32.
    #[inline(always)]
    pub fn value(&self, w: f32) -> f32 {
        let x = if self.scale == 0.0 { 0.0 } else { w / self.scale };
        (self.rounding.round(x) + self.zero).clamp(f32::from(self.low), f32::from(self.high))
    }

    /// What the value stands for: `scale · (q − zero)`.
    #[inline(always)]
    pub fn dequantize(&self, value: f32) -> f32 {
        self.scale * (value - self.zero)
    }
}

/// The loops. The default bodies are the scalar oracle; an override must return the same bits.
///
/// `h`, where there is one, is the importance of each weight and has the length of `w`.
pub trait Ops: Sync {
    /// One pass of statistics.
    fn moments(&self, w: &[f32]) -> Moments {
        moments(w)
    }

    /// Weighted count and sum over the weights whose key is greater than `t`.
    fn above(&self, w: &[f32], h: Option<&[f32]>, key: Key, t: f32) -> Above {
        above(w, h, key, t)
    }

    /// Σ h·(w − ŵ)² of a uniform quantizer.
    fn uniform_error(&self, w: &[f32], h: Option<&[f32]>, quantizer: &Uniform) -> f64 {
        uniform_error(w, h, quantizer)
    }

    /// `out = sign(w)·[|w| > cut]`.
    fn encode_cut(&self, w: &[f32], cut: f32, out: &mut [i8]) {
        encode_cut(w, cut, out);
    }

    /// `out = clip(round(w / scale) + zero, low, high)`.
    fn encode_uniform(&self, w: &[f32], quantizer: &Uniform, out: &mut [i8]) {
        encode_uniform(w, quantizer, out);
    }
}

/// The oracle: every loop in plain Rust, compiled for the baseline instruction set.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scalar;

impl Ops for Scalar {}

/// Sums lanes in order.
#[inline(always)]
fn total(lanes: [f64; LANES]) -> f64 {
    lanes.iter().sum()
}

/// Body of [`Ops::moments`].
#[inline(always)]
pub fn moments(w: &[f32]) -> Moments {
    let mut sum = [0.0f64; LANES];
    let mut sum_abs = [0.0f64; LANES];
    let mut sum_sq = [0.0f64; LANES];
    let mut min = [f32::INFINITY; LANES];
    let mut max = [f32::NEG_INFINITY; LANES];
    let mut min_nonzero = [f32::INFINITY; LANES];
    let mut broken = [0u32; LANES];
    let mut add = |lane: usize, w: f32| {
        let x = f64::from(w);
        sum[lane] += x;
        sum_abs[lane] += x.abs();
        sum_sq[lane] += x * x;
        min[lane] = if w < min[lane] { w } else { min[lane] };
        max[lane] = if w > max[lane] { w } else { max[lane] };
        let a = if w == 0.0 { f32::INFINITY } else { w.abs() };
        min_nonzero[lane] = if a < min_nonzero[lane] { a } else { min_nonzero[lane] };
        broken[lane] |= u32::from(w.to_bits() & 0x7f80_0000 == 0x7f80_0000);
    };
    let (chunks, tail) = w.as_chunks::<LANES>();
    for chunk in chunks {
        chunk.iter().enumerate().for_each(|(lane, &w)| add(lane, w));
    }
    for (lane, &w) in tail.iter().enumerate() {
        add(lane, w);
    }
    Moments {
        count: w.len() as u64,
        sum: total(sum),
        sum_abs: total(sum_abs),
        sum_sq: total(sum_sq),
        min: min.into_iter().fold(f32::INFINITY, f32::min),
        max: max.into_iter().fold(f32::NEG_INFINITY, f32::max),
        min_nonzero: min_nonzero.into_iter().fold(f32::INFINITY, f32::min),
        finite: broken.iter().all(|&b| b == 0),
    }
}

/// Body of [`Ops::above`].
#[inline(always)]
pub fn above(w: &[f32], h: Option<&[f32]>, key: Key, t: f32) -> Above {
    let mut count = [0u32; LANES];
    let mut weight = [0.0f64; LANES];
    let mut sum = [0.0f64; LANES];
    let (chunks, tail) = w.as_chunks::<LANES>();
    match h {
        None => {
            let mut add = |lane: usize, w: f32| {
                let u = key.of(w);
                let over = u > t;
                count[lane] += u32::from(over);
                sum[lane] += f64::from(if over { u } else { 0.0 });
            };
            for chunk in chunks {
                chunk.iter().enumerate().for_each(|(lane, &w)| add(lane, w));
            }
            for (lane, &w) in tail.iter().enumerate() {
                add(lane, w);
            }
            let count = count.iter().map(|&c| u64::from(c)).sum();
            Above { count, weight: count as f64, sum: total(sum) }
        }
        Some(h) => {
            let mut add = |lane: usize, w: f32, h: f32| {
                let u = key.of(w);
                let over = u > t;
                count[lane] += u32::from(over);
                let h = f64::from(if over { h } else { 0.0 });
                weight[lane] += h;
                sum[lane] += h * f64::from(u);
            };
            let (importance, importance_tail) = h.as_chunks::<LANES>();
            for (chunk, h) in chunks.iter().zip(importance) {
                for lane in 0..LANES {
                    add(lane, chunk[lane], h[lane]);
                }
            }
            for (lane, (&w, &h)) in tail.iter().zip(importance_tail).enumerate() {
                add(lane, w, h);
            }
            Above { count: count.iter().map(|&c| u64::from(c)).sum(), weight: total(weight), sum: total(sum) }
        }
    }
}

/// Body of [`Ops::uniform_error`].
#[inline(always)]
pub fn uniform_error(w: &[f32], h: Option<&[f32]>, quantizer: &Uniform) -> f64 {
    let mut error = [0.0f64; LANES];
    let squared = |w: f32| {
        let d = f64::from(w) - f64::from(quantizer.dequantize(quantizer.value(w)));
        d * d
    };
    let (chunks, tail) = w.as_chunks::<LANES>();
    match h {
        None => {
            for chunk in chunks {
                for lane in 0..LANES {
                    error[lane] += squared(chunk[lane]);
                }
            }
            for (lane, &w) in tail.iter().enumerate() {
                error[lane] += squared(w);
            }
        }
        Some(h) => {
            for (i, (&w, &h)) in w.iter().zip(h).enumerate() {
                error[i % LANES] += f64::from(h) * squared(w);
            }
        }
    }
    total(error)
}

/// Body of [`Ops::encode_cut`].
#[inline(always)]
pub fn encode_cut(w: &[f32], cut: f32, out: &mut [i8]) {
    for (q, &w) in out.iter_mut().zip(w) {
        *q = i8::from(w > cut) - i8::from(w < -cut);
    }
}

/// Body of [`Ops::encode_uniform`].
#[inline(always)]
pub fn encode_uniform(w: &[f32], quantizer: &Uniform, out: &mut [i8]) {
    for (q, &w) in out.iter_mut().zip(w) {
        *q = quantizer.value(w) as i8;
    }
}
