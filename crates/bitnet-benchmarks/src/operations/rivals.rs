//! Other engines on the same data. candle and rayon read their number of threads from the
//! environment at their first use, so the program starts a process for each number of threads.

use super::product::{ProductInputs, Reference};
use crate::case::Contender;
use crate::selection::WeightShape;
use anyhow::Result;
use bitnet_kernels::machine::Instruction;
use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{CpuStorage, Device, Module, Storage, Tensor};
use std::sync::Arc;

/// Number of threads that rivals use in this process.
pub fn threads() -> usize {
    candle_core::utils::get_num_threads()
}

/// Index of our contender that quantizes float activations, with which the rivals are compared.
pub(super) const FROM_FLOATS: usize = 1;

/// Rivals of the matrix products: candle with f32, Q8_0 and Q4_0 weights, and the gemm crate.
pub(super) fn products(product: &Arc<ProductInputs>) -> Result<Vec<Contender>> {
    // Rivals start from float activations.
    let x = Tensor::from_vec(
        product.float_activations(),
        (product.tokens, product.shape.k),
        &Device::Cpu,
    )?;
    let mut contenders = float_products(product, &x)?;
    for (name, dtype) in BLOCKS {
        if product.shape.k.is_multiple_of(dtype.block_size()) {
            contenders.push(block_product(product, &x, name, dtype)?);
        }
    }
    Ok(contenders)
}

/// A rival that reads `bytes` of weights and multiplies with the instruction `peak` at best.
fn rival(
    contender: Contender,
    product: &ProductInputs,
    bytes: usize,
    peak: Option<Instruction>,
) -> Contender {
    contender
        .limits([product.reading(bytes), product.multiplying(peak)])
        .against(FROM_FLOATS)
}

/// candle and the gemm crate with f32 weights.
fn float_products(product: &Arc<ProductInputs>, x: &Tensor) -> Result<Vec<Contender>> {
    let WeightShape { n, k } = product.shape;
    let weights = product.float_weights();
    // A sum of k products, in any order, is wrong by at most k roundings of their magnitudes.
    let error = (k + 2) as f64 * f64::from(f32::EPSILON);
    let reference = Arc::new(Reference::from_floats(product, &weights, error, 0.0));
    let bytes = size_of_val(weights.as_slice());
    let mut copies = vec![];
    for _ in 0..product.copies(bytes) {
        copies.push(Tensor::from_slice(&weights, (n, k), &Device::Cpu)?);
    }
    let fma = Instruction::all().find(|i| !i.is_int8());
    let gemm = gemm_crate(product, copies.clone(), Arc::clone(&reference));
    let multiply = |x: &Tensor, w: &Tensor| x.matmul(&w.t()?);
    let candle = candle("candle f32", x.clone(), copies, &reference, multiply);
    Ok([candle, gemm]
        .map(|contender| rival(contender, product, bytes, fma))
        .into())
}

/// candle with weights in blocks.
fn block_product(
    product: &ProductInputs,
    x: &Tensor,
    name: &str,
    dtype: GgmlDType,
) -> Result<Contender> {
    let WeightShape { n, k } = product.shape;
    let weights = Tensor::from_slice(&product.float_weights(), (n, k), &Device::Cpu)?;
    let quantized = QTensor::quantize(&weights, dtype)?;
    let dequantized = quantized
        .dequantize(&Device::Cpu)?
        .flatten_all()?
        .to_vec1::<f32>()?;
    // Activations are rounded to int8 with a step of at most max/127.
    let activations = product.float_activations();
    let largest = activations.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let error = 0.51 * (f64::from(largest) / 127.0);
    let reference = Arc::new(Reference::from_floats(product, &dequantized, 1e-3, error));
    let (data, bytes) = (quantized.data()?, quantized.storage_size_in_bytes());
    let mut copies = vec![];
    for _ in 0..product.copies(bytes) {
        let storage = QStorage::from_data(data.clone(), &Device::Cpu, dtype)?;
        copies.push(QMatMul::from_qtensor(QTensor::new(storage, (n, k))?)?);
    }
    // candle may repack the weights at their first product, which is not measured.
    copies.iter().try_for_each(|w| w.forward(x).map(drop))?;
    let candle = candle(name, x.clone(), copies, &reference, |x, w| w.forward(x));
    let int8 = Instruction::all().find(|i| i.is_int8());
    Ok(rival(candle, product, bytes, int8))
}

