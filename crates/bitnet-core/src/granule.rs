//! A granule: the weights that share one scale, wherever they are.

use crate::{Error, Result};

/// Weights that share one scale; a rule may visit them several times.
///
/// A row in memory is a granule, and so is a tensor that is larger than memory and read strip by
/// strip.
pub trait Granule {
    /// Errors of a visit.
    type Error: From<Error>;

    /// Calls `map` with the offset and the weights of each strip and joins the results in the order
    /// of the data.
    ///
    /// Several threads may visit strips at once. Every visit cuts the same strips.
    ///
    /// # Errors
    /// If the weights cannot be read.
    fn fold<T: Send>(
        &self,
        map: impl Fn(usize, &[f32]) -> T + Sync,
        join: impl Fn(T, T) -> T,
    ) -> Result<T, Self::Error>;
}

/// Weights of a strip of a granule in memory. The last bits of sums depend on it, so every fold
/// over memory cuts there.
pub const STRIP: usize = 1 << 18;

impl Granule for [f32] {
    type Error = Error;

    fn fold<T: Send>(
        &self,
        map: impl Fn(usize, &[f32]) -> T + Sync,
        join: impl Fn(T, T) -> T,
    ) -> Result<T> {
        let strips = self
            .chunks(STRIP)
            .enumerate()
            .map(|(i, strip)| map(i * STRIP, strip));
        Ok(strips.reduce(join).unwrap_or_else(|| map(0, &[])))
    }
}

/// Importance of input channels, repeated along the rows of a granule: weight `i` has the
/// importance `h[i % h.len()]`.
#[derive(Debug, Clone, Copy)]
pub struct Importance<'a>(&'a [f32]);

impl<'a> Importance<'a> {
    /// One importance for each column of the granule.
    ///
    /// # Errors
    /// [`Error::Scheme`] for a negative or non-finite importance, or if all are 0.
    pub fn new(columns: &'a [f32]) -> Result<Self> {
        if let Some((i, h)) = columns
            .iter()
            .enumerate()
            .find(|(_, h)| !(h.is_finite() && **h >= 0.0))
        {
            return Err(Error::Scheme(format!(
                "importance of column {i} is {h}; it must be finite and not negative"
            )));
        }
        if columns.iter().all(|&h| h == 0.0) {
            return Err(Error::Scheme("every importance is 0".into()));
        }
        Ok(Self(columns))
    }

    /// The importance of columns `start..start + len`; `None`, i.e. equal importance, if all are 0.
    pub(crate) fn columns(&self, start: usize, len: usize) -> Option<Self> {
        let part = &self.0[start..start + len];
        part.iter().any(|&h| h > 0.0).then_some(Self(part))
    }

    /// Calls `f` for each stretch of `w` that lies in one row, with its importance. `offset` is the
    /// position of `w` in the granule.
    pub(crate) fn rows<T>(
        self,
        offset: usize,
        w: &[f32],
        mut f: impl FnMut(&[f32], &[f32]) -> T,
        mut each: impl FnMut(T),
    ) {
        let mut rest = w;
        let mut column = offset % self.0.len();
        while !rest.is_empty() {
            let n = rest.len().min(self.0.len() - column);
            each(f(&rest[..n], &self.0[column..column + n]));
            rest = &rest[n..];
            column = 0;
        }
    }
}
