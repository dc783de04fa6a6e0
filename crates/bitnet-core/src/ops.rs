//! The hot loops of quantization as a trait, and their oracle.
//!
//! Every loop fixes its order of floating-point operations: [`LANES`] strided partial results,
//! reduced by halves. An implementation for a wider instruction set therefore returns the same
//! bits, and so does every thread count, because callers merge partial results in the order of the
//! data.

use crate::scheme::Rounding;

/// Strided partial results of every reduction.
pub const LANES: usize = 16;

/// Statistics of weights from one pass.
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
    /// Smallest weight; +∞ without weights.
    pub min: f32,
    /// Largest weight; −∞ without weights.
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

    /// The moments of these weights and those of `next`, which come after them.
    pub fn merge(self, next: Self) -> Self {
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

    /// max |w|, 0 without weights.
    pub fn max_abs(&self) -> f32 {
        self.max.max(-self.min).max(0.0)
    }

    /// mean |w|, 0 without weights.
    pub fn mean_abs(&self) -> f64 {
        if self.count == 0 {
            0.0
        } else {
            self.sum_abs / self.count as f64
        }
    }

    /// Root mean square, 0 without weights.
    pub fn rms(&self) -> f64 {
        if self.count == 0 {
            0.0
        } else {
            (self.sum_sq / self.count as f64).sqrt()
        }
    }

    /// `Some(s)` if every weight is −s, 0 or +s for one s > 0.
    pub fn ternary_magnitude(&self) -> Option<f32> {
        (self.finite && self.min_nonzero == self.max_abs()).then_some(self.min_nonzero)
    }

    /// Number and limits of the weights.
    pub fn extent(&self) -> Extent {
        Extent {
            count: self.count,
            min: self.min,
            max: self.max,
        }
    }
}

/// Statistics of one pass for the rules of one trit plane: fewer than [`Moments`], so that the pass
/// runs at the speed of memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Magnitudes {
    /// Number of weights.
    pub count: u64,
    /// Σ |w|, the bits of [`Moments::sum_abs`]. Finite exactly if every weight is; the other fields
    /// mean nothing if it is not.
    pub sum: f64,
    /// max |w|, 0 without weights.
    pub max: f32,
    /// Whether every weight is −max, 0 or +max.
    pub ternary: bool,
}

impl Magnitudes {
    /// The magnitudes of these weights and those of `next`.
    pub fn merge(self, next: Self) -> Self {
        let same = self.max == next.max || self.max == 0.0 || next.max == 0.0;
        Self {
            count: self.count + next.count,
            sum: self.sum + next.sum,
            max: self.max.max(next.max),
            ternary: self.ternary && next.ternary && same,
        }
    }

    /// mean |w|, 0 without weights.
    pub fn mean(&self) -> f64 {
        if self.count == 0 {
            0.0
        } else {
            self.sum / self.count as f64
        }
    }

    /// Number and limits of the weights, as far as magnitudes tell.
    pub fn extent(&self) -> Extent {
        Extent {
            count: self.count,
            min: -self.max,
            max: self.max,
        }
    }
}

/// Number of weights and limits within which they lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Extent {
    /// Number of weights.
    pub count: u64,
    /// No weight is smaller.
    pub min: f32,
    /// No weight is larger.
    pub max: f32,
}

/// Weighted count and sum of the weights on one side of a threshold.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Above {
    /// Number of weights.
    pub count: u64,
    /// Σ h of their importance; without importance, the count.
    pub weight: f64,
    /// Σ h·u, with u = |w| or w.
    pub sum: f64,
}

impl Above {
    /// This side and the same side of the weights after these.
    pub fn merge(self, next: Self) -> Self {
        Self {
            count: self.count + next.count,
            weight: self.weight + next.weight,
            sum: self.sum + next.sum,
        }
    }

