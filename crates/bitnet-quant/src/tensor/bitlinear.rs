//! BitLinear: a linear layer with low-bit weights and activations.
//!
//! ```text
//! Y = dequantize(quantize(norm(X))) · dequantize(quantize(W))ᵀ + bias        X […, K], W [N, K], Y […, N]
//! ```
//!
//! A layer is *latent* or *packed*. Latent, it holds float weights; where a gradient is wanted it
//! computes the formula above in floats, with the identity as the gradient of both roundings
//! (straight-through estimator), so that `dX = dY · Ŵ`, `dW = dYᵀ · X̂`, `db = Σ dY`. Packed, it
//! holds the weights in the layout of the kernels and nothing else of them, multiplies integers,
//! and has a gradient for its input alone. A latent layer without gradients packs its weights at
//! the first forward pass and again when they have changed.

use super::kernel::Packed;
use super::runtime::Runtime;
use super::ste::{FakeActivations, FakeWeights, PackedProduct};
use super::{matrix_shape, not_empty, token_shape, with_floats};
use crate::recipe::Choices;
use crate::spec::QuantizationScheme;
use crate::{Activations, QuantizationConfig};
use crate::{CheckpointError, Error, Result};
use bitnet_checkpoint::{matrix, rows};
use bitnet_core::{Matrix, MatrixSpec, Scheme};
use bitnet_formats::{Content, Source};
use candle_core::{D, DType, Device, Module, Tensor, Var};
use candle_nn::{Linear, VarBuilder};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use xxhash_rust::xxh3::Xxh3;

/// A norm between the input and its quantization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubNorm {
    /// `x / √(mean x² + ε) · g`, as in b1.58; its gain is `rms_norm.weight`.
    Rms,
    /// `(x − mean) / √(var + ε) · g + c`, SubLN of BitNet; `layer_norm.weight` and
    /// `layer_norm.bias`.
    Layer,
}

/// What a [`BitLinear`] is to be.
///
/// ```
/// use bitnet_quant::prelude::*;
/// let config = BitLinearConfig::builder().input_features(768).output_features(3072).enable_bias(true).build()?;
/// assert_eq!((config.in_features, config.out_features), (768, 3072));
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct BitLinearConfig {
    /// K.
    pub in_features: usize,
    /// N.
    pub out_features: usize,
    /// Whether there is a bias.
    pub bias: bool,
    /// Whether the layer is packed from the beginning, and so takes no gradient for its weights.
    pub packed: bool,
    /// The norm before quantization.
    pub norm: Option<SubNorm>,
    /// ε of that norm.
    pub norm_eps: f64,
    /// Weights, activations and machine. Weights default to b1.58.
    pub config: QuantizationConfig,
}

impl BitLinearConfig {
    /// Latent, without bias and norm, as b1.58.
    pub fn new(in_features: usize, out_features: usize) -> Self {
        Self {
            in_features,
            out_features,
            bias: false,
            packed: false,
            norm: None,
            norm_eps: 1e-6,
            config: QuantizationConfig::bitnet_158(),
        }
    }

    /// A builder.
    pub fn builder() -> BitLinearConfigBuilder {
        BitLinearConfigBuilder(Self::new(0, 0))
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming each wrong field.
    pub fn validate(&self) -> Result<()> {
        let mut wrong = vec![];
        for (name, got) in [
            ("in_features", self.in_features),
            ("out_features", self.out_features),
        ] {
            if got == 0 || got > isize::MAX as usize / 1024 {
                wrong.push(format!("{name}: expected at least 1, got {got}"));
            }
        }
        if !(self.norm_eps > 0.0 && self.norm_eps.is_finite()) {
            wrong.push(format!(
                "norm_eps: expected a positive number, got {}",
                self.norm_eps
            ));
        }
        if let Err(CheckpointError::Invalid(more)) = self.config.validate() {
            wrong.extend(more);
        } else if self.config.default.precision().is_none() {
            wrong.push(format!(
                "default.precision: expected one that is quantized, got {}",
                self.config.default.target()
            ));
        }
        Error::unless_empty(wrong)
    }

    fn scheme(&self) -> Result<Scheme> {
        let scheme = self.config.default.plain_scheme()?;
        scheme.ok_or_else(|| {
            Error::input(
                "precision",
                "one that is quantized",
                self.config.default.target(),
            )
        })
    }
}

/// Builds a [`BitLinearConfig`].
#[derive(Debug, Clone)]
pub struct BitLinearConfigBuilder(BitLinearConfig);

impl BitLinearConfigBuilder {
    /// K.
    pub fn input_features(mut self, features: usize) -> Self {
        self.0.in_features = features;
        self
    }

