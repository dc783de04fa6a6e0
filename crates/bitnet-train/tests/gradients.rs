//! Each operation and its gradients against the same function in candle's operations, and against
//! difference quotients.

use bitnet_train::ops::{self, Angles};
use candle_core::{D, Device, Result, Tensor, Var};

fn normal(shape: &[usize], seed: u64) -> Var {
    let mut random = bitnet_train::variables::stream(seed, "gradients");
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| random.normal() as f32)
        .collect();
    Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
}

fn largest(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    (a - b)
        .unwrap()
        .abs()
        .unwrap()
        .flatten_all()
        .unwrap()
        .max(0)
        .unwrap()
        .to_scalar()
        .unwrap()
}

/// Values and gradients of `ours` are those of `plain`, each within `bound`, under a random
/// weighting of the outputs.
fn same(
    vars: &[&Var],
    ours: impl Fn() -> Result<Tensor>,
    plain: impl Fn() -> Result<Tensor>,
    bound: f32,
) {
    let (y, truth) = (ours().unwrap(), plain().unwrap());
    assert!(
        largest(&y, &truth) < bound,
        "values differ by {}",
        largest(&y, &truth)
    );
    let weights = normal(y.dims(), 99);
    let gradients = |y: Tensor| {
        (y * weights.as_tensor())
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap()
    };
    let (got, expected) = (gradients(y), gradients(truth));
    for (i, var) in vars.iter().enumerate() {
        let got = got
            .get(var)
            .unwrap_or_else(|| panic!("variable {i} has no gradient"));
        let difference = largest(got, expected.get(var).unwrap());
        assert!(difference < bound, "gradient {i} differs by {difference}");
    }
}

#[test]
fn rms_norm() {
    for (rows, k) in [(1, 1), (3, 7), (130, 33)] {
        let (x, gain) = (normal(&[rows, k], 1), normal(&[k], 2));
        let plain = || {
            let root = (x.sqr()?.mean_keepdim(D::Minus1)? + 1e-5)?.sqrt()?;
            x.broadcast_div(&root)?.broadcast_mul(&gain)
        };
        // Sums of up to 130 rows of numbers around 1: 130 · 2⁻²⁴ and a margin.
        same(&[&x, &gain], || ops::rms_norm(&x, &gain, 1e-5), plain, 1e-4);
    }
}

#[test]
fn gates() {
    let (gate, up) = (normal(&[5, 3000], 1), normal(&[5, 3000], 2));
    same(
        &[&gate, &up],
        || ops::silu_gate(&gate, &up),
        || gate.silu()? * up.as_tensor(),
        1e-5,
    );
    same(
        &[&gate, &up],
        || ops::relu2_gate(&gate, &up),
        || gate.relu()?.sqr()? * up.as_tensor(),
        1e-5,
    );
    same(&[&gate], || ops::relu(&gate), || gate.relu(), 1e-6);
    assert!(ops::silu_gate(&gate, &up.narrow(0, 0, 2).unwrap()).is_err());
}

#[test]
fn relu_has_no_gradient_at_zero() {
    let x = Var::new(&[-1f32, 0.0, 2.0], &Device::Cpu).unwrap();
    let gradient = ops::relu(&x)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert_eq!(
        gradient.get(&x).unwrap().to_vec1::<f32>().unwrap(),
        [0.0, 0.0, 1.0]
    );
}

#[test]
fn cross_entropy() {
    let logits = normal(&[2, 9, 31], 1);
    let targets: Vec<u32> = (0..18).map(|i| i * 7 % 31).collect();
    let targets = Tensor::from_vec(targets, (2, 9), &Device::Cpu).unwrap();
    let plain =
        || candle_nn::loss::cross_entropy(&logits.reshape((18, 31))?, &targets.flatten_all()?);
    same(
        &[&logits],
        || ops::cross_entropy(&logits, &targets),
        plain,
        1e-6,
    );
    // Large logits do not overflow.
    let huge = (logits.as_tensor() * 1e4).unwrap();
    assert!(
        ops::cross_entropy(&huge, &targets)
            .unwrap()
            .to_scalar::<f32>()
            .unwrap()
            .is_finite()
    );
    assert!(
        ops::cross_entropy(&logits, &(targets.clone() + 30.0).unwrap())
            .unwrap_err()
            .to_string()
            .contains("below 31")
    );
    assert!(ops::cross_entropy(&logits, &targets.narrow(1, 0, 3).unwrap()).is_err());
}

