//! Packing: values to packed bytes.

use super::data::{kernels, same, trits};
use crate::case::{Case, Contender, PlannedCase};
use crate::ceiling::Ceiling;
use crate::results::RateUnit;
use crate::selection::{OperationGroup, Rivals};
use crate::testbed::Testbed;
use anyhow::Result;
use bitnet_core::{Granularity, MatrixSpec, Precision, pack};
use bitnet_kernels::stream;
use std::sync::Arc;

/// Columns of the matrix.
const COLS: usize = 2560;

pub(super) fn plan(rivals: Rivals) -> Vec<PlannedCase> {
    let planned = |layout: &'static str| {
        PlannedCase::new(
            OperationGroup::Packing,
            format!("i8 to {layout}"),
            move |testbed| case(layout, rivals, testbed),
        )
    };
    ["two-bit", "base-3"].into_iter().map(planned).collect()
}

fn case(layout: &str, rivals: Rivals, testbed: &Testbed) -> Result<Case> {
    let threads = testbed.pool().threads();
    let rows = (testbed.in_l2() * threads / COLS).max(1);
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
            Arc::clone(testbed.pool()),
        );
        let call = move |(result, bytes): &mut (bitnet_core::Result<()>, Vec<u8>)| {
            bytes.clear();
            *result = stream::pack(kernels, &pool, layout, &spec, &values, &[1.0], bytes);
        };
        let check = move |(result, bytes): &(bitnet_core::Result<()>, Vec<u8>)| {
            result.as_ref().map_err(ToString::to_string)?;
            same("packed bytes", &expected, bytes)
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
        group: OperationGroup::Packing,
        operation: format!("i8 to {}", layout.name()),
        shape: format!("{rows}×{COLS} i8 in L2"),
        threads,
        unit: RateUnit::Bytes,
        amount: (rows * COLS) as f64,
        contenders: kernels(rivals).into_iter().map(contender).collect(),
    })
}