    /// N.
    pub fn output_features(mut self, features: usize) -> Self {
        self.0.out_features = features;
        self
    }

    /// How weights are quantized.
    pub fn quantization_scheme(mut self, scheme: QuantizationScheme) -> Self {
        self.0.config.default = Choices::from(Scheme::from(scheme));
        self
    }

    /// How the input is quantized.
    pub fn activations(mut self, activations: Activations) -> Self {
        self.0.config.activations = Some(activations);
        self
    }

    /// Whether there is a bias.
    pub fn enable_bias(mut self, bias: bool) -> Self {
        self.0.bias = bias;
        self
    }

    /// Whether to hold packed weights only, instead of latent floats that can be trained.
    pub fn memory_optimization(mut self, packed: bool) -> Self {
        self.0.packed = packed;
        self
    }

    /// A norm between the input and its quantization.
    pub fn sub_norm(mut self, norm: SubNorm) -> Self {
        self.0.norm = Some(norm);
        self
    }

    /// Weights, activations and machine together.
    pub fn config(mut self, config: QuantizationConfig) -> Self {
        self.0.config = config;
        self
    }

    /// The configuration, checked.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming each wrong field.
    pub fn build(self) -> Result<BitLinearConfig> {
        self.0.validate()?;
        Ok(self.0)
    }
}

/// Gain and, for [`SubNorm::Layer`], shift, each of `[K]`.
#[derive(Debug, Clone)]
struct Norm {
    kind: SubNorm,
    eps: f64,
    weight: Tensor,
    bias: Option<Tensor>,
}

#[derive(Debug, Clone)]
enum State {
    /// `[N, K]`.
    Latent(Tensor),
    Packed(Arc<Packed>),
}

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
    scheme: Scheme,
    activations: Activations,
    norm: Option<Norm>,
    bias: Option<Tensor>,
    state: State,
    /// Packed latent weights with the checksum of those they were made from.
    cache: Mutex<Option<(u128, Arc<Packed>)>>,
    runtime: Arc<Runtime>,
}

impl BitLinear {
    /// A layer with normally distributed weights of variance 1/K, no bias (zeros) and no gain
    /// (ones), all of them variables.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming each wrong field.
    pub fn new(config: BitLinearConfig) -> Result<Self> {
        config.validate()?;
        let (k, n) = (config.in_features, config.out_features);
        let weight = Var::randn(0f32, (k as f32).recip().sqrt(), (n, k), &Device::Cpu)?;
        let variable = |fill: f32, len: usize| {
            Var::from_tensor(&Tensor::full(fill, len, &Device::Cpu)?).map(|v| v.as_tensor().clone())
        };
        let bias = if config.bias {
            Some(variable(0.0, n)?)
        } else {
            None
        };
        let norm = match config.norm {
            None => None,
            Some(kind) => {
                let shift = if kind == SubNorm::Layer {
                    Some(variable(0.0, k)?)
                } else {
                    None
                };
                Some(Norm {
                    kind,
                    eps: config.norm_eps,
                    weight: variable(1.0, k)?,
                    bias: shift,
                })
            }
        };
        Self::from_parts(&config, weight.as_tensor().clone(), bias, norm)
    }

