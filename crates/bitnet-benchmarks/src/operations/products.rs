//! Products of ternary weights with activations: W1.58A8, and what others have.

use super::rivals::{self, Reference};
use super::{Case, Contender, Group, Limit, Planned, Rivals, Shape, kernels, trits};
use crate::machine::{Ceiling, Machine, dot_product};
use crate::results::Unit;
use anyhow::Result;
use bitnet_core::random::nth;
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
use bitnet_kernels::machine::Instruction;
use bitnet_kernels::matmul::{Activations, Prepacked, Stream};
use bitnet_kernels::{Isa, Kernels, Pool};
use std::sync::Arc;

/// From so many tokens on, reading the weights is a small part of the work, and one copy of them
/// does.
const MANY_TOKENS: usize = 32;
/// Products of the scalar code are measured up to so many multiply-adds: a call of more would take
/// seconds.
const MAX_SCALAR: usize = 1 << 32;
/// The place of our kernels with float activations among the contenders.
pub(super) const FROM_FLOATS: usize = 1;
/// The scale of the weights and that of the activations.
const SCALES: [f32; 2] = [0.02, 0.01];

/// The ternary product of that shape, and, beside rivals, that of other weights.
pub(super) fn planned(group: Group, shape: Shape, tokens: usize, rivals: Rivals) -> Vec<Planned> {
    let planned = |what: &str, weights: Weights| {
        let name = format!("{what}{shape}, M = {tokens}");
        Planned::new(group, name, move |machine| {
            case(group, shape, tokens, weights, machine)
        })
    };
    let mut all = vec![planned("", Weights::Ternary(rivals))];
    if rivals == Rivals::All {
        all.push(planned("other weights, ", Weights::Others));
    }
    all
}

/// Which weights a case has.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Weights {
    Ternary(Rivals),
    Others,
}

/// What all contenders of a case share.
pub(super) struct Product {
    pub(super) shape: Shape,
    pub(super) tokens: usize,
    /// Values of the weights, `[N, K]`.
    pub(super) weights: Vec<i8>,
    /// Values of the activations, `[M, K]`.
    pub(super) activations: Vec<i8>,
    pub(super) pool: Arc<Pool>,
    /// Bytes of copies that are cycled through; 0 for one copy.
    cycle: usize,
    /// Bytes that L2 holds.
    l2: usize,
}

impl Product {
    /// How many copies of weights of that size there are to be.
    pub(super) fn copies(&self, bytes: usize) -> usize {
        self.cycle.div_ceil(bytes.max(1)).max(1)
    }

    /// What limits reading weights of that size, if it is known.
    pub(super) fn reading(&self, bytes: usize) -> Option<Limit> {
        let ceiling = if self.cycle > 0 {
            Ceiling::MemoryRead
        } else {
            Ceiling::L2Read
        };
        (self.cycle > 0 || bytes <= self.l2).then_some(Limit {
            ceiling,
            cost: bytes as f64,
        })
    }

    /// What limits multiplying, if it is known.
    pub(super) fn multiplying(&self, instruction: Option<Instruction>) -> Option<Limit> {
        instruction.map(|instruction| Limit {
            ceiling: Ceiling::Peak(instruction),
            cost: self.macs() as f64,
        })
    }

    pub(super) fn macs(&self) -> usize {
        self.tokens * self.shape.n * self.shape.k
    }

    /// `[N, K]` in floats.
    pub(super) fn float_weights(&self) -> Vec<f32> {
        self.weights
            .iter()
            .map(|&q| SCALES[0] * f32::from(q))
            .collect()
    }

    /// `[M, K]` in floats.
    pub(super) fn float_activations(&self) -> Vec<f32> {
        self.activations
            .iter()
            .map(|&q| SCALES[1] * f32::from(q))
            .collect()
    }
}

