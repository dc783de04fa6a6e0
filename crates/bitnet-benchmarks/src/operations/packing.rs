//! Values to packed bytes.

use super::{Case, Contender, Group, Planned, Rivals, kernels, trits};
use crate::machine::{Ceiling, Machine};
use crate::results::Unit;
use anyhow::Result;
use bitnet_core::{Granularity, MatrixSpec, Precision, pack};
use bitnet_kernels::stream;
use std::sync::Arc;

/// Columns of the matrix.
const COLS: usize = 2560;

pub(super) fn plan(rivals: Rivals) -> Vec<Planned> {
    let planned = |layout: &'static str| {
        Planned::new(Group::Packing, format!("i8 to {layout}"), move |machine| {
            case(layout, rivals, machine)
        })
    };
    ["two-bit", "base-3"].into_iter().map(planned).collect()
}

fn case(layout: &str, rivals: Rivals, machine: &Machine) -> Result<Case> {
    let threads = machine.pool().threads();
    let rows = (machine.in_l2() * threads / COLS).max(1);
    let spec = MatrixSpec::new(rows, COLS, Precision::Ternary, Granularity::Tensor);
    let (layout, values) = (pack::by_name(layout)?, Arc::new(trits(rows * COLS)));
    let mut expected = vec![];
    layout.pack_into(&spec, &values, &[1.0], &mut expected)?;
    let expected = Arc::new(expected);
    let contender = |kernels: bitnet_kernels::Kernels| {
        let (values, expected, spec, pool) = (
            Arc::clone(&values),
            Arc::clone(&expected),
            spec.clone(),
            Arc::clone(machine.pool()),
        );
        let call = move |(result, bytes): &mut (bitnet_core::Result<()>, Vec<u8>)| {
            bytes.clear();
            *result = stream::pack(kernels, &pool, layout, &spec, &values, &[1.0], bytes);
        };
        let check = move |(result, bytes): &(bitnet_core::Result<()>, Vec<u8>)| {
            result.as_ref().map_err(ToString::to_string)?;
            super::same("packed bytes", &expected, bytes)
        };
        let contender = Contender::new(
            format!("bitnet {}", kernels.isa()),
            (Ok(()), vec![]),
            call,
            check,
        );
        contender.ours().limited(Ceiling::L2Read, rows * COLS)
    };
    Ok(Case {
        group: Group::Packing,
        operation: format!("i8 to {}", layout.name()),
        shape: format!("{rows}×{COLS} i8 in L2"),
        threads,
        unit: Unit::Bytes,
        amount: (rows * COLS) as f64,
        contenders: kernels(rivals).into_iter().map(contender).collect(),
    })
}
