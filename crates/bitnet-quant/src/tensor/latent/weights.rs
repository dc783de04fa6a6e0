//! The fake-quantized weights W̃ as a tensor of the graph, for what is no product with all of them:
//! an embedding, whose rows are looked up.

use super::product::{QuantizedProduct, is_not_finite};
use crate::Result;
use crate::tensor::{contiguous_floats, into_candle, with_floats};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor};

/// W̃ `[N, K]` of W `[N, K]`, and of learned scales if there are any. The gradients are those of
/// [`QatLinear`](super::QatLinear).
pub(super) struct FakeQuantizedWeights(pub(super) QuantizedProduct);

impl FakeQuantizedWeights {
    fn forward(
        &self,
        (storage, layout): (&CpuStorage, &Layout),
        scales: Option<&[f32]>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (op, w) = (&self.0, contiguous_floats(storage, layout)?);
        let shape = layout.shape().dims2()?;
        let codes = match op.lambda > 0.0 {
            true => op.rounding.encode(w, shape, scales).map(Some),
            false => Ok(None),
        };
        let weights = match codes {
            Err(error) if is_not_finite(&error) => vec![f32::NAN; w.len()],
            Err(error) => return Err(into_candle(error)),
            Ok(codes) => {
                let weights = op.mixed_weights(w, codes.as_ref()).map_err(into_candle)?;
                if let Some(codes) = codes {
                    let _ = op.codes.set(codes);
                }
                weights
            }
        };
        Ok((CpuStorage::F32(weights), layout.shape().clone()))
    }

    /// ∂L/∂W and ∂L/∂scales.
    fn backward(&self, w: &Tensor, grad: &Tensor) -> Result<(Tensor, Vec<f32>)> {
        let (op, nan) = (&self.0, |n| vec![f32::NAN; n]);
        if op.lambda > 0.0 && op.codes.get().is_none() {
            let dw = Tensor::from_vec(nan(w.elem_count()), w.shape(), w.device())?;
            return Ok((dw, nan(op.scales)));
        }
        // A copy: the tensor of the graph may be read elsewhere.
        let dw = with_floats(&grad.contiguous()?, |g| {
            Ok(Tensor::from_vec(g.to_vec(), w.shape(), w.device())?)
        })?;
        let of_scales = op.through_rounding(w, &[], &dw)?;
        Ok((dw, of_scales.unwrap_or_else(|| vec![0.0; op.scales])))
    }
}

const NAME: &str = "fake-quantized-weights";

impl CustomOp1 for FakeQuantizedWeights {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, w: &CpuStorage, lw: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward((w, lw), None)
    }

    fn bwd(&self, w: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.backward(w, grad).map_err(into_candle)?.0))
    }
}

impl CustomOp2 for FakeQuantizedWeights {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        w: &CpuStorage,
        lw: &Layout,
        scales: &CpuStorage,
        ls: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.forward((w, lw), Some(contiguous_floats(scales, ls)?))
    }

    fn bwd(
        &self,
        w: &Tensor,
        scales: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (dw, of_scales) = self.backward(w, grad).map_err(into_candle)?;
        let of_scales = Tensor::from_vec(of_scales, scales.shape(), scales.device())?;
        Ok((Some(dw), Some(of_scales)))
    }
}
