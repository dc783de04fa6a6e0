//! Linear layers. This file alone calls the matrix kernels.
//!
//! A ternary layer of a model trained with int8 activations quantizes its input, with one absmax
//! scale per token, and multiplies integers. Every other layer multiplies floats. Weights in a
//! rotated basis take a rotated input: layers of one input share one rotation of it.

use crate::Result;
use bitnet_core::hadamard::Hadamard;
use bitnet_kernels::dense::DenseMatrix;
use bitnet_kernels::matmul::{Prepacked, PrepackedActivations};
use bitnet_kernels::{Kernels, Pool};

/// The kernels and threads of a model.
#[derive(Debug)]
pub(crate) struct KernelPool {
    pub(crate) kernels: Kernels,
    pub(crate) pool: Pool,
}

/// The weights of a linear layer, `(N, K)`.
#[derive(Debug)]
pub(crate) enum LinearWeights {
    /// Ternary weights with int8 activations.
    Ternary(Prepacked),
    /// Weights of any kind with float activations.
    Dense(DenseMatrix),
}

/// `y = x · Wᵀ + bias`, or `y = rotate(x) · Wᵀ + bias` with weights in a rotated basis.
#[derive(Debug)]
pub(crate) struct LinearLayer {
    pub(crate) weights: LinearWeights,
    pub(crate) bias: Option<Vec<f32>>,
    /// The rotation of the weights' rows.
    pub(crate) rotation: Option<Hadamard>,
}

/// The input of linear layers, `[tokens, K]`, in the original basis and in the rotated one. Each is
/// there if a layer takes it.
#[derive(Debug, Default)]
pub(crate) struct LayerInput {
    original: InputBuffers,
    rotated: InputBuffers,
    /// The basis of `rotated`, if it holds the current input.
    rotation: Option<Hadamard>,
}

/// An input in one basis: floats for layers that multiply floats, int8 for ternary layers. Layers of
/// the same K share one quantization.
#[derive(Debug, Default)]
struct InputBuffers {
    floats: Vec<f32>,
    quantized: Option<PrepackedActivations>,
    /// Whether `quantized` holds the current input; otherwise it is a free buffer.
    fresh: bool,
}

impl LayerInput {
    /// The elements in the basis of `rotation`, if the last `write` was for no layers.
    pub(crate) fn floats(&mut self, runtime: &KernelPool, rotation: Option<&Hadamard>) -> &[f32] {
        &self.in_basis(runtime, rotation).floats
    }

    /// Writes the input of `layers` on the pool; `fill(token, out)` computes the `cols` elements of
    /// a token. If all layers take it in the same rotated basis, each thread rotates a token at
    /// once; if all multiply integers, it quantizes it too, and the floats stay in cache.
    ///
    /// # Errors
    /// [`bitnet_core::Error::NotFinite`], wrapped, if a quantized token holds NaN or infinity.
    pub(crate) fn write(
        &mut self,
        runtime: &KernelPool,
        layers: &[&LinearLayer],
        shape: (usize, usize),
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<()> {
        self.rotation = None;
        let first = layers.first().and_then(|layer| layer.rotation.as_ref());
        let shared = layers.iter().all(|layer| layer.rotation.as_ref() == first);
        match first {
            Some(rotation) if shared => {
                let rotated = |token: usize, out: &mut [f32]| {
                    fill(token, out);
                    runtime.kernels.hadamard_rotate(rotation, out);
                };
                self.rotated.write(runtime, layers, shape, rotated)?;
                self.rotation = Some(rotation.clone());
                Ok(())
            }
            // Layers of several bases start from the floats of the original one.
            _ if !shared => self.original.write(runtime, &[], shape, fill),
            _ => self.original.write(runtime, layers, shape, fill),
        }
    }

    /// The input in the basis of `rotation`: rotated now, if the last `write` was for layers of
    /// several bases and this is the first of its basis.
    fn in_basis(&mut self, runtime: &KernelPool, rotation: Option<&Hadamard>) -> &mut InputBuffers {
        let Some(rotation) = rotation else {
            return &mut self.original;
        };
        if self.rotation.as_ref() != Some(rotation) {
            self.rotated.fresh = false;
            self.rotated.floats.clone_from(&self.original.floats);
            let (KernelPool { kernels, pool }, x) = (runtime, &mut self.rotated.floats);
            kernels.hadamard_rotate_rows(pool, rotation, x);
            self.rotation = Some(rotation.clone());
        }
        &mut self.rotated
    }
}

impl InputBuffers {
    /// See [`LayerInput::write`].
    fn write(
        &mut self,
        runtime: &KernelPool,
        layers: &[&LinearLayer],
        (tokens, cols): (usize, usize),
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<()> {
        if let [
            LinearLayer {
                weights: LinearWeights::Ternary(w),
                ..
            },
            ..,
        ] = layers
        {
            let mut quantized = self.buffer_for(w)?;
            let all = layers
                .iter()
                .all(|l| matches!(&l.weights, LinearWeights::Ternary(w) if quantized.fits(w)));
            if all {
                quantized.requantize_rows(&runtime.kernels, &runtime.pool, w, tokens, &fill)?;
            }
            (self.quantized, self.fresh) = (Some(quantized), all);
            if all {
                return Ok(());
            }
        }
        self.fresh = false;
        self.floats.resize(tokens * cols, 0.0);
        runtime.pool.for_chunks(&mut self.floats, cols, fill);
        Ok(())
    }

    /// The quantized activations, if they fit these weights, or an empty buffer that does.
    fn buffer_for(&mut self, w: &Prepacked) -> Result<PrepackedActivations> {
        match self.quantized.take() {
            Some(same) if same.fits(w) => Ok(same),
            _ => {
                self.fresh = false;
                Ok(PrepackedActivations::from_values(&[], &[], w)?)
            }
        }
    }
}

impl LinearLayer {
    /// Bytes of the weights in memory.
    pub(crate) fn bytes(&self) -> usize {
        match &self.weights {
            LinearWeights::Ternary(w) => w.memory(),
            LinearWeights::Dense(w) => w.bytes(),
        }
    }

