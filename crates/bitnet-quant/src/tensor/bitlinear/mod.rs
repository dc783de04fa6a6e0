//! BitLinear: a linear layer with low-bit weights and activations.
//!
//! ```text
//! Y = dequantize(quantize(norm(X))) · dequantize(quantize(W))ᵀ + bias        X […, K], W [N, K], Y […, N]
//!
//!            pack                      latent: float weights that train (a QatLinear)
//! latent ───────────► packed           packed: the kernel layout alone
//!        ◄───────────
//!           unpack
//! ```
//!
//! Both multiply the same integers. A latent layer passes gradients through the rounding (straight-
//! through estimator): `dX = dY · Ŵ`, `dW = dYᵀ · X̂`, `db = Σ dY`. A packed layer has a gradient
//! for its input alone. Without gradients a latent layer packs its weights at the first forward
//! pass, and again when they have changed.

mod config;
mod norm;
mod speedup;

pub use config::{BitLinearConfig, BitLinearConfigBuilder};
pub use norm::SubNorm;
pub use speedup::Speedup;

use super::latent::{NonFinite, QatLinear, StraightThroughEstimator};
use super::packed::{PackedProduct, PackedWeights};
use super::runtime::Runtime;
use super::{into_candle, not_empty, token_shape, with_floats};
use crate::{Activations, QuantizationConfig};
use crate::{Error, Result};
use bitnet_checkpoint::forms::Forms;
use bitnet_checkpoint::rows;
use bitnet_core::{Matrix, MatrixSpec};
use bitnet_formats::{Content, Source};
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::VarBuilder;
use norm::InputNorm;
use std::sync::{Arc, Mutex, PoisonError};
use xxhash_rust::xxh3::Xxh3;

#[derive(Debug, Clone)]
enum LayerWeights {
    Latent(Box<QatLinear>),
    Packed {
        weights: Arc<PackedWeights>,
        bias: Option<Tensor>,
    },
}

/// Packed weights and the checksum of the latent weights that they were made from.
type PackedCache = Mutex<Option<(u128, Arc<PackedWeights>)>>;

/// A linear layer with low-bit weights and activations; the equations are in the [module's
/// text](self).
///
/// ```
/// use bitnet_quant::prelude::*;
/// use candle_core::{Device, Module, Tensor};
/// let mut layer = BitLinear::new(BitLinearConfig::new(64, 32))?;
/// let x = Tensor::randn(0f32, 1f32, (2, 5, 64), &Device::Cpu)?;
/// let y = layer.forward(&x)?; // latent: differentiable in x and the weights
/// layer.pack()?;
/// let packed = layer.forward(&x)?;
/// assert_eq!(packed.dims(), [2, 5, 32]);
/// assert!((y - packed)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-4);
/// assert!(layer.memory_reduction_percentage() > 80.0);
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug)]
pub struct BitLinear {
    in_features: usize,
    out_features: usize,
    config: QuantizationConfig,
    activations: Activations,
    norm: Option<InputNorm>,
    weights: LayerWeights,
    cache: PackedCache,
    runtime: Arc<Runtime>,
}

