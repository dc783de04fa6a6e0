//! Quantizers of candle tensors.

use super::runtime::Runtime;
use super::{check_device, matrix_shape, not_empty, token_shape, with_floats};
use crate::recipe::PrecisionControlConfig;
use crate::spec::{PrecisionAdjustment, PrecisionController, QuantizationStats};
use crate::spec::{QuantizationPrecision, QuantizationSchemeConfig};
use crate::{Compute, QuantizationConfig};
use crate::{Error, Result};
use bitnet_checkpoint::matrix;
use bitnet_core::activation::{self, ActivationGranularity, ActivationMethod};
use bitnet_core::memory::BitNetTensor;
use bitnet_core::pack::{self, Layout};
use bitnet_core::scheme::{Rounding, Scheme, Threshold};
use bitnet_core::stats::ErrorStats;
use bitnet_core::{Granularity, Matrix, MatrixSpec, Precision};
use bitnet_formats::output::AUTO;
use candle_core::{DType, Device, Shape, Tensor};
use std::borrow::Cow;
use std::sync::Arc;

/// A low-bit tensor: values with scales, or their packed bytes.
///
/// ```
/// use bitnet_quant::prelude::*;
/// use candle_core::{Device, Tensor};
/// let weights = Tensor::new(&[[0.9f32, -0.1, 0.2, -0.8], [0.0, 0.7, -0.6, 0.4]], &Device::Cpu)?;
/// let mut quantized = absmean_quantize_weights(&weights, &Device::Cpu)?;
/// assert_eq!(quantized.matrix()?.values, [1, 0, 0, -1, 0, 1, -1, 1]);
/// assert_eq!(quantized.memory_footprint(), 8 + 4); // a byte for each value, one f32 scale
/// quantized.pack_weights()?;
/// assert_eq!(quantized.memory_footprint(), 2 + 4); // two bits for each value
/// assert_eq!(quantized.dequantize()?.dims(), weights.dims());
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct QuantizedTensor {
    shape: Shape,
    dtype: DType,
    stored: StoredWeights,
}

#[derive(Debug, Clone)]
enum StoredWeights {
    Values(Matrix),
    Packed(BitNetTensor),
}

impl QuantizedTensor {
    /// A matrix as a tensor of `shape`, quantized from elements of `dtype`.
    ///
    /// # Errors
    /// [`Error::Input`] if matrix and shape have different numbers of elements; as
    /// [`Matrix::validate`].
    pub fn from_matrix(matrix: Matrix, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        let shape = shape.into();
        matrix.validate()?;
        if matrix.spec.weights_len() != shape.elem_count() {
            return Err(Error::input(
                "matrix",
                format!("{} elements for {shape:?}", shape.elem_count()),
                matrix.spec.weights_len(),
            ));
        }
        Ok(Self {
            shape,
            dtype,
            stored: StoredWeights::Values(matrix),
        })
    }

    /// The shape of the original.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Precision, granularity and storage of the scales.
    pub fn spec(&self) -> &MatrixSpec {
        match &self.stored {
            StoredWeights::Values(matrix) => &matrix.spec,
            StoredWeights::Packed(packed) => packed.spec(),
        }
    }