    fn from_parts(
        config: &BitLinearConfig,
        weight: Tensor,
        bias: Option<Tensor>,
        norm: Option<Norm>,
    ) -> Result<Self> {
        let mut layer = Self {
            in_features: config.in_features,
            out_features: config.out_features,
            scheme: config.scheme()?,
            activations: config.config.activations.unwrap_or_default(),
            norm,
            bias,
            state: State::Latent(weight),
            cache: Mutex::new(None),
            runtime: Runtime::of(&config.config.compute)?,
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
        if let Some(bias) = bias.as_ref().filter(|b| b.dims() != [config.out_features]) {
            return Err(Error::input(
                "bias",
                format!("shape [{}]", config.out_features),
                format!("{:?}", bias.dims()),
            ));
        }
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
        Self::from_parts(config, weight, bias, None)
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
        let bias = if config.bias {
            Some(vb.get(n, "bias")?)
        } else {
            None
        };
        let norm = match config.norm {
            None => None,
            Some(kind @ SubNorm::Rms) => Some(Norm {
                kind,
                eps: config.norm_eps,
                weight: vb.get(k, "rms_norm.weight")?,
                bias: None,
            }),
            Some(kind @ SubNorm::Layer) => Some(Norm {
                kind,
                eps: config.norm_eps,
                weight: vb.get(k, "layer_norm.weight")?,
                bias: Some(vb.get(k, "layer_norm.bias")?),
            }),
        };
        Self::from_parts(config, weight, bias, norm)
    }

    /// Reads `{name}.weight`, and `{name}.bias` if there is one, from a checkpoint that [`Source`]
    /// opens. Weights that are quantized there keep their values and scales and make a packed
    /// layer; floats make a latent one, with the choices that the configuration has for this name.
    ///
    /// # Errors
    /// [`Error::Input`] if there is no such matrix, [`Error::File`] for what cannot be read.
    pub fn open(source: &Source, name: &str, config: &QuantizationConfig) -> Result<Self> {
        let absent = |what: String| Error::input("layer", format!("a matrix '{what}'"), "none");
        let weight = format!("{name}.weight");
        let tensor = source.find(&weight).ok_or_else(|| absent(weight.clone()))?;
        let (n, k) = tensor
            .matrix_shape()
            .ok_or_else(|| absent(weight.clone()))?;
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
                Tensor::from_vec(rows::read_all(source, tensor)?, (n, k), &Device::Cpu)?,
                bias,
                &config,
            ),
        }
    }

    /// A packed layer from quantized weights, which keep their values and scales, and a bias `[N]`.
    ///
    /// # Errors
    /// What [`Matrix::validate`] finds; [`Error::Kernels`] for a matrix that has no product.
    pub fn from_matrix(
        matrix: &Matrix,
        bias: Option<Tensor>,
        config: &QuantizationConfig,
    ) -> Result<Self> {
        matrix.validate()?;
        let (n, k) = (matrix.spec.rows, matrix.spec.cols);
        let config = BitLinearConfig {
            config: config.clone(),
            ..BitLinearConfig::new(k, n)
        };
        config.validate()?;
        if let Some(bias) = bias.as_ref().filter(|b| b.dims() != [n]) {
            return Err(Error::input(
                "bias",
                format!("shape [{n}]"),
                format!("{:?}", bias.dims()),
            ));
        }
        let runtime = Runtime::of(&config.config.compute)?;
        let state = State::Packed(Arc::new(Packed::new(matrix, &runtime)?));
        Ok(Self {
            in_features: k,
            out_features: n,
            scheme: config.scheme()?,
            activations: config.config.activations.unwrap_or_default(),
            norm: None,
            bias,
            state,
            cache: Mutex::new(None),
            runtime,
        })
    }

    /// Quantizes latent weights and lets go of them; from then on only the input gets a gradient. A
    /// packed layer stays as it is.
    ///
    /// # Errors
    /// [`Error::Core`] for NaN, [`Error::Kernels`] for a scheme that has no product.
    pub fn pack(&mut self) -> Result<()> {
        if let State::Latent(weight) = &self.state {
            self.state = State::Packed(self.packed(weight)?);
            let frozen = |t: &mut Tensor| *t = t.detach();
            self.bias.iter_mut().for_each(frozen);
            self.norm
                .iter_mut()
                .flat_map(|n| [Some(&mut n.weight), n.bias.as_mut()])
                .flatten()
                .for_each(frozen);
            *self.cache.get_mut().unwrap_or_else(PoisonError::into_inner) = None;
        }
        Ok(())
    }

    /// Float weights again: those that packing left, as a variable. A latent layer stays as it is.
    ///
    /// # Errors
    /// [`Error::Candle`] if candle refuses them.
    pub fn unpack(&mut self) -> Result<()> {
        if let State::Packed(packed) = &self.state {
            let floats = packed.unpack(&self.runtime)?.dequantize();
            let weight =
                Tensor::from_vec(floats, (self.out_features, self.in_features), &Device::Cpu)?;
            self.state = State::Latent(Var::from_tensor(&weight)?.as_tensor().clone());
        }
        Ok(())
    }

    /// The latent weights `[N, K]`; `None` if the layer is packed.
    pub fn weight(&self) -> Option<&Tensor> {
        match &self.state {
            State::Latent(weight) => Some(weight),
            State::Packed(_) => None,
        }
    }

    /// The bias `[N]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The quantized weights: values, scales and their spec.
    ///
    /// # Errors
    /// [`Error::Core`] for NaN among latent weights.
    pub fn quantized_weights(&self) -> Result<Matrix> {
        match &self.state {
            State::Latent(weight) => self.quantize(weight),
            State::Packed(packed) => packed.unpack(&self.runtime),
        }
    }

    fn quantize(&self, weight: &Tensor) -> Result<Matrix> {
        let (shape, kernels) = (matrix_shape(weight)?, self.runtime.machine.kernels);
        with_floats(weight, |w| {
            Ok(self
                .runtime
                .install(|| matrix::quantize(kernels, w, shape, &self.scheme, None))?)
        })
    }

    /// Latent weights packed: from the cache if they are those that are in it.
    fn packed(&self, weight: &Tensor) -> Result<Arc<Packed>> {
        let checksum = with_floats(weight, |w| Ok(checksum(w)))?;
        let lock = || self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, packed)) = lock().as_ref().filter(|(of, _)| *of == checksum) {
            return Ok(packed.clone());
        }
        let packed = Arc::new(Packed::new(&self.quantize(weight)?, &self.runtime)?);
        *lock() = Some((checksum, packed.clone()));
        Ok(packed)
    }

    /// Whether the packed form of the latent weights is there and they have not changed since.
    ///
    /// # Errors
    /// [`Error::Input`] for weights on another device.
    pub fn is_cached(&self) -> Result<bool> {
        let State::Latent(weight) = &self.state else {
            return Ok(false);
        };
        let checksum = with_floats(weight, |w| Ok(checksum(w)))?;
        Ok(self
            .cache
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .is_some_and(|(of, _)| *of == checksum))
    }

    /// The norm in candle's operations.
    fn normed(&self, x: &Tensor) -> Result<Tensor> {
        let Some(norm) = &self.norm else {
            return Ok(x.clone());
        };
        let centred = if norm.kind == SubNorm::Layer {
            x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?
        } else {
            x.clone()
        };
        let power = (centred.sqr()?.mean_keepdim(D::Minus1)? + norm.eps)?.sqrt()?;
        let x = centred.broadcast_div(&power)?.broadcast_mul(&norm.weight)?;
        Ok(match &norm.bias {
            Some(bias) => x.broadcast_add(bias)?,
            None => x,
        })
    }

    /// The formula as a part of a graph: in floats for latent weights, which then get a gradient,
    /// in integers for packed ones.
    fn differentiable(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.normed(x)?;
        let y = match &self.state {
            State::Latent(weight) => {
                let x = match self.activations.method() {
                    Some(method) => FakeActivations(method).apply(&x)?,
                    None => x,
                };
                let weight = FakeWeights {
                    scheme: self.scheme,
                    kernels: self.runtime.machine.kernels,
                }
                .apply(weight)?;
                let weight = weight.to_dtype(x.dtype())?;
                let (tokens, k) = token_shape(&x)?;
                let mut shape = x.dims().to_vec();
                shape.splice(shape.len() - 1.., [self.out_features]);
                x.reshape((tokens, k))?
                    .matmul(&weight.t()?)?
                    .reshape(shape)?
            }
            State::Packed(packed) => PackedProduct {
                packed: packed.clone(),
                runtime: self.runtime.clone(),
                activations: self.activations,
            }
            .apply(&x)?,
        };
        match &self.bias {
            Some(bias) => Ok(y.broadcast_add(&bias.to_dtype(y.dtype())?)?),
            None => Ok(y),
        }
    }

    /// The formula in integers (in floats where activations stay floats). With quantized
    /// activations all but the output is pooled memory.
    fn integer(&self, x: &Tensor, packed: &Packed) -> Result<Tensor> {
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
                norm.apply(&mut normed, k)?;
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
        match &self.bias {
            Some(bias) => with_floats(bias, |b| f(Some(b))),
            None => f(None),
        }
    }

    fn run(&self, x: &Tensor, train: bool) -> Result<Tensor> {
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
        match &self.state {
            _ if train => self.differentiable(x),
            State::Latent(weight) => self.integer(x, &*self.packed(weight)?),
            State::Packed(packed) => self.integer(x, packed),
        }
    }

    /// Bytes of the weights as they are held: latent floats and their packed form, or the packed
    /// form alone.
    pub fn memory_footprint(&self) -> usize {
        let cached = self
            .cache
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map_or(0, |(_, packed)| packed.bytes());
        match &self.state {
            State::Latent(weight) => weight.elem_count() * weight.dtype().size_in_bytes() + cached,
            State::Packed(packed) => packed.bytes(),
        }
    }

    /// How much smaller than f32 weights they are, in percent: from the buffers that are there.
    pub fn memory_reduction_percentage(&self) -> f64 {
        100.0
            * (1.0
                - self.memory_footprint() as f64
                    / (4 * self.in_features * self.out_features) as f64)
    }

    /// The spec of the weights that this layer computes with.
    ///
    /// # Errors
    /// [`Error::Core`] for a scheme that cannot be.
    pub fn spec(&self) -> Result<MatrixSpec> {
        match &self.state {
            State::Latent(_) => Ok(self.scheme.spec(self.out_features, self.in_features)?),
            State::Packed(packed) => Ok(packed.spec().clone()),
        }
    }

    /// Times this layer, packed, and candle's f32 [`Linear`] with the same weights on a batch of
    /// `tokens`, turn by turn.
    ///
    /// # Errors
    /// As a forward pass.
    pub fn measure_speedup(&self, tokens: usize) -> Result<Speedup> {
        const TURNS: usize = 9;
        let x = Tensor::randn(0f32, 1f32, (tokens, self.in_features), &Device::Cpu)?;
        not_empty(&x)?;
        let weight = Tensor::from_vec(
            self.quantized_weights()?.dequantize(),
            (self.out_features, self.in_features),
            &Device::Cpu,
        )?;
        let linear = Linear::new(
            weight,
            self.bias
                .as_ref()
                .map(|b| b.to_dtype(DType::F32))
                .transpose()?,
        );
        let packed = match &self.state {
            State::Latent(weight) => self.packed(weight)?,
            State::Packed(packed) => packed.clone(),
        };
        let time = |f: &dyn Fn() -> Result<Tensor>| -> Result<Duration> {
            let start = Instant::now();
            f()?;
            Ok(start.elapsed())
        };
        let (ours, theirs) = (|| self.integer(&x, &packed), || Ok(linear.forward(&x)?));
        let mut times = [vec![], vec![]];
        for turn in 0..=TURNS {
            let pair = [time(&ours)?, time(&theirs)?];
            // The first turn warms caches and pools.
            if turn > 0 {
                times
                    .iter_mut()
                    .zip(pair)
                    .for_each(|(all, one)| all.push(one));
            }
        }
        let [bitlinear, linear] = times.map(|mut all| {
            all.sort_unstable();
            all[TURNS / 2]
        });
        Ok(Speedup { bitlinear, linear })
    }
}