impl BitLinear {
    /// A layer whose weights are drawn from a normal distribution of variance 1/K. A bias begins
    /// with zeros, a norm with ones. All of them are variables.
    ///
    /// # Errors
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) naming each wrong field.
    pub fn new(config: BitLinearConfig) -> Result<Self> {
        config.validate()?;
        let (k, n) = (config.in_features, config.out_features);
        let weight = Var::randn(0f32, (k as f32).recip().sqrt(), (n, k), &Device::Cpu)?;
        let variable = |fill: f32, len: usize| {
            Var::from_tensor(&Tensor::full(fill, len, &Device::Cpu)?).map(|v| v.as_tensor().clone())
        };
        let bias = config.bias.then(|| variable(0.0, n)).transpose()?;
        let norm = match config.norm {
            None => None,
            Some(kind) => Some(InputNorm {
                kind,
                eps: config.norm_eps,
                gain: variable(1.0, k)?,
                shift: match kind {
                    SubNorm::Layer => Some(variable(0.0, k)?),
                    SubNorm::Rms => None,
                },
            }),
        };
        Self::latent(&config, weight.as_tensor().clone(), bias, norm)
    }

    /// A layer on float weights, packed at once if the configuration says so.
    fn latent(
        config: &BitLinearConfig,
        weight: Tensor,
        bias: Option<Tensor>,
        norm: Option<InputNorm>,
    ) -> Result<Self> {
        let mut layer = Self {
            in_features: config.in_features,
            out_features: config.out_features,
            weights: latent_weights(weight, bias, &config.config)?,
            activations: config.config.activations.unwrap_or_default(),
            norm,
            cache: Mutex::new(None),
            runtime: Runtime::shared(&config.config.compute)?,
            config: config.config.clone(),
        };
        if config.packed {
            layer.pack()?;
        }
        Ok(layer)
    }

    /// A layer without norm from weights `[N, K]` and a bias `[N]`. Variables among them get
    /// gradients.
    ///
    /// # Errors
    /// [`Error::Input`] for shapes, types, devices, a bias or a norm that do not fit the
    /// configuration.
    pub fn from_tensors(
        weight: Tensor,
        bias: Option<Tensor>,
        config: &BitLinearConfig,
    ) -> Result<Self> {
        config.validate()?;
        let expected = [config.out_features, config.in_features];
        if weight.dims() != expected {
            return Err(Error::input(
                "weight",
                format!("shape {expected:?}"),
                format!("{:?}", weight.dims()),
            ));
        }
        check_bias(bias.as_ref(), config.out_features)?;
        if bias.is_some() != config.bias {
            return Err(Error::input(
                "bias",
                if config.bias { "one" } else { "none" },
                if config.bias { "none" } else { "one" },
            ));
        }
        if let Some(norm) = config.norm {
            return Err(Error::input(
                "norm",
                "none; BitLinear::load takes its weights",
                format!("{norm:?}"),
            ));
        }
        super::check_kind(&weight)?;
        Self::latent(config, weight, bias, None)
    }

    /// Loads `weight`, and `bias`, `rms_norm.weight`, `layer_norm.weight` and `layer_norm.bias` as
    /// configured.
    ///
    /// # Errors
    /// [`Error::Candle`] for tensors that are missing or of another shape.
    pub fn load(vb: VarBuilder<'_>, config: &BitLinearConfig) -> Result<Self> {
        config.validate()?;
        let (k, n) = (config.in_features, config.out_features);
        let weight = vb.get((n, k), "weight")?;
        let bias = config.bias.then(|| vb.get(n, "bias")).transpose()?;
        let norm = match config.norm {
            None => None,
            Some(kind) => Some(InputNorm {
                kind,
                eps: config.norm_eps,
                gain: match kind {
                    SubNorm::Rms => vb.get(k, "rms_norm.weight")?,
                    SubNorm::Layer => vb.get(k, "layer_norm.weight")?,
                },
                shift: match kind {
                    SubNorm::Rms => None,
                    SubNorm::Layer => Some(vb.get(k, "layer_norm.bias")?),
                },
            }),
        };
        Self::latent(config, weight, bias, norm)
    }

    /// Reads `{name}.weight`, and `{name}.bias` if there is one, from a checkpoint that [`Source`]
    /// opens. Weights that are quantized there keep their values and scales and make a packed
    /// layer; floats make a latent one, with the choices that the configuration has for this name.
    /// A weight that is stored `[K, N]`, as in GPT-2, is transposed.
    ///
    /// # Errors
    /// [`Error::Input`] if there is no such matrix,
    /// [`CheckpointError::File`](crate::CheckpointError::File) for what cannot be read.
    pub fn open(source: &Source, name: &str, config: &QuantizationConfig) -> Result<Self> {
        let absent = |what: String| Error::input("layer", format!("a matrix '{what}'"), "none");
        let weight = format!("{name}.weight");
        let tensor = source.find(&weight).ok_or_else(|| absent(weight.clone()))?;
        source.refuse_rotated(&weight)?;
        let form = Forms::new(source)
            .form(tensor)
            .ok_or_else(|| absent(weight.clone()))?;
        let (n, k) = match &tensor.content {
            Content::Quantized(q) => (q.spec.rows, q.spec.cols),
            _ => (form.rows, form.cols),
        };
        let bias = match source.find(&format!("{name}.bias")) {
            Some(bias) => Some(Tensor::from_vec(
                rows::read_all(source, bias)?,
                n,
                &Device::Cpu,
            )?),
            None => None,
        };
        let config = QuantizationConfig {
            default: config.choices_for(&weight)?,
            ..config.clone()
        };
        let config = BitLinearConfig {
            bias: bias.is_some(),
            config,
            ..BitLinearConfig::new(k, n)
        };
        match &tensor.content {
            Content::Quantized(q) => {
                Self::from_matrix(&source.matrix(&tensor.name, q)?, bias, &config.config)
            }
            _ => Self::from_tensors(
                Tensor::from_vec(rows::read_matrix(source, tensor)?.0, (n, k), &Device::Cpu)?,
                bias,
                &config,
            ),
        }
    }

    /// A packed layer from quantized weights, which keep their values and scales, and a bias `[N]`.
    ///
    /// # Errors
    /// What [`Matrix::validate`] finds;
    /// [`CheckpointError::Kernels`](crate::CheckpointError::Kernels) for a matrix that has no
    /// product.
    pub fn from_matrix(
        matrix: &Matrix,
        bias: Option<Tensor>,
        config: &QuantizationConfig,
    ) -> Result<Self> {
        matrix.validate()?;
        let (n, k) = (matrix.spec.rows, matrix.spec.cols);
        let layer = BitLinearConfig {
            config: config.clone(),
            ..BitLinearConfig::new(k, n)
        };
        layer.validate()?;
        check_bias(bias.as_ref(), n)?;
        let runtime = Runtime::shared(&config.compute)?;
        Ok(Self {
            in_features: k,
            out_features: n,
            weights: LayerWeights::Packed {
                weights: Arc::new(PackedWeights::new(matrix, &runtime)?),
                bias,
            },
            activations: config.activations.unwrap_or_default(),
            norm: None,
            cache: Mutex::new(None),
            runtime,
            config: layer.config,
        })
    }

    /// Quantizes latent weights and drops the floats; from then on only the input gets a gradient.
    /// A packed layer stays as it is.
    ///
    /// # Errors
    /// [`CheckpointError::Core`](crate::CheckpointError::Core) for NaN,
    /// [`CheckpointError::Kernels`](crate::CheckpointError::Kernels) for a scheme that has no
    /// product.
    pub fn pack(&mut self) -> Result<()> {
        if let LayerWeights::Latent(layer) = &self.weights {
            self.weights = LayerWeights::Packed {
                weights: self.packed_latent(layer)?,
                bias: layer.bias().map(Tensor::detach),
            };
            if let Some(norm) = &mut self.norm {
                norm.gain = norm.gain.detach();
                norm.shift = norm.shift.as_ref().map(Tensor::detach);
            }
            *self.cache.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        }
        Ok(())
    }

    /// Turns packed weights into latent ones, a variable with the dequantized values. A latent
    /// layer stays as it is.
    ///
    /// # Errors
    /// [`Error::Candle`] if candle refuses them.
    pub fn unpack(&mut self) -> Result<()> {
        if let LayerWeights::Packed { weights, bias } = &self.weights {
            let floats = weights.unpack(&self.runtime).dequantize();
            let shape = (self.out_features, self.in_features);
            let weight = Var::from_vec(floats, shape, &Device::Cpu)?;
            let weight = weight.as_tensor().clone();
            self.weights = latent_weights(weight, bias.clone(), &self.config)?;
        }
        Ok(())
    }

    /// The latent weights `[N, K]`; `None` if the layer is packed.
    pub fn weight(&self) -> Option<&Tensor> {
        match &self.weights {
            LayerWeights::Latent(layer) => Some(layer.weight()),
            LayerWeights::Packed { .. } => None,
        }
    }

    /// The bias `[N]`.
    pub fn bias(&self) -> Option<&Tensor> {
        match &self.weights {
            LayerWeights::Latent(layer) => layer.bias(),
            LayerWeights::Packed { bias, .. } => bias.as_ref(),
        }
    }

    /// The quantized weights: values, scales and their spec.
    ///
    /// # Errors
    /// [`CheckpointError::Core`](crate::CheckpointError::Core) for NaN among latent weights.
    pub fn quantized_weights(&self) -> Result<Matrix> {
        match &self.weights {
            LayerWeights::Latent(layer) => layer.quantized_weights(),
            LayerWeights::Packed { weights, .. } => Ok(weights.unpack(&self.runtime)),
        }
    }

    /// Latent weights packed: from the cache while they have not changed.
    fn packed_latent(&self, layer: &QatLinear) -> Result<Arc<PackedWeights>> {
        let checksum = with_floats(layer.weight(), |w| Ok(checksum(w)))?;
        if let Some(packed) = self.cached(checksum) {
            return Ok(packed);
        }
        let packed = Arc::new(PackedWeights::new(
            &layer.quantized_weights()?,
            &self.runtime,
        )?);
        *self.cache.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((checksum, packed.clone()));
        Ok(packed)
    }

    /// What the cache holds for latent weights of this checksum.
    fn cached(&self, checksum: u128) -> Option<Arc<PackedWeights>> {
        let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let (key, packed) = cache.as_ref()?;
        (*key == checksum).then(|| packed.clone())
    }

    fn packed_weights(&self) -> Result<Arc<PackedWeights>> {
        match &self.weights {
            LayerWeights::Latent(layer) => self.packed_latent(layer),
            LayerWeights::Packed { weights, .. } => Ok(weights.clone()),
        }
    }

    /// Whether the packed form of the latent weights is cached and they have not changed since.
    ///
    /// # Errors
    /// [`Error::Input`] for weights on another device.
    pub fn is_cached(&self) -> Result<bool> {
        let LayerWeights::Latent(layer) = &self.weights else {
            return Ok(false);
        };
        let checksum = with_floats(layer.weight(), |w| Ok(checksum(w)))?;
        Ok(self.cached(checksum).is_some())
    }

    /// The forward pass as a part of the graph: latent weights, bias and norm get gradients.
    fn differentiable(&self, x: &Tensor) -> Result<Tensor> {
        let x = match &self.norm {
            Some(norm) => norm.forward(x)?,
            None => x.clone(),
        };
        match &self.weights {
            LayerWeights::Latent(layer) => {
                let y = layer.product(&x.to_dtype(DType::F32)?, NonFinite::Refuse)?;
                Ok(y.to_dtype(x.dtype())?)
            }
            LayerWeights::Packed { weights, bias } => {
                let product = PackedProduct {
                    weights: weights.clone(),
                    runtime: self.runtime.clone(),
                    activations: self.activations,
                };
                let y = product.apply(&x)?;
                match bias {
                    Some(bias) => Ok(y.broadcast_add(&bias.to_dtype(y.dtype())?)?),
                    None => Ok(y),
                }
            }
        }
    }

    /// The forward pass apart from the graph. With quantized activations all memory but the output
    /// comes from pools.
    fn packed_forward(&self, x: &Tensor, packed: &PackedWeights) -> Result<Tensor> {
        let (tokens, k) = token_shape(x)?;
        let (n, runtime) = (self.out_features, &*self.runtime);
        let mut out = vec![0.0; tokens * n];
        with_floats(x, |x| match &self.norm {
            None => {
                self.with_bias(|bias| packed.product(runtime, x, self.activations, bias, &mut out))
            }
            Some(norm) => {
                let mut normed = runtime.memory.take(x.len());
                normed.copy_from_slice(x);
                norm.apply_in_place(&mut normed, k)?;
                self.with_bias(|bias| {
                    packed.product(runtime, &normed, self.activations, bias, &mut out)
                })
            }
        })?;
        let y = match x.dims() {
            [_] => Tensor::from_vec(out, n, &Device::Cpu)?,
            [a, _] => Tensor::from_vec(out, (*a, n), &Device::Cpu)?,
            [a, b, _] => Tensor::from_vec(out, (*a, *b, n), &Device::Cpu)?,
            [rest @ .., _] => Tensor::from_vec(out, [rest, &[n]].concat(), &Device::Cpu)?,
            [] => {
                return Err(Error::input(
                    "activations",
                    "at least 1 dimension",
                    "a scalar",
                ));
            }
        };
        if x.dtype() == DType::F32 {
            Ok(y)
        } else {
            Ok(y.to_dtype(x.dtype())?)
        }
    }

    fn with_bias<T>(&self, f: impl FnOnce(Option<&[f32]>) -> Result<T>) -> Result<T> {
        match self.bias() {
            Some(bias) => with_floats(bias, |b| f(Some(b))),
            None => f(None),
        }
    }

    /// The forward pass: as a part of the graph where `train`; otherwise apart from it, even if the
    /// weights are variables.
    ///
    /// # Errors
    /// [`Error::Input`] for another number of features, device or type.
    pub fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        super::check_kind(x)?;
        not_empty(x)?;
        let (_, k) = token_shape(x)?;
        if k != self.in_features {
            return Err(Error::input(
                "input",
                format!("{} features", self.in_features),
                format!("shape {:?}", x.dims()),
            ));
        }
        if train {
            self.differentiable(x)
        } else {
            self.packed_forward(x, &*self.packed_weights()?)
        }
    }

    /// Bytes of the weights as they are held: latent floats and their packed form, or the packed
    /// form alone.
    pub fn memory_footprint(&self) -> usize {
        match &self.weights {
            LayerWeights::Latent(layer) => {
                let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
                let cached = cache.as_ref().map_or(0, |(_, packed)| packed.bytes());
                layer.weight().elem_count() * layer.weight().dtype().size_in_bytes() + cached
            }
            LayerWeights::Packed { weights, .. } => weights.bytes(),
        }
    }

    /// How much smaller the weights are than f32 weights, in percent, by [`memory_footprint`].
    ///
    /// [`memory_footprint`]: Self::memory_footprint
    pub fn memory_reduction_percentage(&self) -> f64 {
        let floats = 4 * self.in_features * self.out_features;
        100.0 * (1.0 - self.memory_footprint() as f64 / floats as f64)
    }

    /// The spec of the weights that this layer computes with.
    ///
    /// # Errors
    /// [`CheckpointError::Core`](crate::CheckpointError::Core) for a scheme that the shape does not
    /// allow.
    pub fn spec(&self) -> Result<MatrixSpec> {
        match &self.weights {
            LayerWeights::Latent(layer) => {
                Ok(layer.scheme().spec(self.out_features, self.in_features)?)
            }
            LayerWeights::Packed { weights, .. } => Ok(weights.spec().clone()),
        }
    }
}