    /// Values and scales, unpacked if necessary.
    ///
    /// # Errors
    /// Errors of a custom [`Layout`].
    pub fn matrix(&self) -> Result<Cow<'_, Matrix>> {
        match &self.stored {
            StoredWeights::Values(matrix) => Ok(Cow::Borrowed(matrix)),
            StoredWeights::Packed(packed) => Ok(Cow::Owned(packed.unpack()?)),
        }
    }

    /// The packed bytes; `None` before packing.
    pub fn packed(&self) -> Option<&BitNetTensor> {
        match &self.stored {
            StoredWeights::Values(_) => None,
            StoredWeights::Packed(packed) => Some(packed),
        }
    }

    /// Packs the values in the plain layout of their precision.
    ///
    /// # Errors
    /// As [`QuantizedTensor::pack_with`].
    pub fn pack_weights(&mut self) -> Result<()> {
        self.pack_with(Some(pack::plain(self.spec().precision)))
    }

    /// Packs the values in a layout; `None` chooses the smallest.
    ///
    /// # Errors
    /// [`CheckpointError::Core`](crate::CheckpointError::Core) if the layout cannot hold them.
    pub fn pack_with(&mut self, layout: Option<&'static dyn Layout>) -> Result<()> {
        self.stored = StoredWeights::Packed(BitNetTensor::pack(&*self.matrix()?, layout)?);
        Ok(())
    }

    /// The dequantized tensor, in shape and type of the original.
    ///
    /// # Errors
    /// As [`QuantizedTensor::matrix`].
    pub fn dequantize(&self) -> Result<Tensor> {
        let floats = Tensor::from_vec(
            self.matrix()?.dequantize(),
            self.shape.clone(),
            &Device::Cpu,
        )?;
        Ok(floats.to_dtype(self.dtype)?)
    }

    /// [`QuantizedTensor::dequantize`]; the counterpart of [`QuantizedTensor::pack_weights`].
    ///
    /// # Errors
    /// As there.
    pub fn unpack_weights(&self) -> Result<Tensor> {
        self.dequantize()
    }

    /// Bytes of values and scales as they are stored now.
    pub fn memory_footprint(&self) -> usize {
        match &self.stored {
            StoredWeights::Values(matrix) => matrix.memory_footprint(),
            StoredWeights::Packed(packed) => packed.memory_footprint(),
        }
    }

    /// Bytes of the original / [`QuantizedTensor::memory_footprint`].
    pub fn compression_ratio(&self) -> f32 {
        (self.shape.elem_count() * self.dtype.size_in_bytes()) as f32
            / self.memory_footprint() as f32
    }

    /// Error and compression relative to `original`.
    ///
    /// # Errors
    /// [`Error::Input`] for another shape, [`CheckpointError::Core`](crate::CheckpointError::Core)
    /// for NaN.
    pub fn stats(&self, original: &Tensor) -> Result<QuantizationStats> {
        if original.shape() != &self.shape {
            return Err(Error::input(
                "original",
                format!("shape {:?}", self.shape),
                format!("{:?}", original.shape()),
            ));
        }
        let matrix = self.matrix()?;
        let mean = |x: &[f32]| {
            (x.iter().map(|&x| f64::from(x)).sum::<f64>() / x.len().max(1) as f64) as f32
        };
        with_floats(original, |x| {
            let moments = bitnet_checkpoint::rows::moments(bitnet_kernels::Kernels::detect(), x)?;
            Ok(QuantizationStats {
                elements_count: x.len(),
                quantization_error: relative_error(&matrix::measure(x, &matrix)),
                compression_ratio: self.compression_ratio(),
                min_value: moments.min,
                max_value: moments.max,
                scale_factor: mean(&matrix.scales),
                zero_point: (!matrix.zero_points.is_empty()).then(|| mean(&matrix.zero_points)),
            })
        })
    }
}

/// `√(Σ(x − x̂)² / Σx²)`; 0 for an exact result.
fn relative_error(error: &ErrorStats) -> f32 {
    if error.noise == 0.0 {
        0.0
    } else {
        (error.noise / error.signal).sqrt() as f32
    }
}

/// The layout by name; `None` for `auto`.
pub(crate) fn layout_named(name: &str) -> Result<Option<&'static dyn Layout>> {
    if name == AUTO {
        Ok(None)
    } else {
        Ok(Some(pack::by_name(name)?))
    }
}

/// A quantizer of tensors. Implement it for your own method.
pub trait Quantizer: Send + Sync {
    /// Quantizes a tensor.
    ///
    /// # Errors
    /// For a tensor that cannot be quantized.
    fn quantize(&self, x: &Tensor) -> Result<QuantizedTensor>;

    /// The dequantized tensor.
    ///
    /// # Errors
    /// As [`QuantizedTensor::dequantize`].
    fn dequantize(&self, quantized: &QuantizedTensor) -> Result<Tensor> {
        quantized.dequantize()
    }
}

