//! In-place steps of optimizers: one pass over weights, gradients and moments.
//!
//! ```text
//! g' = scale·g + coupled·w
//! sgd:   b ← momentum·b + g';   w ← decay·w − rate·(b, or g' + momentum·b where it looks ahead)
//! adam:  m ← m + (1 − β₁)(g' − m);   v ← β₂·v + (1 − β₂)·g'²;   w ← decay·w − rate·m / (√v·root + eps)
//! ```
//!
//! Everything is elementwise in f32 and in this order of operations, so the instruction set and the
//! way in which a tensor is cut for threads change no bit.

#[cfg(target_arch = "x86_64")]
use crate::Isa;
use crate::Kernels;

/// Strided partial sums of [`Kernels::sum_squares`].
const LANES: usize = 16;

/// What every element of a tensor's gradient and weight is multiplied with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decay {
    /// Of the gradient: clipping, accumulation.
    pub scale: f32,
    /// Of the weight in the gradient: L2 regularisation, coupled decay.
    pub coupled: f32,
    /// Of the weight before the step: 1 − rate · λ, decoupled decay.
    pub decay: f32,
}

/// Gradient descent with momentum.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sgd {
    /// What is done to gradient and weight first.
    pub decay: Decay,
    /// Learning rate.
    pub rate: f32,
    /// Share of the velocity that remains.
    pub momentum: f32,
    /// Whether the step looks ahead along the new velocity (Nesterov).
    pub nesterov: bool,
}

/// Adam and AdamW; the bias corrections are in `rate` and `root`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    /// What is done to gradient and weight first.
    pub decay: Decay,
    /// Learning rate / (1 − β₁ᵗ).
    pub rate: f32,
    /// 1 / √(1 − β₂ᵗ).
    pub root: f32,
    /// 1 − β₁: share of the gradient in the new first moment.
    pub new1: f32,
    /// β₂: share of the second moment that remains.
    pub beta2: f32,
    /// 1 − β₂, which is not rounded through β₂.
    pub new2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
}

#[inline(always)]
fn sgd(w: &mut [f32], g: &[f32], velocity: &mut [f32], step: &Sgd) {
    let Sgd {
        decay: Decay {
            scale,
            coupled,
            decay,
        },
        rate,
        momentum,
        nesterov,
    } = *step;
    for ((w, &g), b) in w.iter_mut().zip(g).zip(velocity) {
        let g = scale * g + coupled * *w;
        *b = momentum * *b + g;
        let d = if nesterov { g + momentum * *b } else { *b };
        *w = decay * *w - rate * d;
    }
}

#[inline(always)]
fn descend(w: &mut [f32], g: &[f32], step: &Sgd) {
    let Sgd {
        decay: Decay {
            scale,
            coupled,
            decay,
        },
        rate,
        ..
    } = *step;
    for (w, &g) in w.iter_mut().zip(g) {
        let g = scale * g + coupled * *w;
        *w = decay * *w - rate * g;
    }
}

#[inline(always)]
fn adam(w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: &Adam) {
    let Adam {
        decay: Decay {
            scale,
            coupled,
            decay,
        },
        rate,
        root,
        new1,
        beta2,
        new2,
        eps,
    } = *step;
    for (((w, &g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
        let g = scale * g + coupled * *w;
        *m += new1 * (g - *m);
        *v = beta2 * *v + new2 * (g * g);
        *w = decay * *w - rate * (*m / (v.sqrt() * root + eps));
    }
}

#[inline(always)]
fn sum_squares(x: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for chunk in whole {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(x) * f64::from(x);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// The loops under the target features of one instruction set.
macro_rules! compiled {
    ($isa:ident $(, $features:literal)?) => {
        mod $isa {
            use super::{Adam, Sgd};

            $(#[target_feature(enable = $features)])?
            pub(super) fn sgd(w: &mut [f32], g: &[f32], velocity: &mut [f32], step: &Sgd) {
                super::sgd(w, g, velocity, step);
            }

            $(#[target_feature(enable = $features)])?
            pub(super) fn descend(w: &mut [f32], g: &[f32], step: &Sgd) {
                super::descend(w, g, step);
            }

            $(#[target_feature(enable = $features)])?
            pub(super) fn adam(w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: &Adam) {
                super::adam(w, g, m, v, step);
            }

            $(#[target_feature(enable = $features)])?
            pub(super) fn sum_squares(x: &[f32]) -> f64 {
                super::sum_squares(x)
            }
        }
    };
}

compiled!(scalar);
#[cfg(target_arch = "x86_64")]
compiled!(avx2, "avx2");
#[cfg(target_arch = "x86_64")]
compiled!(avx512, "avx512f,avx512bw,avx512dq,avx512vl");

macro_rules! dispatch {
    ($self:ident, $loop:ident($($argument:expr),*)) => {
        match $self.isa() {
            // SAFETY: `Kernels::new` made this value after `Isa::is_available` found every feature
            // that the loop enables.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => unsafe { avx2::$loop($($argument),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Vbmi => unsafe { avx512::$loop($($argument),*) },
            _ => scalar::$loop($($argument),*),
        }
    };
}

impl Kernels {
    /// Gradient descent of `w` along `g`, with the velocities that earlier steps left. Without a
    /// velocity (an empty slice) there is no momentum.
    ///
    /// ```
    /// use bitnet_kernels::{Kernels, update::{Decay, Sgd}};
    /// let step = Sgd { decay: Decay { scale: 1.0, coupled: 0.0, decay: 1.0 }, rate: 0.5, momentum: 0.9, nesterov: false };
    /// let (mut w, mut velocity) = ([1.0], [0.0]);
    /// Kernels::detect().sgd(&mut w, &[0.5], &mut velocity, &step);
    /// assert_eq!((w, velocity), ([0.75], [0.5]));
    /// ```
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn sgd(&self, w: &mut [f32], g: &[f32], velocity: &mut [f32], step: &Sgd) {
        assert_eq!(w.len(), g.len(), "as many gradients as weights");
        if velocity.is_empty() {
            return dispatch!(self, descend(w, g, step));
        }
        assert_eq!(w.len(), velocity.len(), "as many velocities as weights");
        dispatch!(self, sgd(w, g, velocity, step));
    }

    /// A step of Adam of `w` along `g`, with the moments `m` and `v` that earlier steps left.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn adam(&self, w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: &Adam) {
        assert!(
            w.len() == g.len() && w.len() == m.len() && w.len() == v.len(),
            "as many gradients and moments as weights"
        );
        dispatch!(self, adam(w, g, m, v, step));
    }

    /// Σ x², summed in f64 over 16 strided partial sums.
    pub fn sum_squares(&self, x: &[f32]) -> f64 {
        dispatch!(self, sum_squares(x))
    }
}