/// Part of the graph if input, weights, bias or norm are; else apart from it.
impl Module for BitLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let norm = self.norm.as_ref();
        let graph = [
            Some(x),
            self.weight(),
            self.bias(),
            norm.map(|n| &n.gain),
            norm.and_then(|n| n.shift.as_ref()),
        ];
        let graph = graph.into_iter().flatten().any(Tensor::track_op);
        self.forward_t(x, graph).map_err(into_candle)
    }
}

fn latent_weights(
    weight: Tensor,
    bias: Option<Tensor>,
    config: &QuantizationConfig,
) -> Result<LayerWeights> {
    let estimator = StraightThroughEstimator::Plain;
    let layer = QatLinear::with_any_float(weight, bias, None, config, estimator)?;
    Ok(LayerWeights::Latent(Box::new(layer)))
}

fn check_bias(bias: Option<&Tensor>, rows: usize) -> Result<()> {
    match bias {
        Some(bias) if bias.dims() != [rows] => Err(Error::input(
            "bias",
            format!("shape [{rows}]"),
            format!("{:?}", bias.dims()),
        )),
        _ => Ok(()),
    }
}

/// xxh3 of the bits of the weights.
fn checksum(w: &[f32]) -> u128 {
    let mut hash = Xxh3::new();
    let mut bytes = [0; 4096];
    for part in w.chunks(bytes.len() / 4) {
        bytes
            .chunks_exact_mut(4)
            .zip(part)
            .for_each(|(b, w)| b.copy_from_slice(&w.to_le_bytes()));
        hash.update(&bytes[..4 * part.len()]);
    }
    hash.digest128()
}