/// A [`Quantizer`] that can treat each layer differently.
pub trait WeightQuantizer: Quantizer {
    /// Quantizes weights by their name.
    ///
    /// # Errors
    /// For weights that cannot be quantized or stay float.
    fn quantize_weights(&self, name: &str, weights: &Tensor) -> Result<QuantizedTensor>;
}

/// The quantizer of a [`QuantizationConfig`].
///
/// ```
/// use bitnet_quant::prelude::*;
/// use candle_core::{Device, Tensor};
/// let config = QuantizationConfig::builder().scheme(QuantizationScheme::BitNet158).build()?;
/// let quantizer = BitNetQuantizer::new(config)?;
/// let weights = Tensor::randn(0f32, 1f32, (64, 96), &Device::Cpu)?;
/// let quantized = quantizer.quantize(&weights)?;
/// println!("{:?}", quantized.stats(&weights)?);
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct BitNetQuantizer {
    config: QuantizationConfig,
    runtime: Arc<Runtime>,
    #[cfg(feature = "calibration")]
    calibration: Option<Arc<crate::calibration::Calibration>>,
}

/// A quantizer with any scheme.
pub type ConfigurableQuantizationScheme = BitNetQuantizer;

impl BitNetQuantizer {
    /// Checks the configuration and detects the machine.
    ///
    /// # Errors
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) naming each wrong field; as
    /// [`Runtime::new`].
    pub fn new(config: QuantizationConfig) -> Result<Self> {
        config.validate()?;
        let runtime = Runtime::shared(&config.compute)?;
        Ok(Self {
            config,
            runtime,
            #[cfg(feature = "calibration")]
            calibration: None,
        })
    }

    /// Adds the importance of input channels: for weights in the calibration, rules that can weight
    /// errors do so by importance.
    #[cfg(feature = "calibration")]
    pub fn with_calibration(self, calibration: Arc<crate::calibration::Calibration>) -> Self {
        Self {
            calibration: Some(calibration),
            ..self
        }
    }

    /// The configuration.
    pub fn config(&self) -> &QuantizationConfig {
        &self.config
    }

    #[cfg(feature = "calibration")]
    fn importance(&self, name: &str) -> Option<Vec<f32>> {
        self.calibration
            .as_ref()?
            .layers
            .get(name)
            .map(|l| l.second_moments())
    }

    #[cfg(not(feature = "calibration"))]
    fn importance(&self, _name: &str) -> Option<Vec<f32>> {
        None
    }

    /// b1.58: ternary absmean with one scale, whatever the configuration. Returns the values and
    /// the scale.
    ///
    /// # Errors
    /// As [`quantize_tensor`].
    pub fn quantize_weights_absmean(&self, weights: &Tensor) -> Result<(QuantizedTensor, f32)> {
        let quantized = quantize_tensor(
            &self.runtime,
            weights,
            &Scheme::ternary(Threshold::Absmean),
            None,
        )?;
        let scale = quantized.matrix()?.single_scale()?;
        Ok((quantized, scale))
    }

    /// Quantizes activations `[…, K]` by the configuration, int8 by default, one scale for each
    /// token.
    ///
    /// # Errors
    /// [`Error::Input`] if the configuration keeps them float; as [`quantize_activations`].
    pub fn quantize_activations(&self, x: &Tensor) -> Result<QuantizedTensor> {
        let method = self.config.activations.unwrap_or_default().method();
        let method =
            method.ok_or_else(|| Error::input("activations", "int8, int4 or sign", "float"))?;
        quantize_activations(x, method, ActivationGranularity::Token)
    }

    /// [`Quantizer::quantize`].
    ///
    /// # Errors
    /// As there.
    pub fn quantize_tensor(&self, x: &Tensor) -> Result<QuantizedTensor> {
        self.quantize(x)
    }

    /// [`Quantizer::dequantize`].
    ///
    /// # Errors
    /// As there.
    pub fn dequantize_tensor(&self, quantized: &QuantizedTensor) -> Result<Tensor> {
        self.dequantize(quantized)
    }
}

impl Quantizer for BitNetQuantizer {
    fn quantize(&self, x: &Tensor) -> Result<QuantizedTensor> {
        self.quantize_weights("", x)
    }
}