    /// Integer multiply-adds per token; 0 for a layer that multiplies floats.
    pub(crate) fn integer_products(&self) -> usize {
        match &self.weights {
            LinearWeights::Ternary(w) => w.rows() * w.cols(),
            LinearWeights::Dense(_) => 0,
        }
    }

    /// `out = x · Wᵀ + bias`, `[tokens, N]`, with `x` rotated where the weights are.
    ///
    /// # Errors
    /// [`bitnet_core::Error::NotFinite`], wrapped, if the input is quantized and holds NaN or
    /// infinity.
    pub(crate) fn apply(
        &self,
        runtime: &KernelPool,
        x: &mut LayerInput,
        out: &mut [f32],
    ) -> Result<()> {
        let (kernels, pool, bias) = (&runtime.kernels, &runtime.pool, self.bias.as_deref());
        let x = x.in_basis(runtime, self.rotation.as_ref());
        match &self.weights {
            LinearWeights::Dense(w) => kernels.dense_matmul(pool, w, &x.floats, bias, out),
            LinearWeights::Ternary(w) => {
                let mut quantized = x.buffer_for(w)?;
                if !x.fresh {
                    quantized.requantize(kernels, &x.floats)?;
                }
                kernels.matmul(pool, w, &quantized, bias, out);
                (x.quantized, x.fresh) = (Some(quantized), true);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_core::random::Random;
    use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
    use bitnet_kernels::dense::DenseData;

    const ROWS: usize = 24;
    const COLS: usize = 96;
    const TOKENS: usize = 3;

    fn layer(seed: u64, ternary: bool, rotation: Option<&Hadamard>) -> LinearLayer {
        let mut random = Random::new(seed);
        let weights = if ternary {
            let values = (0..ROWS * COLS).map(|_| (random.bits() % 3) as i8 - 1);
            let matrix = Matrix {
                spec: MatrixSpec::new(ROWS, COLS, Precision::Ternary, Granularity::Tensor),
                values: values.collect(),
                scales: vec![0.5],
                zero_points: vec![],
            };
            LinearWeights::Ternary(Prepacked::new(&matrix, &Pool::single()).unwrap())
        } else {
            let w = (0..ROWS * COLS).map(|_| random.uniform() as f32 - 0.5);
            let data = DenseData::F32(w.collect());
            LinearWeights::Dense(DenseMatrix::new(ROWS, COLS, data).unwrap())
        };
        LinearLayer {
            weights,
            bias: None,
            rotation: rotation.cloned(),
        }
    }

    /// Layers of one input, in any mix of bases and kinds: each result has the bits of the layer
    /// alone, on an input that the oracle rotated.
    #[test]
    fn layers_of_one_input_share_its_rotation() {
        let signs: Vec<i8> = (0..COLS).map(|i| if i % 5 < 2 { -1 } else { 1 }).collect();
        let rotation = Hadamard::new(COLS, 32, Some(&signs)).unwrap();
        let runtime = KernelPool {
            kernels: Kernels::detect(),
            pool: Pool::new(2).unwrap(),
        };
        let (none, some) = (None, Some(&rotation));
        let mut shared = LayerInput::default();
        for (turn, kinds) in [
            &[(false, some), (false, some)][..],
            &[(false, none), (false, some)],
            &[(true, some), (true, some)],
            &[(true, none), (true, some), (true, none)],
            &[(true, some), (false, some)],
            &[(false, none), (true, some), (true, some), (false, some)],
            &[(true, none), (true, none)],
        ]
        .into_iter()
        .enumerate()
        {
            let layers: Vec<LinearLayer> = kinds
                .iter()
                .zip(0..)
                .map(|(&(ternary, rotation), seed)| layer(seed, ternary, rotation))
                .collect();
            let mut random = Random::new(turn as u64);
            let x: Vec<f32> = (0..TOKENS * COLS)
                .map(|_| random.uniform() as f32 - 0.5)
                .collect();
            let fill =
                |token: usize, out: &mut [f32]| out.copy_from_slice(&x[token * COLS..][..COLS]);
            let all: Vec<&LinearLayer> = layers.iter().collect();
            shared.write(&runtime, &all, (TOKENS, COLS), fill).unwrap();
            for (i, layer) in layers.iter().enumerate() {
                let mut got = vec![0.0; TOKENS * ROWS];
                layer.apply(&runtime, &mut shared, &mut got).unwrap();
                let mut rotated = x.clone();
                if let Some(rotation) = &layer.rotation {
                    rotation.rotate(&mut rotated);
                }
                let alone = LinearLayer {
                    rotation: None,
                    ..self::layer(i as u64, kinds[i].0, None)
                };
                let (mut own, mut expected) = (LayerInput::default(), vec![0.0; TOKENS * ROWS]);
                let fill = |token: usize, out: &mut [f32]| {
                    out.copy_from_slice(&rotated[token * COLS..][..COLS]);
                };
                own.write(&runtime, &[&alone], (TOKENS, COLS), fill)
                    .unwrap();
                alone.apply(&runtime, &mut own, &mut expected).unwrap();
                assert_eq!(got, expected, "turn {turn}, layer {i}");
            }
        }
    }
}