    /// Σhu / Σh; 0 for an empty side.
    pub fn mean(&self) -> f64 {
        if self.weight > 0.0 {
            self.sum / self.weight
        } else {
            0.0
        }
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
    pub fn apply(self, w: f32) -> f32 {
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
    /// How ties are rounded.
    pub rounding: Rounding,
}

impl Uniform {
    /// The value of one weight, as f32.
    #[inline(always)]
    pub fn value(&self, w: f32) -> f32 {
        let x = if self.scale == 0.0 {
            0.0
        } else {
            w / self.scale
        };
        (self.rounding.round(x) + self.zero).clamp(f32::from(self.low), f32::from(self.high))
    }

    /// The weight of a value: `scale · (q − zero)`.
    #[inline(always)]
    pub fn dequantize(&self, value: f32) -> f32 {
        self.scale * (value - self.zero)
    }
}

/// Where the values of a ternary granule change: `q = [w > high] − [w < low]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cuts {
    /// Smaller weights become −1.
    pub low: f32,
    /// Larger weights become +1.
    pub high: f32,
}

impl Cuts {
    /// Every weight becomes 0.
    pub const NONE: Self = Self::symmetric(f32::INFINITY);

    /// `q = sign(w)·[|w| > cut]`.
    pub const fn symmetric(cut: f32) -> Self {
        Self {
            low: -cut,
            high: cut,
        }
    }

    /// The cuts of `q = clip(round(w / scale), −1, 1)`, exactly: division and rounding are
    /// monotone, so these cuts exist, within a few ulps of ±scale/2. `scale` is finite
    /// and not negative; 0 encodes everything as 0.
    pub fn rounding(scale: f32, rounding: Rounding) -> Self {
        if scale == 0.0 {
            return Self::NONE;
        }
        // One ulp above scale/2, w/scale is at least 2⁻²⁴/1.99… above 1/2: more than half-way to
        // the next number.
        if rounding == Rounding::HalfEven && scale >= 2.0 * f32::MIN_POSITIVE {
            return Self::symmetric(scale / 2.0);
        }
        let up = |w: f32| match rounding {
            Rounding::HalfEven => w / scale > 0.5,
            Rounding::HalfAway => w / scale >= 0.5,
            Rounding::HalfUp => w / scale + 0.5 >= 1.0,
        };
        let down = |w: f32| match rounding {
            Rounding::HalfEven => w / scale < -0.5,
            Rounding::HalfAway => w / scale <= -0.5,
            Rounding::HalfUp => w / scale + 0.5 < 0.0,
        };
        let (mut high, mut low) = (scale / 2.0, -scale / 2.0);
        while up(high) {
            high = high.next_down();
        }
        while !up(high.next_up()) {
            high = high.next_up();
        }
        while down(low) {
            low = low.next_up();
        }
        while !down(low.next_down()) {
            low = low.next_down();
        }
        Self { low, high }
    }
}

/// The loops. The default bodies are the scalar oracle; an override must return the same bits.
///
/// `h`, if given, is the importance of each weight and has the length of `w`.
pub trait Ops: Sync {
    /// One pass of statistics.
    fn moments(&self, w: &[f32]) -> Moments {
        moments(w)
    }

    /// The part of [`Ops::moments`] that most rules for one trit plane need.
    fn magnitudes(&self, w: &[f32]) -> Magnitudes {
        magnitudes(w)
    }

    /// Appends [`Ops::magnitudes`] of each run of `width` weights; the last may be shorter.
    fn magnitudes_each(&self, w: &[f32], width: usize, out: &mut Vec<Magnitudes>) {
        magnitudes_each(w, width, out);
    }

    /// Appends the keys in `(low, high]`, in order.
    fn inside(&self, w: &[f32], key: Key, low: f32, high: f32, out: &mut Vec<f32>) {
        inside(w, key, low, high, out);
    }

    /// Weighted count and sum over the weights whose key is greater than `t`.
    fn above(&self, w: &[f32], h: Option<&[f32]>, key: Key, t: f32) -> Above {
        above(w, h, key, t)
    }

    /// [`Ops::above`] for two thresholds in one pass, all weights equally important.
    fn above_both(&self, w: &[f32], key: Key, t: [f32; 2]) -> [Above; 2] {
        above_both(w, key, t)
    }

    /// Σ h·(w − ŵ)² of a uniform quantizer.
    fn uniform_error(&self, w: &[f32], h: Option<&[f32]>, quantizer: &Uniform) -> f64 {
        uniform_error(w, h, quantizer)
    }