#[test]
fn causal_softmax() {
    let (t, groups) = (6, 2);
    let x = normal(&[2, 3, groups * t, t], 1);
    let mask: Vec<f32> = (0..groups * t)
        .flat_map(|r| (0..t).map(move |c| if c > r % t { f32::NEG_INFINITY } else { 0.0 }))
        .collect();
    let mask = Tensor::from_vec(mask, (groups * t, t), &Device::Cpu).unwrap();
    let plain =
        || candle_nn::ops::softmax(&(x.as_tensor() * 0.3)?.broadcast_add(&mask)?, D::Minus1);
    same(&[&x], || ops::causal_softmax(&x, 0.3), plain, 1e-6);
    assert!(ops::causal_softmax(&x.narrow(2, 0, 5).unwrap(), 1.0).is_err());
}

#[test]
fn heads_and_positions() {
    let (batch, positions, heads, d) = (2, 5, 3, 8);
    let x = normal(&[batch, positions, heads * d], 1);
    let angles = Angles::new(10_000.0, d, 7);
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = (0..positions)
            .flat_map(|p| {
                (0..d / 2)
                    .map(move |i| f(p as f64 * 10_000f64.powf(-2.0 * i as f64 / d as f64)) as f32)
            })
            .collect();
        Tensor::from_vec(values, (positions, d / 2), &Device::Cpu).unwrap()
    };
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    let plain = |turn: bool| {
        let x = x
            .reshape((batch, positions, heads, d))?
            .transpose(1, 2)?
            .contiguous()?;
        if turn {
            candle_nn::rotary_emb::rope_slow(&x, &cos, &sin)
        } else {
            Ok(x)
        }
    };
    same(
        &[&x],
        || ops::heads_first(&x, heads, Some(&angles)),
        || plain(true),
        1e-5,
    );
    same(
        &[&x],
        || ops::heads_first(&x, heads, None),
        || plain(false),
        1e-6,
    );
    let y = normal(&[batch, heads, positions, d], 2);
    same(
        &[&y],
        || ops::heads_last(&y),
        || y.transpose(1, 2)?.reshape((batch, positions, heads * d)),
        1e-6,
    );
    assert!(
        ops::heads_first(&x, 5, None).is_err()
            && ops::heads_first(&normal(&[1, 8, d], 1), 1, Some(&angles)).is_err()
    );
}

/// `[B, H, W, C]` and `[B, C, H, W]`.
fn channels_first(x: &Tensor) -> Result<Tensor> {
    x.permute((0, 3, 1, 2))?.contiguous()
}

#[test]
fn patches_make_a_convolution() {
    let (x, weight) = (normal(&[2, 6, 5, 3], 1), normal(&[4, 27], 2));
    let ours = || {
        ops::patches(&x, 3)?
            .reshape((60, 27))?
            .matmul(&weight.t()?)?
            .reshape((2, 6, 5, 4))
    };
    let plain = || {
        let kernel = weight
            .reshape((4, 3, 3, 3))?
            .permute((0, 3, 1, 2))?
            .contiguous()?;
        channels_first(&x)?
            .conv2d(&kernel, 1, 1, 1, 1)?
            .permute((0, 2, 3, 1))?
            .contiguous()
    };
    // 60 products of numbers around 1 in a sum.
    same(&[&x, &weight], ours, plain, 1e-4);
    assert!(ops::patches(&x, 2).is_err());
}

#[test]
fn pooling_gives_the_gradient_to_one_of_equals() {
    let x = normal(&[2, 6, 4, 3], 1);
    // Not candle's pooling, whose gradient is a quarter of the right value.
    let plain = || x.reshape(&[2, 3, 2, 2, 2, 3][..])?.max(4)?.max(2);
    same(&[&x], || ops::max_pool(&x), plain, 1e-6);
    let equal = Var::from_tensor(
        &Tensor::zeros((1, 2, 2, 1), candle_core::DType::F32, &Device::Cpu).unwrap(),
    )
    .unwrap();
    let gradient = ops::max_pool(&equal)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    assert_eq!(
        gradient
            .get(&equal)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1::<f32>()
            .unwrap(),
        [1.0, 0.0, 0.0, 0.0]
    );
    assert!(ops::max_pool(&x.narrow(1, 0, 3).unwrap()).is_err());
}
