//! Quantization: weights to packed ternary codes, activations to int8.

use super::data::{kernels, same, weights};
use super::rivals;
use crate::case::{Case, Contender, PlannedCase};
use crate::ceiling::Ceiling;
use crate::results::RateUnit;
use crate::selection::{OperationGroup, Rivals};
use crate::testbed::Testbed;
use anyhow::Result;
use bitnet_core::activation::{self, ActivationGranularity, ActivationMethod};
use bitnet_core::ops::Scalar;
use bitnet_core::scheme::{Rounding, Threshold};
use bitnet_core::{Granularity, Scheme, pack};
use bitnet_kernels::stream::{self, FloatWeights, quantize_token};
use std::sync::{Arc, Mutex, PoisonError};

/// Columns of the weights.
const COLS: usize = 4096;
/// Weights of a call, 64 MiB in f32.
const MATRIX: usize = 4096 * COLS;
/// Activations per token.
const TOKEN: usize = 2560;

pub(super) fn plan(rivals: Rivals) -> Vec<PlannedCase> {
    let ternary = [
        (
            "absmean, one scale, to two-bit",
            Threshold::Absmean,
            Granularity::Tensor,
            2,
        ),
        (
            "absmean, a scale for each row, to two-bit",
            Threshold::Absmean,
            Granularity::Channel,
            1,
        ),
        (
            "absmean, groups of 128, to two-bit",
            Threshold::Absmean,
            Granularity::Group(128),
            1,
        ),
        (
            "optimal, a scale for each row, to two-bit",
            Threshold::Optimal,
            Granularity::Channel,
            1,
        ),
    ];
    let ternary = ternary
        .into_iter()
        .map(|(name, threshold, granularity, passes)| {
            let scheme = Scheme::ternary(threshold).with_granularity(granularity);
            PlannedCase::new(OperationGroup::Quantization, name, move |testbed| {
                ternary_case(name, scheme, passes, rivals, testbed)
            })
        });
    let tokens = "absmax int8, a scale for each token";
    ternary
        .chain([PlannedCase::new(
            OperationGroup::Quantization,
            tokens,
            move |testbed| tokens_case(tokens, rivals, testbed),
        )])
        .collect()
}

/// Weights from memory to packed codes. The algorithm reads them `passes` times.
fn ternary_case(
    name: &str,
    scheme: Scheme,
    passes: usize,
    rivals: Rivals,
    testbed: &Testbed,
) -> Result<Case> {
    let rows = MATRIX.min(testbed.working_set() / 4).div_ceil(COLS);
    let matrix = weights(rows * COLS);
    let layout = pack::by_name("two-bit")?;
    let expected = bitnet_core::quantize::quantize(&Scalar, &matrix, rows, COLS, &scheme, None)?;
    let mut bytes = vec![];
    layout.pack_into(
        &expected.spec,
        &expected.values,
        &expected.scales,
        &mut bytes,
    )?;
    let expected = Arc::new((bytes, expected.scales));
    let data =
        Arc::new(matrix.repeat((testbed.working_set() / size_of_val(matrix.as_slice())).max(1)));

    let mut contenders = vec![];
    for kernels in kernels(rivals) {
        let (data, expected, pool) = (
            Arc::clone(&data),
            Arc::clone(&expected),
            Arc::clone(testbed.pool()),
        );
        let call =
            move |(at, packed): &mut (usize, Option<bitnet_core::Result<stream::PackedMatrix>>)| {
                let w = FloatWeights::F32(&data[*at..][..rows * COLS]);
                *packed = Some(stream::quantize(
                    kernels, &pool, w, rows, COLS, &scheme, layout,
                ));
                *at = (*at + rows * COLS) % data.len();
            };
        let check =
            move |(_, packed): &(usize, Option<bitnet_core::Result<stream::PackedMatrix>>)| {
                let packed = packed
                    .as_ref()
                    .ok_or("no result")?
                    .as_ref()
                    .map_err(ToString::to_string)?;
                same("packed bytes", &expected.0, &packed.bytes)?;
                same("scales", &expected.1, &packed.scales)
            };
        let contender =
            Contender::new(format!("bitnet {}", kernels.isa()), (0, None), call, check).ours();
        contenders.push(contender.limited(Ceiling::MemoryRead, passes * 4 * rows * COLS));
    }
    if rivals == Rivals::All {
        let candle = rivals::quantization(&data, rows * COLS, COLS)?;
        contenders.extend(
            candle
                .into_iter()
                .map(|c| c.limited(Ceiling::MemoryRead, 4 * rows * COLS)),
        );
    }
    Ok(Case {
        group: OperationGroup::Quantization,
        operation: name.into(),
        shape: format!("{rows}×{COLS} f32 from memory"),
        threads: testbed.pool().threads(),
        unit: RateUnit::Bytes,
        amount: (4 * rows * COLS) as f64,
        contenders,
    })
}

/// Activations of some tokens, their int8 values and their scales.
type Tokens = Mutex<(Vec<f32>, Vec<i8>, Vec<f32>)>;

/// Tokens in L2 to int8. Each thread has its own tokens.
fn tokens_case(name: &str, rivals: Rivals, testbed: &Testbed) -> Result<Case> {
    let (threads, tokens) = (
        testbed.pool().threads(),
        (testbed.in_l2() / (4 * TOKEN)).max(1),
    );
    let x = Arc::new(weights(tokens * TOKEN));
    let expected = activation::quantize(
        &x,
        TOKEN,
        ActivationMethod::Int8,
        ActivationGranularity::Token,
        Rounding::HalfEven,
    )?;
    let expected = Arc::new(expected);
    let contender = |kernels: bitnet_kernels::Kernels| {
        let (x, expected, pool) = (
            Arc::clone(&x),
            Arc::clone(&expected),
            Arc::clone(testbed.pool()),
        );
        let parts: Vec<_> = (0..threads)
            .map(|_| Mutex::new((x.to_vec(), vec![0i8; x.len()], vec![f32::NAN; tokens])))
            .collect();
        let call = move |parts: &mut Vec<Tokens>| {
            pool.run(threads, |part| {
                let (x, q, scales) =
                    &mut *parts[part].lock().unwrap_or_else(PoisonError::into_inner);
                for ((x, q), scale) in x.chunks(TOKEN).zip(q.chunks_mut(TOKEN)).zip(scales) {
                    *scale =
                        quantize_token(kernels, x, TOKEN, TOKEN, q, &mut [0]).unwrap_or(f32::NAN);
                }
            });
        };
        let check = move |parts: &Vec<Tokens>| {
            parts.iter().try_for_each(|part| {
                let (_, q, scales) = &*part.lock().unwrap_or_else(PoisonError::into_inner);
                same("values", &expected.values, q)?;
                same("scales", &expected.scales, scales)
            })
        };
        let read = 4 * threads * tokens * TOKEN;
        Contender::new(format!("bitnet {}", kernels.isa()), parts, call, check)
            .ours()
            .limited(Ceiling::L2Read, read)
    };
    Ok(Case {
        group: OperationGroup::Quantization,
        operation: name.into(),
        shape: format!("rows of {TOKEN} f32 in L2"),
        threads,
        unit: RateUnit::Bytes,
        amount: (4 * threads * tokens * TOKEN) as f64,
        contenders: kernels(rivals).into_iter().map(contender).collect(),
    })
}
