//! Patches, which make a convolution a linear layer, and pooling. Images are `[B, H, W, C]`,
//! channels last.

use super::{slice, with_elements};
use candle_core::{CpuStorage, CustomOp1, Error, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

/// The patch of size × size pixels around each pixel, with zeros beyond the border: `[B, H, W, C]`
/// to `[B, H, W, size·size·C]`.
///
/// A linear layer over the patches is a convolution and is quantized as such a layer, with a patch
/// as token.
///
/// # Errors
/// For a tensor of another type or shape, or an even size.
pub fn patches(x: &Tensor, size: usize) -> Result<Tensor> {
    let (batch, height, width, channels) = x.dims4()?;
    if size.is_multiple_of(2) {
        return Err(Error::msg(format!(
            "patches: expected an odd size, got {size}"
        )));
    }
    x.contiguous()?.apply_op1(Patches {
        shape: [batch, height, width, channels],
        size,
    })
}

struct Patches {
    shape: [usize; 4],
    size: usize,
}

impl Patches {
    /// Calls `f` with (index in the patches, index in the image) of each run of C elements inside
    /// the image, row by row.
    fn runs(&self, mut f: impl FnMut(usize, usize)) {
        let ([_, height, width, channels], size) = (self.shape, self.size);
        let half = size / 2;
        let mut patch = 0;
        for y in 0..height {
            for x in 0..width {
                for dy in 0..size {
                    for dx in 0..size {
                        let (y, x) = (y + dy, x + dx);
                        if (half..height + half).contains(&y) && (half..width + half).contains(&x) {
                            f(patch, ((y - half) * width + x - half) * channels);
                        }
                        patch += channels;
                    }
                }
            }
        }
    }

    /// Number of elements of an image and of its patches.
    fn sizes(&self) -> (usize, usize) {
        let [_, height, width, channels] = self.shape;
        let image = height * width * channels;
        (image, image * self.size * self.size)
    }
}

impl CustomOp1 for Patches {
    fn name(&self) -> &'static str {
        "patches"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let ([batch, height, width, channels], (image, patched)) = (self.shape, self.sizes());
        let x = slice(storage, layout)?;
        let mut out = vec![0.0; batch * patched];
        if image > 0 {
            out.par_chunks_mut(patched)
                .zip(x.par_chunks(image))
                .for_each(|(out, x)| {
                    self.runs(|to, from| {
                        out[to..to + channels].copy_from_slice(&x[from..from + channels])
                    });
                });
        }
        Ok((
            CpuStorage::F32(out),
            Shape::from((batch, height, width, channels * self.size * self.size)),
        ))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (channels, (image, patched)) = (self.shape[3], self.sizes());
        let mut dx = vec![0.0; x.elem_count()];
        with_elements(grad, |grad| {
            if image > 0 {
                dx.par_chunks_mut(image)
                    .zip(grad.par_chunks(patched))
                    .for_each(|(dx, grad)| {
                        self.runs(|from, to| {
                            dx[to..to + channels]
                                .iter_mut()
                                .zip(&grad[from..from + channels])
                                .for_each(|(d, g)| *d += g)
                        });
                    });
            }
        })?;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// The maximum of each 2 × 2 pixels: `[B, H, W, C]` to `[B, H/2, W/2, C]`. The first of equal
/// maxima gets the gradient.
///
/// # Errors
/// For a tensor of another type or shape, or odd sizes.
pub fn max_pool(x: &Tensor) -> Result<Tensor> {
    let (batch, height, width, channels) = x.dims4()?;
    if !height.is_multiple_of(2) || !width.is_multiple_of(2) {
        return Err(Error::msg(format!(
            "pooling: expected even sizes, got {height} × {width}"
        )));
    }
    x.contiguous()?.apply_op1(MaxPool {
        shape: [batch, height, width, channels],
    })
}

struct MaxPool {
    shape: [usize; 4],
}

impl MaxPool {
    /// Calls `f` with each index of a pooled image and the index of the largest of its four pixels.
    fn largest(&self, x: &[f32], mut f: impl FnMut(usize, usize)) {
        let [_, height, width, channels] = self.shape;
        for y in 0..height / 2 {
            for col in 0..width / 2 {
                for c in 0..channels {
                    let at = |dy, dx| ((2 * y + dy) * width + 2 * col + dx) * channels + c;
                    let mut best = at(0, 0);
                    for other in [at(0, 1), at(1, 0), at(1, 1)] {
                        if x[other] > x[best] {
                            best = other;
                        }
                    }
                    f((y * (width / 2) + col) * channels + c, best);
                }
            }
        }
    }
}

impl CustomOp1 for MaxPool {
    fn name(&self) -> &'static str {
        "max-pool"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let ([batch, height, width, channels], x) = (self.shape, slice(storage, layout)?);
        let image = height * width * channels;
        let mut out = vec![0.0; x.len() / 4];
        if image > 0 {
            out.par_chunks_mut(image / 4)
                .zip(x.par_chunks(image))
                .for_each(|(out, x)| self.largest(x, |to, from| out[to] = x[from]));
        }
        Ok((
            CpuStorage::F32(out),
            Shape::from((batch, height / 2, width / 2, channels)),
        ))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let image: usize = self.shape[1..].iter().product();
        let mut dx = vec![0.0; x.elem_count()];
        with_elements(x, |x| {
            with_elements(grad, |grad| {
                if image > 0 {
                    let inputs = x.par_chunks(image).zip(grad.par_chunks(image / 4));
                    dx.par_chunks_mut(image)
                        .zip(inputs)
                        .for_each(|(dx, (x, grad))| {
                            self.largest(x, |from, to| dx[to] = grad[from])
                        });
                }
            })
        })??;
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}