impl WeightQuantizer for BitNetQuantizer {
    fn quantize_weights(&self, name: &str, weights: &Tensor) -> Result<QuantizedTensor> {
        let choices = self.config.choices_for(name)?;
        let scheme = choices.plain_scheme()?;
        let scheme = scheme.ok_or_else(|| {
            Error::input(
                "precision",
                "one that is quantized",
                format!("{} for '{name}'", choices.target()),
            )
        })?;
        let importance = self.importance(name);
        let mut quantized =
            quantize_tensor(&self.runtime, weights, &scheme, importance.as_deref())?;
        if let Some(layout) = &choices.layout {
            quantized.pack_with(layout_named(layout)?)?;
        }
        Ok(quantized)
    }
}

/// Quantizes a tensor of 1 to 4 dimensions by a scheme; rows are output features, all other
/// dimensions columns.
///
/// `importance` has one number for each column; schemes that can weight errors use it.
///
/// # Errors
/// [`Error::Input`] for another device, type or shape;
/// [`CheckpointError::Core`](crate::CheckpointError::Core) with the position of NaN or infinity,
/// and for an invalid scheme.
pub fn quantize_tensor(
    runtime: &Runtime,
    x: &Tensor,
    scheme: &Scheme,
    importance: Option<&[f32]>,
) -> Result<QuantizedTensor> {
    let shape = matrix_shape(x)?;
    not_empty(x)?;
    let kernels = runtime.machine.kernels;
    let matrix = with_floats(x, |w| {
        Ok(runtime.install(|| matrix::quantize(kernels, w, shape, scheme, importance))?)
    })?;
    Ok(QuantizedTensor {
        shape: x.shape().clone(),
        dtype: x.dtype(),
        stored: StoredWeights::Values(matrix),
    })
}

/// Quantizes activations `[…, K]`.
///
/// # Errors
/// As [`quantize_tensor`].
pub fn quantize_activations(
    x: &Tensor,
    method: ActivationMethod,
    granularity: ActivationGranularity,
) -> Result<QuantizedTensor> {
    let (rows, cols) = token_shape(x)?;
    not_empty(x)?;
    let q = with_floats(x, |x| {
        Ok(activation::quantize(
            x,
            cols,
            method,
            granularity,
            Rounding::HalfEven,
        )?)
    })?;
    let precision = match method {
        ActivationMethod::Int8 => Precision::Int8,
        ActivationMethod::Int4 => Precision::Int4,
        ActivationMethod::Sign => Precision::Binary,
    };
    let granularity = match granularity {
        ActivationGranularity::Token => Granularity::Channel,
        ActivationGranularity::Tensor => Granularity::Tensor,
    };
    let spec = MatrixSpec::new(rows, cols, precision, granularity);
    let matrix = Matrix {
        spec,
        values: q.values,
        scales: q.scales,
        zero_points: vec![],
    };
    Ok(QuantizedTensor {
        shape: x.shape().clone(),
        dtype: x.dtype(),
        stored: StoredWeights::Values(matrix),
    })
}

/// b1.58 weights: `s = mean|W|`, `q = clip(round(W / s), −1, 1)`, one scale for the tensor.
///
/// # Errors
/// As [`quantize_tensor`].
pub fn absmean_quantize_weights(weights: &Tensor, device: &Device) -> Result<QuantizedTensor> {
    check_device(device)?;
    quantize_tensor(
        &*Runtime::shared(&Compute::default())?,
        weights,
        &Scheme::ternary(Threshold::Absmean),
        None,
    )
}

/// b1.58 activations: `q = clip(round(127·x / max|x|), −128, 127)`, one scale for each token.
///
/// # Errors
/// As [`quantize_activations`].
pub fn absmax_quantize_activations(
    activations: &Tensor,
    device: &Device,
) -> Result<QuantizedTensor> {
    check_device(device)?;
    quantize_activations(
        activations,
        ActivationMethod::Int8,
        ActivationGranularity::Token,
    )
}

/// Activations as signs times their mean magnitude, one scale for each token.
///
/// # Errors
/// As [`quantize_activations`].
pub fn sign_quantize_activations(activations: &Tensor, device: &Device) -> Result<QuantizedTensor> {
    check_device(device)?;
    quantize_activations(
        activations,
        ActivationMethod::Sign,
        ActivationGranularity::Token,
    )
}

