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

mod loops;

pub use loops::{Adam, Decay, Sgd};
pub(crate) use loops::{adam, descend, sgd, sum_squares};

use crate::Kernels;

impl Kernels {
    /// Gradient descent of `w` along `g`, with the velocities that earlier steps left. Without a
    /// velocity (an empty slice) there is no momentum.
    ///
    /// ```
    /// use bitnet_kernels::{Kernels, update::{Decay, Sgd}};
    /// let decay = Decay { scale: 1.0, coupled: 0.0, decay: 1.0 };
    /// let step = Sgd { decay, rate: 0.5, momentum: 0.9, nesterov: false };
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
            return self.table.sgd_step(w, g, step);
        }
        assert_eq!(w.len(), velocity.len(), "as many velocities as weights");
        self.table.sgd_momentum_step(w, g, velocity, step);
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
        self.table.adam_step(w, g, m, v, step);
    }

    /// Σ x², summed in f64 over 16 strided partial sums.
    pub fn sum_squares(&self, x: &[f32]) -> f64 {
        self.table.sum_squares(x)
    }
}