    /// `out = [w > high] − [w < low]`.
    fn encode_cut(&self, w: &[f32], cuts: Cuts, out: &mut [i8]) {
        encode_cut(w, cuts, out);
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

/// Sums lanes by halves: lane i and lane i + 8, then i and i + 4, and so on.
#[inline(always)]
fn total(mut lanes: [f64; LANES]) -> f64 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
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
        min_nonzero[lane] = if a < min_nonzero[lane] {
            a
        } else {
            min_nonzero[lane]
        };
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

/// Body of [`Ops::magnitudes`].
#[inline(always)]
pub fn magnitudes(w: &[f32]) -> Magnitudes {
    let mut sum = [0.0f64; LANES];
    let mut max = [0.0f32; LANES];
    let (chunks, tail) = w.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            sum[lane] += f64::from(chunk[lane]).abs();
        }
        for lane in 0..LANES {
            let a = chunk[lane].abs();
            max[lane] = if a > max[lane] { a } else { max[lane] };
        }
    }
    for (lane, &w) in tail.iter().enumerate() {
        sum[lane] += f64::from(w).abs();
        max[lane] = if w.abs() > max[lane] {
            w.abs()
        } else {
            max[lane]
        };
    }
    let max = max.into_iter().fold(0.0, f32::max);
    let mut ternary = true;
    for &w in tail {
        ternary &= (w == 0.0) | (w.abs() == max);
    }
    for chunk in chunks {
        if !ternary {
            break;
        }
        for &w in chunk {
            ternary &= (w == 0.0) | (w.abs() == max);
        }
    }
    Magnitudes {
        count: w.len() as u64,
        sum: total(sum),
        max,
        ternary,
    }
}

/// Body of [`Ops::magnitudes_each`].
#[inline(always)]
pub fn magnitudes_each(w: &[f32], width: usize, out: &mut Vec<Magnitudes>) {
    for w in w.chunks(width) {
        out.push(magnitudes(w));
    }
}

/// Body of [`Ops::inside`].
#[inline(always)]
pub fn inside(w: &[f32], key: Key, low: f32, high: f32, out: &mut Vec<f32>) {
    for w in w.chunks(LANES) {
        // No branch on the keys: it would often be mispredicted.
        let (mut found, mut count) = ([0.0; LANES], 0);
        for &w in w {
            let u = key.apply(w);
            found[count] = u;
            count += usize::from((low < u) & (u <= high));
        }
        out.extend_from_slice(&found[..count]);
    }
}

/// Body of [`Ops::above_both`].
#[inline(always)]
pub fn above_both(w: &[f32], key: Key, t: [f32; 2]) -> [Above; 2] {
    let mut count = [[0u32; LANES]; 2];
    let mut sum = [[0.0f64; LANES]; 2];
    let (chunks, tail) = w.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..2 {
            for lane in 0..LANES {
                let u = key.apply(chunk[lane]);
                count[i][lane] += u32::from(u > t[i]);
            }
            for lane in 0..LANES {
                let u = key.apply(chunk[lane]);
                sum[i][lane] += f64::from(if u > t[i] { u } else { 0.0 });
            }
        }
    }
    for (lane, &w) in tail.iter().enumerate() {
        for i in 0..2 {
            let u = key.apply(w);
            count[i][lane] += u32::from(u > t[i]);
            sum[i][lane] += f64::from(if u > t[i] { u } else { 0.0 });
        }
    }
    std::array::from_fn(|i| {
        let count: u64 = count[i].iter().map(|&c| u64::from(c)).sum();
        Above {
            count,
            weight: count as f64,
            sum: total(sum[i]),
        }
    })
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
                let u = key.apply(w);
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
            Above {
                count,
                weight: count as f64,
                sum: total(sum),
            }
        }
        Some(h) => {
            let mut add = |lane: usize, w: f32, h: f32| {
                let u = key.apply(w);
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
            Above {
                count: count.iter().map(|&c| u64::from(c)).sum(),
                weight: total(weight),
                sum: total(sum),
            }
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
pub fn encode_cut(w: &[f32], cuts: Cuts, out: &mut [i8]) {
    for (q, &w) in out.iter_mut().zip(w) {
        *q = i8::from(w > cuts.high) - i8::from(w < cuts.low);
    }
}

/// Body of [`Ops::encode_uniform`].
#[inline(always)]
pub fn encode_uniform(w: &[f32], quantizer: &Uniform, out: &mut [i8]) {
    for (q, &w) in out.iter_mut().zip(w) {
        *q = quantizer.value(w) as i8;
    }
}
