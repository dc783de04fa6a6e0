//! Other engines on the same data. candle and rayon take their number of threads from the
//! environment when they are first used, which is why the program has a process for each number of
//! threads.

use super::products::{FROM_FLOATS, Product};
use super::{Contender, Shape};
use anyhow::Result;
use bitnet_kernels::machine::Instruction;
use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{CpuStorage, Device, Module, Storage, Tensor};
use std::sync::Arc;

/// Threads that rivals use in this process.
pub fn threads() -> usize {
    candle_core::utils::get_num_threads()
}

/// What a product must be for some tokens, each with the error it may have.
pub(super) struct Reference {
    rows: usize,
    tokens: Vec<usize>,
    /// Value and bound, for each of `tokens` all rows.
    expected: Vec<(f64, f64)>,
}

impl Reference {
    /// Multiply-adds that computing it may take.
    const MACS: usize = 1 << 27;

    /// `expected(row, token)` for every row and up to eight tokens, the first and the last among
    /// them.
    pub(super) fn new(product: &Product, expected: impl Fn(usize, usize) -> (f64, f64)) -> Self {
        let rows = product.shape.n;
        let count = (Self::MACS / (rows * product.shape.k))
            .clamp(2, 8)
            .min(product.tokens);
        let tokens: Vec<_> = (0..count)
            .map(|i| i * (product.tokens - 1) / (count - 1).max(1))
            .collect();
        let expected = tokens
            .iter()
            .flat_map(|&token| (0..rows).map(move |row| (row, token)))
            .map(|(row, token)| expected(row, token));
        Self {
            rows,
            expected: expected.collect(),
            tokens,
        }
    }

    /// Of floats: `x · w` in f64, wrong by at most `relative · Σ|x·w| + error · Σ|w|`, with an
    /// error of each activation.
    pub(super) fn of_floats(product: &Product, weights: &[f32], relative: f64, error: f64) -> Self {
        let (k, x) = (product.shape.k, product.float_activations());
        Self::new(product, |row, token| {
            let pairs = weights[row * k..][..k]
                .iter()
                .zip(&x[token * k..][..k])
                .map(|(&w, &x)| (f64::from(w), f64::from(x)));
            let (sum, size, norm) = pairs.fold((0.0, 0.0, 0.0), |(s, a, n), (w, x)| {
                (s + w * x, a + (w * x).abs(), n + w.abs())
            });
            (sum, relative * size + error * norm)
        })
    }

