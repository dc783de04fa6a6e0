//! Gradient checkpointing: less memory, more time.
//!
//! A segment of the graph, `y = f(x)`, keeps only x and y. Its backward pass computes `f(x)` again,
//! with a graph, and differentiates that.

use crate::tensor::contiguous_floats;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Shape, Storage, Tensor, Var};
use std::cell::RefCell;

thread_local! {
    /// Gradients of the variables inside segments, while [`backward`] runs on this thread.
    static INSIDE: RefCell<Option<GradStore>> = const { RefCell::new(None) };
}

/// The gradients of a scalar `loss` by its variables, including variables inside [`recompute`]d
/// segments. Unlike candle's gradients they do not keep the graph alive.
///
/// # Errors
/// [`Error::Candle`].
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    let before = INSIDE.with(|inside| inside.borrow_mut().replace(GradStore::default()));
    let outside = of_variables(loss);
    let inside = INSIDE.with(|inside| std::mem::replace(&mut *inside.borrow_mut(), before));
    let mut grads = inside.unwrap_or_default();
    for (variable, grad) in outside? {
        add(&mut grads, &variable, grad)?;
    }
    Ok(grads)
}

/// The variables of a graph with their gradients, detached: candle's gradients hold the tensors
/// that they were computed from.
fn of_variables(loss: &Tensor) -> candle_core::Result<Vec<(Tensor, Tensor)>> {
    let variables: Vec<Tensor> = loss
        .sorted_nodes()
        .into_iter()
        .filter(|node| node.is_variable())
        .cloned()
        .collect();
    let mut grads = loss.backward()?;
    Ok(variables
        .into_iter()
        .filter_map(|variable| {
            grads
                .remove(&variable)
                .map(|grad| (variable, grad.detach()))
        })
        .collect())
}

fn add(grads: &mut GradStore, variable: &Tensor, grad: Tensor) -> candle_core::Result<()> {
    let sum = match grads.remove(variable) {
        Some(before) => (before + grad)?,
        None => grad,
    };
    grads.insert(variable, sum);
    Ok(())
}

/// `f(x)` of f32 on the CPU, without keeping its graph: the backward pass, which must be
/// [`backward`], computes `f(x)` a second time. `f` must compute the same both times, and use no
/// part of the graph except `x` and variables.
///
/// ```
/// use bitnet_quant::qat::{backward, recompute};
/// use candle_core::{Device, Tensor, Var};
/// let (w, x) = (Var::new(&[[0.5f32, -1.0], [2.0, 0.25]], &Device::Cpu)?, Var::new(&[[1f32, 2.0]], &Device::Cpu)?);
/// let segment = { let w = w.clone(); move |x: &Tensor| x.matmul(&w)?.tanh()?.matmul(&w) };
/// let plain = segment(&x)?.sqr()?.sum_all()?.backward()?;
/// let lean = backward(&recompute(segment, &x)?.sqr()?.sum_all()?)?;
/// for of in [&w, &x] {
///     assert_eq!(lean.get(of).unwrap().to_vec2::<f32>()?, plain.get(of).unwrap().to_vec2::<f32>()?);
/// }
/// # Ok::<(), bitnet_quant::Error>(())
/// ```
///
/// # Errors
/// What `f` returns; [`Error::Input`] for other types and devices.
pub fn recompute(
    f: impl Fn(&Tensor) -> candle_core::Result<Tensor> + Send + Sync + 'static,
    x: &Tensor,
) -> Result<Tensor> {
    if x.dtype() != DType::F32 || !x.device().is_cpu() {
        return Err(Error::input(
            "segment",
            "f32 on the CPU",
            format!("{} on {:?}", x.dtype().as_str(), x.device().location()),
        ));
    }
    // A variable as argument makes candle differentiate the segment even if x has no gradient and
    // all variables are inside.
    let anchor = Var::zeros((), DType::F32, x.device())?;
    Ok(x.contiguous()?
        .apply_op2(anchor.as_tensor(), RecomputedSegment { f: Box::new(f) })?)
}

struct RecomputedSegment {
    #[allow(clippy::type_complexity, reason = "used once")]
    f: Box<dyn Fn(&Tensor) -> candle_core::Result<Tensor> + Send + Sync>,
}

impl CustomOp2 for RecomputedSegment {
    fn name(&self) -> &'static str {
        "recomputed-segment"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = Tensor::from_slice(contiguous_floats(x, layout)?, layout.shape(), &Device::Cpu)?;
        let y = (self.f)(&x)?.contiguous()?;
        let (storage, layout) = y.storage_and_layout();
        match &*storage {
            Storage::Cpu(y) => Ok((
                CpuStorage::F32(contiguous_floats(y, layout)?.to_vec()),
                layout.shape().clone(),
            )),
            _ => Err(candle_core::Error::msg("a segment gives f32 on the CPU")),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let x = Var::from_tensor(&x.detach())?;
        // The gradient of Σ y·∂L/∂y is that of L through this segment.
        let through = ((self.f)(x.as_tensor())? * grad)?.sum_all()?;
        let mut of_x = None;
        for (variable, grad) in of_variables(&through)? {
            if variable.id() == x.id() {
                of_x = Some(grad);
                continue;
            }
            INSIDE.with(|inside| match &mut *inside.borrow_mut() {
                Some(all) => add(all, &variable, grad),
                None => Err(candle_core::Error::msg(
                    "the graph has recomputed segments: go back by bitnet_quant::qat::backward",
                )),
            })?;
        }
        Ok((of_x, None))
    }
}
