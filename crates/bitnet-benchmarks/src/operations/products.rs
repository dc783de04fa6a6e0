//! Matrix products: ternary weights with int8 activations (W1.58A8), other weights, and rivals.

use super::data::{kernels, trits};
use super::product::{ProductInputs, Reference, SCALES};
use super::rivals::{self, FROM_FLOATS};
use crate::case::{Case, Contender, Limit, PlannedCase};
use crate::ceiling::{Ceiling, dot_product};
use crate::results::RateUnit;
use crate::selection::{OperationGroup, Rivals, WeightShape};
use crate::testbed::Testbed;
use anyhow::Result;
use bitnet_core::random::nth;
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
use bitnet_kernels::machine::Instruction;
use bitnet_kernels::matmul::{Prepacked, PrepackedActivations, Stream};
use bitnet_kernels::{Isa, Kernels};
use std::sync::Arc;

/// Number of tokens from which on reading the weights is a small part of the work, so that one copy
/// of them suffices.
const MANY_TOKENS: usize = 32;
/// Limit on the multiply-adds of the scalar code, whose call would take seconds above it.
const MAX_SCALAR: usize = 1 << 32;

/// The ternary product of a shape, and with rivals also the product of other weights.
pub(super) fn plan(
    group: OperationGroup,
    shape: WeightShape,
    tokens: usize,
    rivals: Rivals,
) -> Vec<PlannedCase> {
    let planned = |what: &str, weights: ProductWeights| {
        let name = format!("{what}{shape}, M = {tokens}");
        PlannedCase::new(group, name, move |testbed| {
            case(group, shape, tokens, weights, testbed)
        })
    };
    let mut all = vec![planned("", ProductWeights::Ternary(rivals))];
    if rivals == Rivals::All {
        all.push(planned("other weights, ", ProductWeights::Others));
    }
    all
}

/// The weights of a case.
#[derive(Debug, Clone, Copy, PartialEq)]
enum ProductWeights {
    Ternary(Rivals),
    Others,
}

fn case(
    group: OperationGroup,
    shape: WeightShape,
    tokens: usize,
    weights: ProductWeights,
    testbed: &Testbed,
) -> Result<Case> {
    let WeightShape { n, k } = shape;
    // All contenders read from cache if L2 holds the two-bit weights.
    let l2 = testbed.l2() / 4 * 3;
    let hot = n * k / 4 <= l2;
    let cycle = if hot || tokens >= MANY_TOKENS {
        0
    } else {
        testbed.working_set()
    };
    // The largest value of each token is 127, so that quantizing its floats returns these values.
    let activation = |i: usize| {
        if i.is_multiple_of(k) {
            127
        } else {
            ((nth(i as u64, 0) % 255) as i16 - 127) as i8
        }
    };
    let product = Arc::new(ProductInputs {
        shape,
        tokens,
        weights: trits(n * k),
        activations: (0..tokens * k).map(activation).collect(),
        pool: Arc::clone(testbed.pool()),
        cycle,
        l2,
    });
    let (what, contenders) = match weights {
        ProductWeights::Ternary(Rivals::None) => ("W1.58A8", ours(&product, Rivals::None)?),
        ProductWeights::Ternary(Rivals::All) => {
            let mut contenders = ours(&product, Rivals::All)?;
            contenders.extend(rivals::products(&product)?);
            ("W1.58A8", contenders)
        }
        ProductWeights::Others => ("other weights,", others(&product)?),
    };
    let place = if cycle > 0 {
        ", weights from memory"
    } else {
        ", weights in cache"
    };
    let (operation, unit) = match group {
        OperationGroup::Gemv => (format!("{what} GEMV"), RateUnit::Weights),
        _ => (format!("{what} GEMM, M = {tokens}"), RateUnit::Macs),
    };
    let threads = testbed.pool().threads();
    Ok(Case {
        group,
        operation,
        shape: format!("{shape}{place}"),
        threads,
        unit,
        amount: product.macs() as f64,
        contenders,
    })
}

/// A product with weights in the kernel layout.
struct PrepackedProduct {
    copies: Vec<Prepacked>,
    x: PrepackedActivations,
    reference: Reference,
    /// The ceiling on reading the weights.
    reading: Option<Limit>,
    /// Multiply-adds of a product.
    macs: usize,
}

impl PrepackedProduct {
    /// Weights of `precision` in one or several planes, times int8 activations.
    fn new(
        product: &ProductInputs,
        precision: Precision,
        planes: usize,
        stream: Stream,
    ) -> Result<Self> {
        let WeightShape { n, k } = product.shape;
        let spec = MatrixSpec {
            planes,
            ..MatrixSpec::new(n, k, precision, Granularity::Tensor)
        };
        let scales: Vec<f32> = (0..spec.scales_len())
            .map(|plane| SCALES[0] / (1 << (2 * plane)) as f32)
            .collect();
        let values = match (precision, planes) {
            (Precision::Ternary, 1) => product.weights.clone(),
            _ => values(precision, planes * n * k),
        };
        let matrix = Matrix {
            values,
            scales,
            zero_points: vec![],
            spec,
        };
        let packed = Prepacked::with_stream(&matrix, stream, &product.pool)?;
        let x = PrepackedActivations::from_values(
            &product.activations,
            &vec![SCALES[1]; product.tokens],
            &packed,
        )?;
        // Integer sums are exact; only the scaling after them rounds.
        let reference = Reference::new(product, |row, token| {
            let x = &product.activations[token * k..][..k];
            let planes = matrix.scales.iter().enumerate().map(|(plane, &scale)| {
                let sum: i32 = matrix.values[(plane * n + row) * k..][..k]
                    .iter()
                    .zip(x)
                    .map(|(&w, &x)| i32::from(w) * i32::from(x))
                    .sum();
                f64::from(scale) * f64::from(SCALES[1]) * f64::from(sum)
            });
            let (y, size) =
                planes.fold((0.0, 0.0), |(y, size), term| (y + term, size + term.abs()));
            (
                y,
                (3 + matrix.spec.planes) as f64 * f64::from(f32::EPSILON) * size,
            )
        });
        let bytes = packed.bytes();
        Ok(Self {
            copies: vec![packed; product.copies(bytes)],
            x,
            reference,
            reading: product.reading(bytes),
            macs: planes * product.macs(),
        })
    }

