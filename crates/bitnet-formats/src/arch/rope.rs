//! Rotary positions of a config.json.

use super::architecture::Architecture;
use super::values::{HfConfig, shown};
use crate::{Error, Result};
use std::f64::consts::PI;

/// Rotary embedding of a config.json.
#[derive(Debug, Clone, PartialEq)]
pub struct HfRope {
    /// The base θ.
    pub theta: f64,
    /// Divisor of all frequencies (`linear` scaling).
    pub linear: Option<f64>,
    /// Divisor of each frequency θ^(−2i/d) (`llama3` scaling).
    pub freqs: Option<Vec<f32>>,
}

/// Largest head: a table of this length is made before any tensor is looked at. Known models have
/// at most 512.
const MAX_HEAD_DIM: usize = 1 << 16;

impl HfRope {
    /// From `rope_parameters` (since transformers 5), or from `rope_theta` and `rope_scaling`.
    ///
    /// # Errors
    /// [`Error::Config`] for a scaling that the architecture does not have, for a parameter that is
    /// missing, and for a head of an odd or absurd number of dimensions.
    pub fn read(config: &HfConfig, architecture: &Architecture, head_dim: usize) -> Result<Self> {
        if !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
            let expected = format!("an even number of at most {MAX_HEAD_DIM}");
            return Err(config.bad("head_dim", &expected));
        }
        let key = if config.get("rope_parameters").is_some() {
            "rope_parameters"
        } else {
            "rope_scaling"
        };
        let default = architecture.hf_defaults.map(|d| d.rope_theta);
        let Some(value) = config.get(key) else {
            return Ok(Self {
                theta: config.float_or("rope_theta", default)?,
                linear: None,
                freqs: None,
            });
        };
        let scaling = Scaling {
            key,
            config: HfConfig {
                path: config.path,
                value,
            },
        };
        let theta = match scaling.config.optional_float("rope_theta")? {
            Some(theta) => theta,
            None => config.float_or("rope_theta", default)?,
        };
        for part in [scaling.config, *config] {
            let factor = part.optional_float("partial_rotary_factor")?;
            if factor.is_some_and(|f| f != 1.0) {
                return Err(part.bad("partial_rotary_factor", "1"));
            }
        }
        let (linear, freqs) = scaling.divisors(architecture, theta, head_dim)?;
        Ok(Self {
            theta,
            linear,
            freqs,
        })
    }
}

/// The object with the scaling of the frequencies.
struct Scaling<'a> {
    /// Its key in config.json.
    key: &'a str,
    config: HfConfig<'a>,
}

impl Scaling<'_> {
    fn bad(&self, name: &str, expected: &str) -> Error {
        let key = format!("{}.{name}", self.key);
        let got = shown(self.config.value.get(name));
        Error::config(self.config.path, key, expected, got)
    }

    fn required(&self, name: &str) -> Result<f64> {
        self.config
            .optional_float(name)?
            .ok_or_else(|| self.bad(name, "a positive number"))
    }

    /// The one divisor of `linear`, and the divisors of `llama3`.
    fn divisors(
        &self,
        architecture: &Architecture,
        theta: f64,
        head_dim: usize,
    ) -> Result<(Option<f64>, Option<Vec<f32>>)> {
        let value = self.config.value;
        let kind = value.get("rope_type").or_else(|| value.get("type"));
        match kind.map(|kind| kind.as_str().unwrap_or_default()) {
            None if self.key == "rope_parameters" => Ok((None, None)),
            Some("default") => Ok((None, None)),
            Some("linear") => Ok((Some(self.required("factor")?), None)),
            Some("llama3") if architecture.llama3_rope => {
                let llama3 = Llama3 {
                    factor: self.required("factor")?,
                    low: self.required("low_freq_factor")?,
                    high: self.required("high_freq_factor")?,
                    context: self.required("original_max_position_embeddings")?,
                };
                if llama3.low >= llama3.high {
                    return Err(self.bad("high_freq_factor", "more than low_freq_factor"));
                }
                Ok((None, Some(llama3.divisors(theta, head_dim))))
            }
            _ => {
                let expected = if architecture.llama3_rope {
                    "'default', 'linear' or 'llama3'"
                } else {
                    "'default' or 'linear'"
                };
                let key = format!("{}.rope_type", self.key);
                Err(Error::config(self.config.path, key, expected, shown(kind)))
            }
        }
    }
}

/// Parameters of llama3 rope scaling.
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    context: f64,
}

impl Llama3 {
    /// Divisor of each frequency θ^(−2i/d). With wavelength λ and n = context/λ turns
    /// within the old context: 1 from `high` turns on, `factor` up to `low` turns, and between them
    /// 1/((1 − s)/factor + s) with s = (n − low)/(high − low).
    fn divisors(&self, theta: f64, head_dim: usize) -> Vec<f32> {
        let divisor = |i: usize| {
            let turns = self.context / (2.0 * PI) * theta.powf(-((2 * i) as f64) / head_dim as f64);
            let smooth = ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - smooth) / self.factor + smooth)) as f32
        };
        (0..head_dim / 2).map(divisor).collect()
    }
}
