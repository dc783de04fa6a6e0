//! Regularization that draws latent weights to the levels of their scheme.

use super::{Linear, Linears, QatLinear};
use crate::tensor::latent::{RoundedGranules, WeightCodes, divisor};
use crate::tensor::{contiguous_floats, into_candle, with_floats};
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Tensor};
use std::sync::OnceLock;

/// Distance of weights to their levels, `mean ((w − ŵ)/s)²` over the weights of all layers in
/// training, where s is the mean scale of the layer. ŵ and s get no gradient: it is `2·(w −
/// ŵ)/(s²·ΣN)`. Add it to the loss with a small factor.
///
/// # Errors
/// [`Error::Input`] if no layer is in training,
/// [`CheckpointError::Core`](crate::CheckpointError::Core) for NaN among the weights.
pub fn level_distance(model: &mut dyn Linears) -> Result<Tensor> {
    let (mut sum, mut weights) = (None::<Tensor>, 0);
    model.visit_linears(&mut |_, linear| {
        if let Linear::Qat(layer) = linear {
            let of_layer = match layer.weight().device().is_cpu() {
                true => layer.weight().contiguous()?.apply_op1(LevelDistance {
                    layer: (**layer).clone(),
                    codes: OnceLock::new(),
                })?,
                false => on_device(layer)?,
            };
            weights += layer.weight().elem_count();
            sum = Some(match &sum {
                None => of_layer,
                Some(sum) => (sum + of_layer)?,
            });
        }
        Ok(())
    })?;
    let sum = sum.ok_or_else(|| Error::input("model", "layers in training", "none"))?;
    Ok((sum * (weights as f64).recip())?)
}

/// `Σ ((w − ŵ)/s)²` in candle's operations.
pub(super) fn on_device(layer: &QatLinear) -> Result<Tensor> {
    let (w, RoundedGranules { values, step }) = layer.rounded()?;
    let away = (w - values.broadcast_mul(&step)?)?;
    Ok(away
        .broadcast_div(&divisor(&step.abs()?.mean_all()?)?)?
        .sqr()?
        .sum_all()?)
}

/// `Σ ((w − ŵ)/s)²` as one operation, on the CPU.
struct LevelDistance {
    layer: QatLinear,
    codes: OnceLock<WeightCodes>,
}

impl LevelDistance {
    /// Ŵ and 1/s².
    fn levels(&self, codes: &WeightCodes) -> Result<(Vec<f32>, f64)> {
        let scale = codes.mean_scale();
        Ok((
            codes.dequantize(self.layer.runtime())?,
            if scale > 0.0 { scale.powi(-2) } else { 0.0 },
        ))
    }
}

impl CustomOp1 for LevelDistance {
    fn name(&self) -> &'static str {
        "level-distance"
    }

    fn cpu_fwd(&self, w: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let codes = self.layer.codes().map_err(into_candle)?;
        let (levels, factor) = self.levels(&codes).map_err(into_candle)?;
        let sum: f64 = contiguous_floats(w, layout)?
            .iter()
            .zip(&levels)
            .map(|(w, v)| f64::from(w - v).powi(2))
            .sum();
        let _ = self.codes.set(codes);
        Ok((
            CpuStorage::F32(vec![(sum * factor) as f32]),
            Shape::from(()),
        ))
    }

    fn bwd(&self, w: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let Some(codes) = self.codes.get() else {
            return Ok(None);
        };
        let (mut out, factor) = self.levels(codes).map_err(into_candle)?;
        let factor = (2.0 * factor * f64::from(grad.to_scalar::<f32>()?)) as f32;
        let done = with_floats(w, |w| {
            out.iter_mut()
                .zip(w)
                .for_each(|(out, w)| *out = factor * (w - *out));
            Ok(())
        });
        done.map_err(into_candle)?;
        Ok(Some(Tensor::from_vec(out, w.shape(), &Device::Cpu)?))
    }
}