    /// The product by `kernels`. With float `activations`, every call quantizes them first.
    fn contender(
        self: &Arc<Self>,
        name: String,
        product: &ProductInputs,
        kernels: Kernels,
        activations: Option<Vec<f32>>,
    ) -> Contender {
        let (prepacked, checked, pool) = (
            Arc::clone(self),
            Arc::clone(self),
            Arc::clone(&product.pool),
        );
        let output = (0, vec![f32::NAN; product.tokens * product.shape.n]);
        let call = move |(at, y): &mut (usize, Vec<f32>)| {
            let w = &prepacked.copies[*at];
            match &activations {
                Some(x) => {
                    let x = PrepackedActivations::quantize(&kernels, x, w)
                        .expect("finite activations of whole rows");
                    kernels.matmul(&pool, w, &x, None, y);
                }
                None => kernels.matmul(&pool, w, &prepacked.x, None, y),
            }
            *at = (*at + 1) % prepacked.copies.len();
        };
        let multiplying = dot_product(kernels.isa()).map(|i| Limit {
            ceiling: Ceiling::Peak(i),
            cost: self.macs as f64,
        });
        Contender::new(name, output, call, move |(_, y)| checked.reference.check(y))
            .ours()
            .limits([self.reading, multiplying])
    }
}

/// `n` values of a precision, uniformly distributed.
fn values(precision: Precision, n: usize) -> Vec<i8> {
    let (low, high) = precision.range();
    // Binary has no 0.
    let step = if precision == Precision::Binary { 2 } else { 1 };
    let count = (i16::from(high) - i16::from(low)) / step + 1;
    (0..n)
        .map(|i| (i16::from(low) + step * (nth(i as u64, 0) % count as u64) as i16) as i8)
        .collect()
}

/// Our kernels: the widest; the widest from float activations, which rivals quantize too, and with
/// 1.6 bits per weight; then the narrower ones.
fn ours(product: &Arc<ProductInputs>, rivals: Rivals) -> Result<Vec<Contender>> {
    let two_bit = Arc::new(PrepackedProduct::new(
        product,
        Precision::Ternary,
        1,
        Stream::TwoBit,
    )?);
    let trits = Arc::new(PrepackedProduct::new(
        product,
        Precision::Ternary,
        1,
        Stream::Trits,
    )?);
    let mut kernels = kernels(rivals);
    kernels.retain(|k| k.isa() != Isa::Scalar || product.macs() <= MAX_SCALAR);
    let named = |kernels: Kernels| {
        two_bit.contender(format!("bitnet {}", kernels.isa()), product, kernels, None)
    };
    let mut contenders: Vec<_> = kernels.iter().map(|&kernels| named(kernels)).collect();
    let widest = kernels[0];
    let name = |how: &str| format!("bitnet {}, {how}", widest.isa());
    contenders.insert(
        FROM_FLOATS,
        two_bit.contender(
            name("from f32"),
            product,
            widest,
            Some(product.float_activations()),
        ),
    );
    contenders.insert(
        FROM_FLOATS + 1,
        trits.contender(name("1.6 bits"), product, widest, None),
    );
    Ok(contenders)
}

/// Weights other than one plane of trits, and float activations, by our widest kernels.
fn others(product: &Arc<ProductInputs>) -> Result<Vec<Contender>> {
    let kernels = Kernels::detect();
    let formats = [
        ("ternary", Precision::Ternary, 1),
        ("2 trit planes", Precision::Ternary, 2),
        ("binary", Precision::Binary, 1),
        ("int2", Precision::Int2, 1),
        ("int4", Precision::Int4, 1),
        ("int8", Precision::Int8, 1),
    ];
    let mut contenders = vec![];
    for (name, precision, planes) in formats {
        let prepacked = Arc::new(PrepackedProduct::new(
            product,
            precision,
            planes,
            Stream::TwoBit,
        )?);
        contenders.push(prepacked.contender(
            format!("bitnet {}, {name} × int8", kernels.isa()),
            product,
            kernels,
            None,
        ));
    }
    let mut prepacked = PrepackedProduct::new(product, Precision::Ternary, 1, Stream::TwoBit)?;
    prepacked.x = PrepackedActivations::floats(&product.float_activations(), &prepacked.copies[0])?;
    // A sum of k products, in any order, is wrong by at most k roundings of their magnitudes.
    let error = (product.shape.k + 3) as f64 * f64::from(f32::EPSILON);
    prepacked.reference = Reference::from_floats(product, &product.float_weights(), error, 0.0);
    let reading = prepacked.reading;
    let mut floats = Arc::new(prepacked).contender(
        format!("bitnet {}, ternary × f32", kernels.isa()),
        product,
        kernels,
        None,
    );
    floats.limits.clear();
    contenders.push(floats.limits([
        reading,
        product.multiplying(Instruction::all().find(|i| !i.is_int8())),
    ]));
    Ok(contenders)
}