/// candle's product, with the next copy of the weights in each call; every result is a new tensor.
fn candle<W: 'static>(
    name: &str,
    x: Tensor,
    copies: Vec<W>,
    reference: &Arc<Reference>,
    product: impl Fn(&Tensor, &W) -> candle_core::Result<Tensor> + 'static,
) -> Contender {
    let reference = Arc::clone(reference);
    let call = move |(at, y): &mut (usize, CallResult<Tensor>)| {
        *y = Some(product(&x, &copies[*at]));
        *at = (*at + 1) % copies.len();
    };
    let check = move |(_, y): &(usize, CallResult<Tensor>)| {
        reference.check(&floats(Ok(result(y)?.clone()))?)
    };
    Contender::new(name, (0, None), call, check)
}

/// The gemm crate, f32, which candle calls too. It writes into an existing result and reads the
/// weights of candle's tensors.
fn gemm_crate(
    product: &Arc<ProductInputs>,
    copies: Vec<Tensor>,
    reference: Arc<Reference>,
) -> Contender {
    let WeightShape { n, k } = product.shape;
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
        // SAFETY: y is M × N, x is M × K and w, transposed, is K × N, all row-major; the assertion
        // above checked their lengths.
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

/// Bound on the relative error of a number in f16 and of the roundings around it.
const SCALE: f32 = 1.0 / 1024.0;
/// The block types of candle that are measured.
const BLOCKS: [(&str, GgmlDType); 2] = [
    ("candle Q8_0", GgmlDType::Q8_0),
    ("candle Q4_0", GgmlDType::Q4_0),
];

/// Checks dequantized blocks of 32 against the weights. The bound is half a step of max/127 in Q8_0
/// and a whole step of max/8 in Q4_0, which is the error of the largest value of the other sign. To
/// this comes [`SCALE`], the error of the f16 scale.
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

/// The result of the last call of candle.
type CallResult<T> = Option<candle_core::Result<T>>;

fn result<T>(result: &CallResult<T>) -> Result<&T, String> {
    result
        .as_ref()
        .ok_or("no result")?
        .as_ref()
        .map_err(ToString::to_string)
}

fn floats(tensor: candle_core::Result<Tensor>) -> Result<Vec<f32>, String> {
    tensor
        .and_then(|t| t.flatten_all()?.to_vec1())
        .map_err(|e| e.to_string())
}

/// candle's quantization of floats to blocks. The calls take the matrices of `weights` in turn.
pub(super) fn quantization(weights: &[f32], matrix: usize, cols: usize) -> Result<Vec<Contender>> {
    let parts = weights
        .chunks_exact(matrix)
        .map(|part| Tensor::from_slice(part, (matrix / cols, cols), &Device::Cpu));
    let all = parts.collect::<candle_core::Result<Vec<_>>>()?;
    let mut contenders = vec![];
    for (name, dtype) in BLOCKS {
        let (tensors, first) = (all.clone(), weights[..matrix].to_vec());
        let call = move |(at, q): &mut (usize, CallResult<QTensor>)| {
            *q = Some(QTensor::quantize(&tensors[*at], dtype));
            *at = (*at + 1) % tensors.len();
        };
        let check = move |(_, q): &(usize, CallResult<QTensor>)| {
            near(dtype, &first, &floats(result(q)?.dequantize(&Device::Cpu))?)
        };
        contenders.push(Contender::new(name, (0, None), call, check));
    }
    Ok(contenders)
}

/// candle's dequantization of blocks to floats.
pub(super) fn dequantization(weights: &Arc<Vec<f32>>, cols: usize) -> Result<Vec<Contender>> {
    let mut contenders = vec![];
    for (name, dtype) in BLOCKS {
        let tensor = Tensor::from_slice(weights, (weights.len() / cols, cols), &Device::Cpu)?;
        let (quantized, weights) = (QTensor::quantize(&tensor, dtype)?, Arc::clone(weights));
        let call =
            move |out: &mut CallResult<Tensor>| *out = Some(quantized.dequantize(&Device::Cpu));
        let check = move |out: &CallResult<Tensor>| {
            near(dtype, &weights, &floats(Ok(result(out)?.clone()))?)
        };
        contenders.push(Contender::new(name, None, call, check));
    }
    Ok(contenders)
}

#[cfg(test)]
mod tests {
    use super::*;

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
