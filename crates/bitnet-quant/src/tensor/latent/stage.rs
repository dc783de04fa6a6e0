//! Stages of a training that lowers the number of bits step by step.

use super::StraightThroughEstimator;
use crate::Result;
use bitnet_core::scheme::{Clip, Mapping, Method, Scheme};
use serde::{Deserialize, Serialize};

/// The values that a layer rounds to at present.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Symmetric integers of this many bits, an intermediate stage. With 2, 3 and 4 bits the range
    /// has the least squared error on normally distributed weights.
    Bits(u32),
    /// The scheme of the configuration.
    #[default]
    Target,
}

impl Stage {
    pub(super) fn scheme(self, target: &Scheme) -> Result<Scheme> {
        let Self::Bits(bits) = self else {
            return Ok(*target);
        };
        let clip = match bits {
            2 => Clip::Rms(1.05),
            3 => Clip::Rms(1.81),
            4 => Clip::Rms(2.37),
            _ => Clip::None,
        };
        let scheme = Scheme {
            method: Method::Int {
                bits,
                mapping: Mapping::Symmetric,
                clip,
            },
            ..*target
        };
        scheme.spec(1, 1)?;
        Ok(scheme)
    }

    /// Stretched levels exist up to 2 bits; stages with more bits learn their scale as LSQ.
    pub(super) fn estimator(self, target: StraightThroughEstimator) -> StraightThroughEstimator {
        match (self, target) {
            (Self::Bits(3..), StraightThroughEstimator::Stretched) => {
                StraightThroughEstimator::LearnedScale
            }
            _ => target,
        }
    }
}