fn case(
    group: Group,
    shape: Shape,
    tokens: usize,
    weights: Weights,
    machine: &Machine,
) -> Result<Case> {
    let Shape { n, k } = shape;
    // Whether L2 has room for the two-bit weights decides for everybody.
    let l2 = machine.l2() / 4 * 3;
    let hot = n * k / 4 <= l2;
    let cycle = if hot || tokens >= MANY_TOKENS {
        0
    } else {
        machine.working_set()
    };
    // The largest of each token is ±127, so that quantizing its floats gives these values again.
    let activation = |i: usize| {
        if i.is_multiple_of(k) {
            127
        } else {
            ((nth(i as u64, 0) % 255) as i16 - 127) as i8
        }
    };
    let product = Arc::new(Product {
        shape,
        tokens,
        weights: trits(n * k),
        activations: (0..tokens * k).map(activation).collect(),
        pool: Arc::clone(machine.pool()),
        cycle,
        l2,
    });
    let (what, contenders) = match weights {
        Weights::Ternary(Rivals::None) => ("W1.58A8", ours(&product, Rivals::None)?),
        Weights::Ternary(Rivals::All) => {
            let mut contenders = ours(&product, Rivals::All)?;
            contenders.extend(rivals::products(&product)?);
            ("W1.58A8", contenders)
        }
        Weights::Others => ("other weights,", others(&product)?),
    };
    let place = if cycle > 0 {
        ", weights from memory"
    } else {
        ", weights in cache"
    };
    let (operation, unit) = match group {
        Group::Gemv => (format!("{what} GEMV"), Unit::Weights),
        _ => (format!("{what} GEMM, M = {tokens}"), Unit::Macs),
    };
    let threads = machine.pool().threads();
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

/// Weights in the kernel layout, and the activations that they meet.
struct Laid {
    copies: Vec<Prepacked>,
    x: Activations,
    reference: Reference,
    /// What limits a product, besides what multiplies.
    reading: Option<Limit>,
    /// Multiply-adds of a product.
    macs: usize,
}

impl Laid {
    /// Values of `precision` in one or several planes, times int8 activations.
    fn new(product: &Product, precision: Precision, planes: usize, stream: Stream) -> Result<Self> {
        let Shape { n, k } = product.shape;
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
        let x = Activations::from_values(
            &product.activations,
            &vec![SCALES[1]; product.tokens],
            &packed,
        )?;
        // Integer sums are exact, and few floats are rounded after them.
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

    /// The product by some kernels; from float activations, if there are some, that are quantized
    /// each time.
    fn contender(
        self: &Arc<Self>,
        name: String,
        product: &Product,
        kernels: Kernels,
        activations: Option<Vec<f32>>,
    ) -> Contender {
        let (laid, checked, pool) = (
            Arc::clone(self),
            Arc::clone(self),
            Arc::clone(&product.pool),
        );
        let output = (0, vec![f32::NAN; product.tokens * product.shape.n]);
        let call = move |(at, y): &mut (usize, Vec<f32>)| {
            let w = &laid.copies[*at];
            match &activations {
                Some(x) => {
                    let x = Activations::quantize(&kernels, x, w)
                        .expect("finite activations of whole rows");
                    kernels.matmul(&pool, w, &x, None, y);
                }
                None => kernels.matmul(&pool, w, &laid.x, None, y),
            }
            *at = (*at + 1) % laid.copies.len();
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

/// `n` values of an alphabet.
fn values(precision: Precision, n: usize) -> Vec<i8> {
    let (low, high) = precision.range();
    // Binary has no 0.
    let step = if precision == Precision::Binary { 2 } else { 1 };
    let count = (i16::from(high) - i16::from(low)) / step + 1;
    (0..n)
        .map(|i| (i16::from(low) + step * (nth(i as u64, 0) % count as u64) as i16) as i8)
        .collect()
}

/// Our kernels: the widest; the same from float activations, which rivals quantize too; with 1.6
/// bits a weight; the narrower ones.
fn ours(product: &Arc<Product>, rivals: Rivals) -> Result<Vec<Contender>> {
    let two_bit = Arc::new(Laid::new(product, Precision::Ternary, 1, Stream::TwoBit)?);
    let trits = Arc::new(Laid::new(product, Precision::Ternary, 1, Stream::Trits)?);
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

/// Other weights than one plane of trits, and float activations, by our widest kernels.
fn others(product: &Arc<Product>) -> Result<Vec<Contender>> {
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
        let laid = Arc::new(Laid::new(product, precision, planes, Stream::TwoBit)?);
        contenders.push(laid.contender(
            format!("bitnet {}, {name} × int8", kernels.isa()),
            product,
            kernels,
            None,
        ));
    }
    let mut laid = Laid::new(product, Precision::Ternary, 1, Stream::TwoBit)?;
    laid.x = Activations::floats(&product.float_activations(), &laid.copies[0])?;
    // A sum of k products, in any order, is wrong by at most k roundings of their magnitudes.
    let error = (product.shape.k + 3) as f64 * f64::from(f32::EPSILON);
    laid.reference = Reference::of_floats(product, &product.float_weights(), error, 0.0);
    let reading = laid.reading;
    let mut floats = Arc::new(laid).contender(
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
