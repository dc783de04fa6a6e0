//! Products of ternary weights with activations: W1.58A8, and what others have.

use super::rivals::{self, Reference};
use super::{Case, Contender, Group, Limit, Planned, Rivals, Shape, kernels, mix, trits};
use crate::machine::{Ceiling, Machine, dot_product};
use crate::results::Unit;
use anyhow::Result;
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
use bitnet_kernels::machine::Instruction;
use bitnet_kernels::matmul::{Activations, Prepacked};
use bitnet_kernels::{Isa, Kernels, Pool};
use std::sync::Arc;

/// From so many tokens on, reading the weights is a small part of the work, and one copy of them does.
const MANY_TOKENS: usize = 32;
/// Products of the scalar code are measured up to so many multiply-adds: a call of more would take seconds.
const MAX_SCALAR: usize = 1 << 32;
/// The place of our kernels with float activations among the contenders.
pub(super) const FROM_FLOATS: usize = 1;
/// The scale of the weights and that of the activations.
const SCALES: [f32; 2] = [0.02, 0.01];

pub(super) fn planned(group: Group, shape: Shape, tokens: usize, rivals: Rivals) -> Planned {
    Planned::new(group, format!("{shape}, M = {tokens}"), move |machine| case(group, shape, tokens, rivals, machine))
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
        let ceiling = if self.cycle > 0 { Ceiling::MemoryRead } else { Ceiling::L2Read };
        (self.cycle > 0 || bytes <= self.l2).then_some(Limit { ceiling, cost: bytes as f64 })
    }

    /// What limits multiplying, if it is known.
    pub(super) fn multiplying(&self, instruction: Option<Instruction>) -> Option<Limit> {
        instruction.map(|instruction| Limit { ceiling: Ceiling::Peak(instruction), cost: self.macs() as f64 })
    }

    pub(super) fn macs(&self) -> usize {
        self.tokens * self.shape.n * self.shape.k
    }

    /// `[N, K]` in floats.
    pub(super) fn float_weights(&self) -> Vec<f32> {
        self.weights.iter().map(|&q| SCALES[0] * f32::from(q)).collect()
    }

    /// `[M, K]` in floats.
    pub(super) fn float_activations(&self) -> Vec<f32> {
        self.activations.iter().map(|&q| SCALES[1] * f32::from(q)).collect()
    }
}

fn case(group: Group, shape: Shape, tokens: usize, rivals: Rivals, machine: &Machine) -> Result<Case> {
    let Shape { n, k } = shape;
    // Whether L2 has room for the two-bit weights decides for everybody.
    let l2 = machine.l2() / 4 * 3;
    let hot = n * k / 4 <= l2;
    let cycle = if hot || tokens >= MANY_TOKENS { 0 } else { machine.working_set() };
    // The largest of each token is ±127, so that quantizing its floats gives these values again.
    let activation = |i: usize| if i.is_multiple_of(k) { 127 } else { ((mix(i) % 255) as i16 - 127) as i8 };
    let product = Arc::new(Product {
        shape,
        tokens,
        weights: trits(n * k),
        activations: (0..tokens * k).map(activation).collect(),
        pool: Arc::clone(machine.pool()),
        cycle,
        l2,
    });
    let mut contenders = ours(&product, rivals)?;
    if rivals == Rivals::All {
        contenders.extend(rivals::products(&product)?);
    }
    let place = if cycle > 0 { ", weights from memory" } else { ", weights in cache" };
    let (operation, unit) = match group {
        Group::Gemv => ("W1.58A8 GEMV".into(), Unit::Weights),
        _ => (format!("W1.58A8 GEMM, M = {tokens}"), Unit::Macs),
    };
    let threads = machine.pool().threads();
    Ok(Case { group, operation, shape: format!("{shape}{place}"), threads, unit, amount: product.macs() as f64, contenders })
}

/// Our kernels: the widest; the same from float activations, which rivals quantize too; the narrower ones.
fn ours(product: &Arc<Product>, rivals: Rivals) -> Result<Vec<Contender>> {
    let Shape { n, k } = product.shape;
    let spec = MatrixSpec::new(n, k, Precision::Ternary, Granularity::Tensor);
    let matrix = Matrix { values: product.weights.clone(), scales: vec![SCALES[0]], zero_points: vec![], spec };
    let packed = Prepacked::new(&matrix, &product.pool)?;
    let bytes = packed.bytes();
    let copies = Arc::new(vec![packed; product.copies(bytes)]);
    let x = Arc::new(Activations::from_values(&product.activations, &vec![SCALES[1]; product.tokens], &copies[0])?);
    let floats = product.float_activations();
    // Integer sums are exact, and few floats are rounded after them.
    let reference = Arc::new(Reference::new(product, |row, token| {
        let [w, x] = [&product.weights[row * k..][..k], &product.activations[token * k..][..k]];
        let sum: i32 = w.iter().zip(x).map(|(&w, &x)| i32::from(w) * i32::from(x)).sum();
        let y = f64::from(SCALES[0]) * f64::from(SCALES[1]) * f64::from(sum);
        (y, 4.0 * f64::from(f32::EPSILON) * y.abs())
    }));

    let contender = |kernels: Kernels, activations: Option<Vec<f32>>| {
        let (product, copies, x, reference) = (Arc::clone(product), Arc::clone(&copies), Arc::clone(&x), Arc::clone(&reference));
        let from = if activations.is_some() { ", from f32" } else { "" };
        let limits = [product.reading(bytes), product.multiplying(dot_product(kernels.isa()))];
        let output = (0, vec![f32::NAN; product.tokens * n]);
        let call = move |(at, y): &mut (usize, Vec<f32>)| {
            let w = &copies[*at];
            match &activations {
                Some(x) => {
                    let x = Activations::quantize(x, w).expect("finite activations of whole rows");
                    kernels.matmul(&product.pool, w, &x, None, y);
                }
                None => kernels.matmul(&product.pool, w, &x, None, y),
            }
            *at = (*at + 1) % copies.len();
        };
        let name = format!("bitnet {}{from}", kernels.isa());
        Contender::new(name, output, call, move |(_, y)| reference.check(y)).ours().limits(limits)
    };
    let mut kernels = kernels(rivals);
    kernels.retain(|k| k.isa() != Isa::Scalar || product.macs() <= MAX_SCALAR);
    let mut contenders: Vec<_> = kernels.iter().map(|&kernels| contender(kernels, None)).collect();
    contenders.insert(FROM_FLOATS, contender(kernels[0], Some(floats)));
    Ok(contenders)
}
