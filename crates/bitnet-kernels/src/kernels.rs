//! The kernels of one instruction set, chosen at run time.

use crate::error::Error;
use crate::isa::Isa;
use crate::table::Table;
use bitnet_core::ops::{Above, Cuts, Key, Magnitudes, Moments, Ops, Uniform};
use std::fmt;

/// The kernels of one instruction set. Having a value proves that the machine runs it.
#[derive(Clone, Copy)]
pub struct Kernels {
    isa: Isa,
    pub(crate) table: &'static Table,
}

impl Kernels {
    /// The widest instruction set that the machine runs.
    ///
    /// # Panics
    /// Never: every machine runs [`Isa::Scalar`].
    pub fn detect() -> Self {
        Self::all().last().expect("every machine runs the baseline")
    }

    /// The one that `BITNET_ISA` names, else the widest that the machine runs.
    ///
    /// # Errors
    /// [`Error`] if the variable names nothing, or something that this machine does not run.
    pub fn from_env() -> Result<Self, Error> {
        match std::env::var("BITNET_ISA") {
            Ok(name) => {
                let isa = name.parse()?;
                Self::new(isa).ok_or(Error::Unavailable { isa })
            }
            Err(_) => Ok(Self::detect()),
        }
    }

    /// `None` if the machine does not run `isa`.
    pub fn new(isa: Isa) -> Option<Self> {
        isa.is_available().then(|| Self {
            isa,
            // SAFETY: `is_available` found every feature of the instruction set.
            table: unsafe { Table::of(isa) },
        })
    }

    /// One for each instruction set that the machine runs, narrow to wide.
    pub fn all() -> impl Iterator<Item = Self> {
        Isa::ALL.into_iter().filter_map(Self::new)
    }

    /// The instruction set that runs.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

impl PartialEq for Kernels {
    fn eq(&self, other: &Self) -> bool {
        self.isa == other.isa
    }
}

impl Eq for Kernels {}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernels").field("isa", &self.isa).finish()
    }
}

impl Ops for Kernels {
    fn moments(&self, w: &[f32]) -> Moments {
        self.table.moments(w)
    }

    fn magnitudes(&self, w: &[f32]) -> Magnitudes {
        self.table.magnitudes(w)
    }

    fn magnitudes_each(&self, w: &[f32], width: usize, out: &mut Vec<Magnitudes>) {
        self.table.magnitudes_each(w, width, out);
    }

    fn inside(&self, w: &[f32], key: Key, low: f32, high: f32, out: &mut Vec<f32>) {
        self.table.inside(w, key, low, high, out);
    }

    fn above_both(&self, w: &[f32], key: Key, t: [f32; 2]) -> [Above; 2] {
        self.table.above_both(w, key, t)
    }

    fn above(&self, w: &[f32], h: Option<&[f32]>, key: Key, t: f32) -> Above {
        self.table.above(w, h, key, t)
    }

    fn uniform_error(&self, w: &[f32], h: Option<&[f32]>, quantizer: &Uniform) -> f64 {
        self.table.uniform_error(w, h, quantizer)
    }

    fn encode_cut(&self, w: &[f32], cuts: Cuts, out: &mut [i8]) {
        self.table.encode_cut(w, cuts, out);
    }

    fn encode_uniform(&self, w: &[f32], quantizer: &Uniform, out: &mut [i8]) {
        self.table.encode_uniform(w, quantizer, out);
    }
}