/// Medians of forward passes on the same input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speedup {
    /// This layer, packed.
    pub bitlinear: Duration,
    /// candle's f32 linear layer.
    pub linear: Duration,
}

impl Speedup {
    /// How many times faster this layer is.
    pub fn factor(&self) -> f64 {
        self.linear.as_secs_f64() / self.bitlinear.as_secs_f64().max(1e-12)
    }
}

impl Norm {
    /// In place on rows of `k`.
    fn apply(&self, x: &mut [f32], k: usize) -> Result<()> {
        with_floats(&self.weight, |gain| {
            for row in x.chunks_mut(k) {
                let mean = |f: &dyn Fn(f32) -> f64, row: &[f32]| {
                    row.iter().map(|&x| f(x)).sum::<f64>() / k as f64
                };
                if self.kind == SubNorm::Layer {
                    let centre = mean(&f64::from, row) as f32;
                    row.iter_mut().for_each(|x| *x -= centre);
                }
                let power = (mean(&|x| f64::from(x).powi(2), row) + self.eps).sqrt() as f32;
                row.iter_mut()
                    .zip(gain)
                    .for_each(|(x, g)| *x = *x / power * g);
            }
            Ok(())
        })?;
        match &self.bias {
            None => Ok(()),
            Some(bias) => with_floats(bias, |bias| {
                x.chunks_mut(k)
                    .for_each(|row| row.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
                Ok(())
            }),
        }
    }
}

/// xxh3 of the weights' bits.
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

/// A forward pass: part of the graph if input, weights, bias or norm are; else in integers.
impl Module for BitLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let norm = self
            .norm
            .iter()
            .flat_map(|n| [Some(&n.weight), n.bias.as_ref()]);
        let graph = [Some(x), self.weight(), self.bias()]
            .into_iter()
            .chain(norm)
            .flatten()
            .any(Tensor::track_op);
        self.run(x, graph).map_err(candle)
    }
}

fn candle(error: Error) -> candle_core::Error {
    match error {
        Error::Candle(error) => *error,
        other => candle_core::Error::wrap(other),
    }
}

impl BitLinear {
    /// As a part of the graph where `train`, else apart from it, in integers, even if the weights
    /// are variables.
    ///
    /// # Errors
    /// [`Error::Input`] for another number of features, device or type.
    pub fn forward_t(&self, x: &Tensor, train: bool) -> Result<Tensor> {
        self.run(x, train)
    }
}
