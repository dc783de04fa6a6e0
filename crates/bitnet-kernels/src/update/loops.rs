//! The loops of optimizer steps and their parameters: see [`update`](crate::update).

use bitnet_core::ops::LANES;

/// Factors of gradient and weight.
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
    /// Applied to gradient and weight first.
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
    /// Applied to gradient and weight first.
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
pub(crate) fn sgd(w: &mut [f32], g: &[f32], velocity: &mut [f32], step: &Sgd) {
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
pub(crate) fn descend(w: &mut [f32], g: &[f32], step: &Sgd) {
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
pub(crate) fn adam(w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], step: &Adam) {
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
pub(crate) fn sum_squares(x: &[f32]) -> f64 {
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
