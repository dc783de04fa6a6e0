//! Packed bytes to values and to floats.

use super::{Case, Contender, Group, Planned, Rivals, kernels, rivals, trits};
use crate::machine::{Ceiling, Machine};
use crate::results::Unit;
use anyhow::Result;
use bitnet_core::pack::{self, Layout};
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision, ScaleDtype};
use bitnet_kernels::stream;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

/// Columns of the matrix.
const COLS: usize = 2560;
/// Values of a matrix that no cache is to hold, in bytes.
const LARGE: usize = 64 << 20;

/// Where the results go.
#[derive(Debug, Clone, Copy, PartialEq)]
enum To {
    L2,
    Memory,
}

pub(super) fn plan(rivals: Rivals) -> Vec<Planned> {
    let unpack = [
        ("two-bit", To::L2),
        ("two-bit", To::Memory),
        ("base-3", To::L2),
        ("base-3", To::Memory),
        ("tq1_0", To::L2),
        ("tq2_0", To::L2),
    ];
    let unpack = unpack.into_iter().map(|(layout, to)| {
        Planned::new(
            Group::Simd,
            format!("{layout} to i8, {to:?}"),
            move |machine| unpack_case(layout, to, rivals, machine),
        )
    });
    let dequantize = ["two-bit", "base-3"].into_iter().map(|layout| {
        Planned::new(Group::Simd, format!("{layout} to f32"), move |machine| {
            dequantize_case(layout, rivals, machine)
        })
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

fn unpack_case(layout: &str, to: To, rivals: Rivals, machine: &Machine) -> Result<Case> {
    let threads = machine.pool().threads();
    let rows = match to {
        To::L2 => machine.in_l2() * threads / COLS,
        To::Memory => LARGE.min(machine.working_set()) / COLS,
    };
    let rows = rows.max(1);
    let layout = pack::by_name(layout)?;
    let (matrix, bytes) = packed(layout, rows)?;
    let (matrix, bytes) = (Arc::new(matrix), Arc::new(bytes));
    let copies = if to == To::L2 {
        1
    } else {
        (machine.working_set() / (rows * COLS)).max(1)
    };
    // One set of outputs for all, who write the same into it; `check` comes after each.
    let outputs = Rc::new(RefCell::new(vec![vec![9i8; rows * COLS]; copies]));
    let contender = |kernels: bitnet_kernels::Kernels| {
        let (matrix, bytes, pool) = (
            Arc::clone(&matrix),
            Arc::clone(&bytes),
            Arc::clone(machine.pool()),
        );
        let (spec, outputs, written) = (
            matrix.spec.clone(),
            Rc::clone(&outputs),
            Rc::clone(&outputs),
        );
        let call = move |(result, at): &mut (bitnet_core::Result<Option<Vec<f32>>>, usize)| {
            *at = (*at + 1) % copies;
            *result = stream::unpack(
                kernels,
                &pool,
                layout,
                &spec,
                &bytes,
                &mut outputs.borrow_mut()[*at],
            );
        };
        let check = move |(result, at): &(bitnet_core::Result<Option<Vec<f32>>>, usize)| {
            let scales = result.as_ref().map_err(ToString::to_string)?;
            scales.as_ref().map_or(Ok(()), |scales| {
                super::same("scales", &matrix.scales, scales)
            })?;
            super::same("values", &matrix.values, &written.borrow()[*at])?;
            // The next one is not to find this result there.
            written.borrow_mut()[*at].fill(9);
            Ok(())
        };
        let contender = Contender::new(
            format!("bitnet {}", kernels.isa()),
            (Ok(None), 0),
            call,
            check,
        )
        .ours();
        match to {
            To::L2 => contender.limited(Ceiling::L2Write, rows * COLS),
            To::Memory => contender.limited(Ceiling::MemoryStream, rows * COLS),
        }
    };
    Ok(Case {
        group: Group::Simd,
        operation: format!("{} to i8", layout.name()),
        shape: format!(
            "{rows}×{COLS} i8 to {}",
            if to == To::L2 { "L2" } else { "memory" }
        ),
        threads,
        unit: Unit::Bytes,
        amount: (rows * COLS) as f64,
        contenders: kernels(rivals).into_iter().map(contender).collect(),
    })
}

/// Packed bytes to floats in L2.
fn dequantize_case(layout: &str, rivals: Rivals, machine: &Machine) -> Result<Case> {
    let threads = machine.pool().threads();
    let rows = (machine.in_l2() * threads / (4 * COLS)).max(1);
    let layout = pack::by_name(layout)?;
    let (matrix, bytes) = packed(layout, rows)?;
    let expected = Arc::new(matrix.dequantize());
    let (matrix, bytes) = (Arc::new(matrix), Arc::new(bytes));
    let contender = |kernels: bitnet_kernels::Kernels| {
        let (matrix, bytes, expected, pool) = (
            Arc::clone(&matrix),
            Arc::clone(&bytes),
            Arc::clone(&expected),
            Arc::clone(machine.pool()),
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
            super::same("weights", &expected, out)
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
        group: Group::Simd,
        operation: format!("{} to f32", layout.name()),
        shape: format!("{rows}×{COLS} f32 to L2"),
        threads,
        unit: Unit::Bytes,
        amount: (4 * rows * COLS) as f64,
        contenders,
    })
}
