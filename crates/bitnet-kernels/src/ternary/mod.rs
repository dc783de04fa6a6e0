//! W1.58A8: ternary weights times int8 activations, from a private kernel layout.
//!
//! ```text
//! Y[M, N] = s_x[m] · Σ_g s_w[n, g] · Σ_{k in g} q[n, k] · x[m, k]  (+ bias[n])
//! ```
//!
//! The inner sums are exact in i32; the rest is done in f32 in the order of the groups, so every instruction set and every number of
//! threads gives the same bits. Weights are stored as codes `q + 1` in 0 … 2, so that unsigned × signed byte products can be used: sums
//! begin at `−Σ x` instead of 0.
//!
//! # Kernel layout
//!
//! Rows go in panels of [`PANEL`] = 64, columns in steps of [`STEP`] = 16. A panel is a run of steps, a step is 256 bytes: lane r (4 bytes)
//! belongs to row r of the panel, and field f (bits 2f, 2f+1) of its byte b to column 4f + b of the step.
//!
//! ```text
//! byte  4r + b of a step, bits 2f..2f+2  =  code of row r, column 4f + b        r < 64, b < 4, f < 4
//! ```
//!
//! So a load holds 16 columns of its rows, an `and` leaves one field in place (the sums of the upper three are multiples of a power of 4
//! and are shifted down at the end), and the activations that meet a field are the same 4 bytes for every lane. Each scale group begins at
//! a new step; missing rows and columns hold code 1, the value 0.

mod activations;
mod drive;
mod prepacked;
mod tiles;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use activations::Activations;
pub use prepacked::Prepacked;

/// Rows of a panel.
pub const PANEL: usize = 64;
/// Columns of a step.
pub const STEP: usize = 16;
/// Most columns of a matrix.
pub const MAX_COLS: usize = 1 << 22;

/// Bytes of a step: [`PANEL`] rows of [`STEP`] two-bit codes.
pub(crate) const STEP_BYTES: usize = PANEL * STEP / 4;
/// Bytes of a step with a code in each byte: for every four columns, the four codes of every row.
pub(crate) const STEP_CODES: usize = PANEL * STEP;

/// What a product adds to a sum at most, in magnitude: code 2 times −128.
pub(crate) const MAX_PRODUCT: i64 = 2 * 128;

// A sum begins at −Σx, at most 128 a column, and codes add at most `MAX_PRODUCT` a column.
const _: () = assert!(MAX_COLS as i64 * (128 + MAX_PRODUCT) <= i32::MAX as i64);
