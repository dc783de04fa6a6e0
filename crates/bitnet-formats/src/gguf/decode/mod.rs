//! Tensor bytes to floats.
//!
//! Every decoder performs the f32 operations of ggml's reference in the same order, without fused
//! multiply-add, so that the results are bit for bit the same. NaN and infinite scales decode to
//! what the arithmetic gives. `value` below is the float, `d` and `m` are f16 numbers widened to
//! f32, `q` is an integer.

mod integers;
mod kquants;
mod legacy;
mod plain;
mod ternary;

pub use integers::{BlockIntegers, integers};

use super::GgmlType;
use super::error::{Error, Result};

type BlockDecoder = fn(&[u8], &mut [f32]);

fn decoder(ggml_type: GgmlType) -> Option<BlockDecoder> {
    Some(match ggml_type {
        GgmlType::F32 => plain::f32,
        GgmlType::F16 => plain::f16,
        GgmlType::Bf16 => plain::bf16,
        GgmlType::F64 => plain::f64,
        GgmlType::I8 => plain::i8,
        GgmlType::I16 => plain::i16,
        GgmlType::I32 => plain::i32,
        GgmlType::I64 => plain::i64,
        GgmlType::Q4_0 => legacy::q4_0,
        GgmlType::Q4_1 => legacy::q4_1,
        GgmlType::Q5_0 => legacy::q5_0,
        GgmlType::Q5_1 => legacy::q5_1,
        GgmlType::Q8_0 => legacy::q8_0,
        GgmlType::Q2K => kquants::q2_k,
        GgmlType::Q3K => kquants::q3_k,
        GgmlType::Q4K => kquants::q4_k,
        GgmlType::Q5K => kquants::q5_k,
        GgmlType::Q6K => kquants::q6_k,
        GgmlType::Tq1_0 => ternary::tq1_0,
        GgmlType::Tq2_0 => ternary::tq2_0,
        GgmlType::Q1_0 => ternary::q1_0,
        GgmlType::Q2_0 => ternary::q2::<18, 64>,
        GgmlType::Q2_0G128 | GgmlType::Pq2_0 => ternary::q2::<34, 128>,
        GgmlType::Ptq1_0 => ternary::ptq1_0,
        _ => return None,
    })
}

/// Whether [`decode`] knows the type.
pub fn has_decoder(ggml_type: GgmlType) -> bool {
    decoder(ggml_type).is_some()
}

/// Decodes `out.len()` values, a whole number of blocks: a tensor, some of its rows, or part of a
/// row.
///
/// F64 and the integers are rounded to the nearest f32.
///
/// # Errors
/// [`Error::NoDecoder`] for a type that is known by size only, [`Error::RowLength`] if `out` is not
/// a whole number of blocks, [`Error::Length`] if `bytes` does not hold exactly that many.
pub fn decode(ggml_type: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    let decoder = decoder(ggml_type).ok_or(Error::NoDecoder { ggml_type })?;
    // No type with a decoder has anything but blocks in its rows.
    let expected = ggml_type.row_bytes(out.len())?;
    if bytes.len() != expected {
        return Err(Error::Length {
            ggml_type,
            expected: expected as u64,
            got: bytes.len() as u64,
        });
    }
    decoder(bytes, out);
    Ok(())
}

/// Calls `block` with each block of `B` bytes and its `N` floats.
#[inline(always)]
fn for_blocks<const B: usize, const N: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; B], &mut [f32; N]),
) {
    for (bytes, out) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        block(bytes, out);
    }
}

/// The f16 number at byte `at`.
#[inline(always)]
fn half_at<const B: usize>(block: &[u8; B], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}
