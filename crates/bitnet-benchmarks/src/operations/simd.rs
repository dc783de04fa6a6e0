//! Unpacking: packed bytes to values and to floats.

use super::data::{kernels, same, trits};
use super::rivals;
use crate::case::{Case, Contender, PlannedCase};
use crate::ceiling::Ceiling;
use crate::results::RateUnit;
use crate::selection::{OperationGroup, Rivals};
use crate::testbed::Testbed;
use anyhow::Result;
use bitnet_core::pack::{self, Layout};
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision, ScaleDtype};
use bitnet_kernels::{Kernels, stream};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

/// Columns of the matrix.
const COLS: usize = 2560;
/// Bytes of the values of a matrix that goes to memory.
const LARGE: usize = 64 << 20;

/// Result of unpacking: the scales, if the layout stores them.
type UnpackResult = bitnet_core::Result<Option<Vec<f32>>>;

/// The destination of the results.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Destination {
    L2,
    Memory,
}

pub(super) fn plan(rivals: Rivals) -> Vec<PlannedCase> {
    let unpack = [
        ("two-bit", Destination::L2),
        ("two-bit", Destination::Memory),
        ("base-3", Destination::L2),
        ("base-3", Destination::Memory),
        ("tq1_0", Destination::L2),
        ("tq2_0", Destination::L2),
    ];
    let unpack = unpack.into_iter().map(|(layout, to)| {
        PlannedCase::new(
            OperationGroup::Simd,
            format!("{layout} to i8, {to:?}"),
            move |testbed| unpack_case(layout, to, rivals, testbed),
        )
    });
    let dequantize = ["two-bit", "base-3"].into_iter().map(|layout| {
        PlannedCase::new(
            OperationGroup::Simd,
            format!("{layout} to f32"),
            move |testbed| dequantize_case(layout, rivals, testbed),
        )
    });
    unpack.chain(dequantize).collect()
}

/// A ternary matrix and its packed bytes.
fn packed(layout: &dyn Layout, rows: usize) -> Result<(Matrix, Vec<u8>)> {
    // Block types carry a scale in f16 for each block of 256.
    let spec = if layout.stores_scales() {
        MatrixSpec {
            scale_dtype: ScaleDtype::F16,
            ..MatrixSpec::new(rows, COLS, Precision::Ternary, Granularity::Group(256))
        }
    } else {
        MatrixSpec::new(rows, COLS, Precision::Ternary, Granularity::Channel)
    };
    let scales = (0..spec.scales_len())
        .map(|i| 0.25 + (i % 7) as f32 * 0.125)
        .collect();
    let matrix = Matrix {
        values: trits(rows * COLS),
        scales,
        zero_points: vec![],
        spec,
    };
    let mut bytes = vec![];
    layout.pack_into(&matrix.spec, &matrix.values, &matrix.scales, &mut bytes)?;
    Ok((matrix, bytes))
}

/// Packed bytes to values in L2 or memory.
fn unpack_case(layout: &str, to: Destination, rivals: Rivals, testbed: &Testbed) -> Result<Case> {
    let threads = testbed.pool().threads();
    let rows = match to {
        Destination::L2 => testbed.in_l2() * threads / COLS,
        Destination::Memory => LARGE.min(testbed.working_set()) / COLS,
    };
    let rows = rows.max(1);
    let layout = pack::by_name(layout)?;
    let (matrix, bytes) = packed(layout, rows)?;
    let (matrix, bytes) = (Arc::new(matrix), Arc::new(bytes));
    let (copies, place, ceiling) = match to {
        Destination::L2 => (1, "L2", Ceiling::L2Write),
        Destination::Memory => {
            let copies = (testbed.working_set() / (rows * COLS)).max(1);
            (copies, "memory", Ceiling::MemoryStream)
        }
    };
    // The contenders share the outputs: each writes the same values and is checked before the next.
    let outputs = Rc::new(RefCell::new(vec![vec![9i8; rows * COLS]; copies]));
    let contender = |kernels: Kernels| {
        let (matrix, bytes, pool) = (
            Arc::clone(&matrix),
            Arc::clone(&bytes),
            Arc::clone(testbed.pool()),
        );
        let (spec, outputs) = (matrix.spec.clone(), Rc::clone(&outputs));
        let written = Rc::clone(&outputs);
        let call = move |(result, at): &mut (UnpackResult, usize)| {
            *at = (*at + 1) % copies;
            let out = &mut outputs.borrow_mut()[*at];
            *result = stream::unpack(kernels, &pool, layout, &spec, &bytes, out);
        };
        let check = move |(result, at): &(UnpackResult, usize)| {
            let scales = result.as_ref().map_err(ToString::to_string)?;
            if let Some(scales) = scales {
                same("scales", &matrix.scales, scales)?;
            }
            let out = &mut written.borrow_mut()[*at];
            same("values", &matrix.values, out)?;
            // Clears the result, so that the next contender cannot pass with it.
            out.fill(9);
            Ok(())
        };
        Contender::new(
            format!("bitnet {}", kernels.isa()),
            (Ok(None), 0),
            call,
            check,
        )
        .ours()
        .limited(ceiling, rows * COLS)
    };
    Ok(Case {
        group: OperationGroup::Simd,
        operation: format!("{} to i8", layout.name()),
        shape: format!("{rows}×{COLS} i8 to {place}"),
        threads,
        unit: RateUnit::Bytes,
        amount: (rows * COLS) as f64,
        contenders: kernels(rivals).into_iter().map(contender).collect(),
    })
}

/// Packed bytes to floats in L2.
fn dequantize_case(layout: &str, rivals: Rivals, testbed: &Testbed) -> Result<Case> {
    let threads = testbed.pool().threads();
    let rows = (testbed.in_l2() * threads / (4 * COLS)).max(1);
    let layout = pack::by_name(layout)?;
    let (matrix, bytes) = packed(layout, rows)?;
    let expected = Arc::new(matrix.dequantize());
    let (matrix, bytes) = (Arc::new(matrix), Arc::new(bytes));
    let contender = |kernels: Kernels| {
        let (matrix, bytes, expected, pool) = (
            Arc::clone(&matrix),
            Arc::clone(&bytes),
            Arc::clone(&expected),
            Arc::clone(testbed.pool()),
        );
        let call = move |(result, out): &mut (bitnet_core::Result<()>, Vec<f32>)| {
            *result = stream::dequantize(
                kernels,
                &pool,
                layout,
                &matrix.spec,
                &bytes,
                &matrix.scales,
                out,
            );
        };
        let check = move |(result, out): &(bitnet_core::Result<()>, Vec<f32>)| {
            result.as_ref().map_err(ToString::to_string)?;
            same("weights", &expected, out)
        };
        let state = (Ok(()), vec![f32::NAN; rows * COLS]);
        let contender = Contender::new(format!("bitnet {}", kernels.isa()), state, call, check);
        contender.ours().limited(Ceiling::L2Write, 4 * rows * COLS)
    };
    let mut contenders: Vec<_> = kernels(rivals).into_iter().map(contender).collect();
    if rivals == Rivals::All {
        contenders.extend(rivals::dequantization(&expected, COLS)?);
    }
    Ok(Case {
        group: OperationGroup::Simd,
        operation: format!("{} to f32", layout.name()),
        shape: format!("{rows}×{COLS} f32 to L2"),
        threads,
        unit: RateUnit::Bytes,
        amount: (4 * rows * COLS) as f64,
        contenders,
    })
}