/// Creates quantizers from configurations.
#[derive(Debug)]
pub struct QuantizerFactory;

impl QuantizerFactory {
    /// The quantizer of a configuration.
    ///
    /// # Errors
    /// As [`BitNetQuantizer::new`].
    pub fn create_weight_quantizer(config: QuantizationConfig) -> Result<BitNetQuantizer> {
        BitNetQuantizer::new(config)
    }
}

/// Creates quantizers for single schemes.
#[derive(Debug)]
pub struct QuantizationSchemeFactory;

impl QuantizationSchemeFactory {
    /// Binary: signs times mean magnitude.
    ///
    /// # Errors
    /// [`Error::Input`] for another device than the CPU.
    pub fn create_one_bit_scheme(device: Device) -> Result<BitNetQuantizer> {
        check_device(&device)?;
        BitNetQuantizer::new(QuantizationConfig::new(QuantizationPrecision::OneBit))
    }

    /// Ternary, b1.58.
    ///
    /// # Errors
    /// [`Error::Input`] for another device than the CPU.
    pub fn create_one_five_eight_bit_scheme(device: Device) -> Result<BitNetQuantizer> {
        check_device(&device)?;
        BitNetQuantizer::new(QuantizationConfig::bitnet_158())
    }

    /// Any scheme.
    ///
    /// # Errors
    /// [`Error::Input`] for another device than the CPU,
    /// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) for parameters that exclude
    /// each other.
    pub fn create_custom_scheme(
        config: QuantizationSchemeConfig,
        device: Device,
    ) -> Result<BitNetQuantizer> {
        check_device(&device)?;
        BitNetQuantizer::new(config.try_into()?)
    }
}

/// Creates a controller for tensors on a device.
///
/// # Errors
/// [`Error::Input`] for another device than the CPU,
/// [`CheckpointError::Invalid`](crate::CheckpointError::Invalid) naming each wrong field.
pub fn create_precision_controller(
    config: PrecisionControlConfig,
    device: Device,
) -> Result<PrecisionController> {
    check_device(&device)?;
    PrecisionController::new(config)
}

/// Quantizes a stream of activations at a precision that follows its quality: signs, 4 or 8 bits,
/// one scale for each token.
///
/// ```
/// use bitnet_quant::prelude::*;
/// use candle_core::{Device, Tensor};
/// let mut stream = StreamingQuantizer::new(PrecisionControlConfig::conservative())?;
/// for _ in 0..4 {
///     let x = Tensor::randn(0f32, 1f32, (8, 256), &Device::Cpu)?;
///     let (quantized, _change) = stream.push(&x)?;
///     assert_eq!(quantized.shape(), x.shape());
/// }
/// assert!(stream.controller().get_performance_summary().average_error < 0.1);
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct StreamingQuantizer {
    controller: PrecisionController,
}

impl StreamingQuantizer {
    /// A stream with this control, limited to the precisions of activations.
    ///
    /// # Errors
    /// As [`PrecisionController::new`].
    pub fn new(control: PrecisionControlConfig) -> Result<Self> {
        Ok(Self {
            controller: PrecisionController::new(control.for_activations())?,
        })
    }

    /// Quantizes the next tensor `[…, K]`. Returns it with a change of precision, if any, which
    /// applies from the next tensor.
    ///
    /// # Errors
    /// As [`quantize_activations`].
    pub fn push(&mut self, x: &Tensor) -> Result<(QuantizedTensor, Option<PrecisionAdjustment>)> {
        let method = match self.controller.precision() {
            Precision::Binary => ActivationMethod::Sign,
            Precision::Int4 => ActivationMethod::Int4,
            _ => ActivationMethod::Int8,
        };
        let quantized = quantize_activations(x, method, ActivationGranularity::Token)?;
        let change = self
            .controller
            .adjust_precision_dynamically(&quantized.stats(x)?)?;
        Ok((quantized, change))
    }

    /// The controller.
    pub fn controller(&self) -> &PrecisionController {
        &self.controller
    }
}