    /// The first value of `y`, `[M, N]`, that is too far off.
    pub(super) fn check(&self, y: &[f32]) -> Result<(), String> {
        for (token, expected) in self.tokens.iter().zip(self.expected.chunks(self.rows)) {
            for (row, (&got, &(value, bound))) in
                y[token * self.rows..].iter().zip(expected).enumerate()
            {
                let off = (f64::from(got) - value).abs();
                if off.is_nan() || off > bound {
                    return Err(format!(
                        "token {token}, row {row}: expected {value:.6} ± {bound:.1e}, got {got}"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Those of the matrix products: candle with f32, Q8_0 and Q4_0 weights, and the gemm crate.
pub(super) fn products(product: &Arc<Product>) -> Result<Vec<Contender>> {
    let Shape { n, k } = product.shape;
    let weights = product.float_weights();
    let x = Tensor::from_vec(
        product.float_activations(),
        (product.tokens, k),
        &Device::Cpu,
    )?;
    // Rivals begin with float activations too.
    let add = |contender: Contender, bytes: usize, peak: Option<Instruction>| {
        contender
            .limits([product.reading(bytes), product.multiplying(peak)])
            .against(FROM_FLOATS)
    };

    // A sum of k products, in any order, is wrong by at most k roundings of their magnitudes.
    let reference = Arc::new(Reference::of_floats(
        product,
        &weights,
        (k + 2) as f64 * f64::from(f32::EPSILON),
        0.0,
    ));
    let bytes = size_of_val(weights.as_slice());
    let mut copies = vec![];
    for _ in 0..product.copies(bytes) {
        copies.push(Tensor::from_slice(&weights, (n, k), &Device::Cpu)?);
    }
    let fma = Instruction::all().find(|i| !i.is_int8());
    let gemm = gemm_crate(product, copies.clone(), Arc::clone(&reference));
    let mut contenders = vec![add(
        candle("candle f32", x.clone(), copies, &reference, |x, w| {
            x.matmul(&w.t()?)
        }),
        bytes,
        fma,
    )];
    contenders.push(add(gemm, bytes, fma));

    let int8 = Instruction::all().find(|i| i.is_int8());
    for (name, dtype) in BLOCKS {
        if !k.is_multiple_of(dtype.block_size()) {
            continue;
        }
        let quantized =
            QTensor::quantize(&Tensor::from_slice(&weights, (n, k), &Device::Cpu)?, dtype)?;
        let dequantized = quantized
            .dequantize(&Device::Cpu)?
            .flatten_all()?
            .to_vec1::<f32>()?;
        // Activations become bytes with steps of max/127 at most, rounded.
        let step = f64::from(
            product
                .float_activations()
                .iter()
                .fold(0.0f32, |m, x| m.max(x.abs())),
        ) / 127.0;
        let reference = Reference::of_floats(product, &dequantized, 1e-3, 0.51 * step);
        let (data, bytes) = (quantized.data()?, quantized.storage_size_in_bytes());
        let mut copies = vec![];
        for _ in 0..product.copies(bytes) {
            let storage = QStorage::from_data(data.clone(), &Device::Cpu, dtype)?;
            copies.push(QMatMul::from_qtensor(QTensor::new(storage, (n, k))?)?);
        }
        // candle may repack the weights at their first product, which is not what is measured.
        copies.iter().try_for_each(|w| w.forward(&x).map(drop))?;
        contenders.push(add(
            candle(name, x.clone(), copies, &Arc::new(reference), |x, w| {
                w.forward(x)
            }),
            bytes,
            int8,
        ));
    }
    Ok(contenders)
}

/// candle's product with each of the copies in its turn; it makes a new tensor for each result.
fn candle<W: 'static>(
    name: &str,
    x: Tensor,
    copies: Vec<W>,
    reference: &Arc<Reference>,
    product: impl Fn(&Tensor, &W) -> candle_core::Result<Tensor> + 'static,
) -> Contender {
    let reference = Arc::clone(reference);
    let call = move |(at, y): &mut (usize, Made<Tensor>)| {
        *y = Some(product(&x, &copies[*at]));
        *at = (*at + 1) % copies.len();
    };
    let check =
        move |(_, y): &(usize, Made<Tensor>)| reference.check(&floats(Ok(made(y)?.clone()))?);
    Contender::new(name, (0, None), call, check)
}

/// The gemm crate, f32: what candle calls too, into a result that is there already. It reads the
/// weights of candle's tensors.
fn gemm_crate(product: &Arc<Product>, copies: Vec<Tensor>, reference: Arc<Reference>) -> Contender {
    let Shape { n, k } = product.shape;
    let (m, x) = (product.tokens, product.float_activations());
    let parallelism = if threads() > 1 {
        gemm::Parallelism::Rayon(threads())
    } else {
        gemm::Parallelism::None
    };
    let call = move |(at, y): &mut (usize, Vec<f32>)| {
        let (storage, _) = copies[*at].storage_and_layout();
        let Storage::Cpu(CpuStorage::F32(w)) = &*storage else {
            unreachable!("made of f32 on the CPU")
        };
        assert!(y.len() == m * n && x.len() == m * k && w.len() == n * k);
        let (x, w, y, [n, k_]) = (
            x.as_ptr(),
            w.as_ptr(),
            y.as_mut_ptr(),
            [n, k].map(usize::cast_signed),
        );
        // SAFETY: y is M × N, x is M × K and w, transposed, is K × N, all row-major and of the
        // lengths that were just checked.
        unsafe {
            gemm::gemm(
                m,
                n.cast_unsigned(),
                k,
                y,
                1,
                n,
                false,
                x,
                1,
                k_,
                w,
                k_,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                parallelism,
            )
        };
        *at = (*at + 1) % copies.len();
    };
    Contender::new(
        "gemm crate f32",
        (0, vec![f32::NAN; m * n]),
        call,
        move |(_, y)| reference.check(y),
    )
}

/// Relative error of a number in f16, with some for the roundings around it.
const SCALE: f32 = 1.0 / 1024.0;
/// The block types of candle.
const BLOCKS: [(&str, GgmlDType); 2] = [
    ("candle Q8_0", GgmlDType::Q8_0),
    ("candle Q4_0", GgmlDType::Q4_0),
];

/// Whether blocks of 32 hold the weights as well as they can: half a step of max/127 in Q8_0; in
/// Q4_0 a step of max/8, which is what the largest on the other side is off. The scale is an f16
/// and off by [`SCALE`] of itself.
fn near(dtype: GgmlDType, weights: &[f32], got: &[f32]) -> Result<(), String> {
    let step = if dtype == GgmlDType::Q8_0 {
        0.5 / 127.0
    } else {
        1.0 / 8.0
    };
    for (block, (w, q)) in weights.chunks(32).zip(got.chunks(32)).enumerate() {
        let bound = (step + SCALE) * w.iter().fold(0.0f32, |m, w| m.max(w.abs()));
        if let Some(i) = w
            .iter()
            .zip(q)
            .position(|(w, q)| (w - q).abs() > bound || q.is_nan())
        {
            return Err(format!(
                "weight {}: {} became {}",
                32 * block + i,
                w[i],
                q[i]
            ));
        }
    }
    if weights.len() == got.len() {
        Ok(())
    } else {
        Err(format!(
            "expected {} weights, got {}",
            weights.len(),
            got.len()
        ))
    }
}

/// What a call of candle left.
type Made<T> = Option<candle_core::Result<T>>;

fn made<T>(made: &Made<T>) -> Result<&T, String> {
    made.as_ref()
        .ok_or("no result")?
        .as_ref()
        .map_err(ToString::to_string)
}

fn floats(tensor: candle_core::Result<Tensor>) -> Result<Vec<f32>, String> {
    tensor
        .and_then(|t| t.flatten_all()?.to_vec1())
        .map_err(|e| e.to_string())
}

/// candle's way from floats to blocks, matrix by matrix of `weights`.
pub(super) fn quantization(weights: &[f32], matrix: usize, cols: usize) -> Result<Vec<Contender>> {
    let parts = weights
        .chunks_exact(matrix)
        .map(|part| Tensor::from_slice(part, (matrix / cols, cols), &Device::Cpu));
    let all = parts.collect::<candle_core::Result<Vec<_>>>()?;
    let mut contenders = vec![];
    for (name, dtype) in BLOCKS {
        let (tensors, first) = (all.clone(), weights[..matrix].to_vec());
        let call = move |(at, q): &mut (usize, Made<QTensor>)| {
            *q = Some(QTensor::quantize(&tensors[*at], dtype));
            *at = (*at + 1) % tensors.len();
        };
        let check = move |(_, q): &(usize, Made<QTensor>)| {
            near(dtype, &first, &floats(made(q)?.dequantize(&Device::Cpu))?)
        };
        contenders.push(Contender::new(name, (0, None), call, check));
    }
    Ok(contenders)
}

/// candle's way from blocks to floats.
pub(super) fn dequantization(weights: &Arc<Vec<f32>>, cols: usize) -> Result<Vec<Contender>> {
    let mut contenders = vec![];
    for (name, dtype) in BLOCKS {
        let tensor = Tensor::from_slice(weights, (weights.len() / cols, cols), &Device::Cpu)?;
        let (quantized, weights) = (QTensor::quantize(&tensor, dtype)?, Arc::clone(weights));
        let call = move |out: &mut Made<Tensor>| *out = Some(quantized.dequantize(&Device::Cpu));
        let check =
            move |out: &Made<Tensor>| near(dtype, &weights, &floats(Ok(made(out)?.clone()))?);
        contenders.push(Contender::new(name, None, call, check));
    }
    Ok(contenders)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_product_is_noticed() {
        let reference = Reference {
            rows: 2,
            tokens: vec![0, 2],
            expected: vec![(1.0, 0.1), (2.0, 0.1), (3.0, 0.1), (4.0, 0.1)],
        };
        let right = [1.05, 2.0, 9.0, 9.0, 3.0, 3.95];
        assert_eq!(reference.check(&right), Ok(()));
        for (i, value) in [(0, 1.2), (1, f32::NAN), (5, -4.0)] {
            let mut wrong = right;
            wrong[i] = value;
            assert!(reference.check(&wrong).is_err(), "{value} at {i}");
        }
    }

    #[test]
    fn wrong_blocks_are_noticed() {
        let weights: Vec<f32> = (0..64).map(|i| (i as f32 * 0.7).sin()).collect();
        for (_, dtype) in BLOCKS {
            assert_eq!(near(dtype, &weights, &weights), Ok(()));
            let mut wrong = weights.clone();
            wrong[40] += 0.2;
            assert!(near(dtype, &weights, &wrong).is_err());
            wrong[40] = f32::NAN;
            assert!(near(dtype, &weights, &wrong).is_err());
            assert!(near(dtype, &weights, &weights[..32]).is_err());
        }
    }
}
