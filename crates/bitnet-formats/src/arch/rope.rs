//! Rotary positions of a config.json.

use super::architecture::{Architecture, LayerRule};
use super::values::{HfConfig, shown};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::f64::consts::PI;

/// Rotary embedding of a config.json: pair i of the first `dims` dimensions of a head rotates by
/// `position · theta^(−2i/dims) / divisor_i`.
#[derive(Debug, Clone, PartialEq)]
pub struct HfRope {
    /// The base θ.
    pub theta: f64,
    /// Dimensions of a head that rotate.
    pub dims: usize,
    /// How the frequencies are scaled.
    pub scaling: RopeScaling,
    /// Multiplier of sines and cosines.
    pub attention_factor: f64,
}

/// How the frequencies of a rotary embedding are scaled.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Only beyond `max_position_embeddings`, which is the most that a model is run with.
    Dynamic,
    /// All by one divisor.
    Linear(f64),
    /// By a divisor for each.
    Llama3(Vec<f32>),
    /// By a divisor that grows with the wavelength.
    Yarn(Yarn),
    /// By a divisor for each, of texts of up to `context` positions. Those of longer texts would
    /// change the keys in a cache, so a model is run with these alone.
    LongRope {
        /// `short_factor`.
        divisors: Vec<f32>,
        /// `long_factor`.
        long: Vec<f32>,
        /// `original_max_position_embeddings`.
        context: usize,
    },
}

/// Parameters of yarn scaling.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// `factor`.
    pub factor: f64,
    /// `original_max_position_embeddings`.
    pub context: f64,
    /// Turns within that context from which on a frequency is not scaled.
    pub beta_fast: f64,
    /// Turns up to which a frequency is divided by the factor.
    pub beta_slow: f64,
    /// Whether the bounds between them are rounded to whole dimensions.
    pub truncate: bool,
}

/// Largest head: a table of this length is made before any tensor is looked at. Known models have
/// at most 512.
const MAX_HEAD_DIM: usize = 1 << 16;

impl HfRope {
    /// From `rope_parameters` (since transformers 5), or from `rope_theta` and `rope_scaling`.
    ///
    /// # Errors
    /// [`Error::Config`] for a scaling that is not known, for a parameter that is missing, for
    /// rotated dimensions that the architecture does not have, and for a head of an odd or absurd
    /// number of dimensions.
    pub fn read(config: &HfConfig, architecture: &Architecture, head_dim: usize) -> Result<Self> {
        if !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
            let expected = format!("an even number of at most {MAX_HEAD_DIM}");
            return Err(config.bad("head_dim", &expected));
        }
        let default = architecture.hf_defaults.map(|d| d.rope_theta);
        let parameters = Parameters::global(config, architecture);
        let own = match &parameters {
            Some(p) => p.value.optional_float("rope_theta")?,
            None => None,
        };
        let theta = match own {
            Some(theta) => theta,
            None => config.float_or("rope_theta", default)?,
        };
        let dims = rotated(config, parameters.as_ref(), architecture, head_dim)?;
        let plain = Self {
            theta,
            dims,
            scaling: RopeScaling::None,
            attention_factor: 1.0,
        };
        parameters.map_or(Ok(plain.clone()), |p| p.scaled(plain))
    }

    /// That of layers with a window, in an architecture where they have their own:
    /// `rope_parameters.sliding_attention`, or `rope_local_base_freq`.
    ///
    /// # Errors
    /// As [`HfRope::read`].
    pub fn read_local(
        config: &HfConfig,
        architecture: &Architecture,
        head_dim: usize,
    ) -> Result<Option<Self>> {
        if architecture.layers != LayerRule::Local {
            return Ok(None);
        }
        let parameters = Parameters::local(config);
        let nested = match &parameters {
            Some(p) => p.value.optional_float("rope_theta")?,
            None => None,
        };
        let plain = Self {
            theta: match nested {
                Some(theta) => theta,
                None => config.float_or("rope_local_base_freq", Some(10000.0))?,
            },
            dims: head_dim,
            scaling: RopeScaling::None,
            attention_factor: 1.0,
        };
        parameters
            .map_or(Ok(plain.clone()), |p| p.scaled(plain))
            .map(Some)
    }

    /// The divisors of the `dims / 2` frequencies; none where all are 1.
    pub fn divisors(&self) -> Option<Vec<f32>> {
        match &self.scaling {
            RopeScaling::None | RopeScaling::Dynamic => None,
            RopeScaling::Linear(factor) => Some(vec![*factor as f32; self.dims / 2]),
            RopeScaling::Llama3(divisors) | RopeScaling::LongRope { divisors, .. } => {
                Some(divisors.clone())
            }
            RopeScaling::Yarn(yarn) => Some(yarn.divisors(self.theta, self.dims)),
        }
    }
}

/// Dimensions of a head that rotate, by `partial_rotary_factor`.
fn rotated(
    config: &HfConfig,
    parameters: Option<&Parameters>,
    architecture: &Architecture,
    head_dim: usize,
) -> Result<usize> {
    let key = "partial_rotary_factor";
    let default = architecture.hf_defaults.map_or(1.0, |d| d.rotary_factor);
    let (mut part, mut factor) = (*config, default);
    for place in parameters.map(|p| p.value).iter().chain([config]) {
        if let Some(given) = place.optional_float(key)? {
            (part, factor) = (*place, given);
            break;
        }
    }
    if !architecture.partial_rotary && factor != 1.0 {
        return Err(part.bad(key, "1"));
    }
    // As transformers rounds.
    let dims = (head_dim as f64 * factor) as usize;
    if factor > 1.0 || dims == 0 || !dims.is_multiple_of(2) {
        let expected = format!("a part of {head_dim} dimensions that is an even number");
        return Err(part.bad(key, &expected));
    }
    Ok(dims)
}

/// The object with the scaling of the frequencies.
#[derive(Clone, Copy)]
struct Parameters<'a> {
    /// Its key in config.json.
    key: &'static str,
    value: HfConfig<'a>,
    config: HfConfig<'a>,
}

impl<'a> Parameters<'a> {
    fn at(config: &HfConfig<'a>, key: &'static str, pointer: &str) -> Option<Self> {
        let value = config.value.pointer(pointer).filter(|v| !v.is_null())?;
        Some(Self {
            key,
            value: HfConfig {
                path: config.path,
                value,
            },
            config: *config,
        })
    }

    fn global(config: &HfConfig<'a>, architecture: &Architecture) -> Option<Self> {
        let nested = "rope_parameters.full_attention";
        Self::at(config, nested, "/rope_parameters/full_attention")
            .filter(|_| architecture.layers == LayerRule::Local)
            .or_else(|| Self::at(config, "rope_parameters", "/rope_parameters"))
            .or_else(|| Self::at(config, "rope_scaling", "/rope_scaling"))
    }

    fn local(config: &HfConfig<'a>) -> Option<Self> {
        let nested = "rope_parameters.sliding_attention";
        Self::at(config, nested, "/rope_parameters/sliding_attention")
    }

    fn bad(&self, name: &str, expected: &str) -> Error {
        let key = format!("{}.{name}", self.key);
        let got = shown(self.value.value.get(name));
        Error::config(self.config.path, key, expected, got)
    }

    fn required(&self, name: &str) -> Result<f64> {
        self.value
            .optional_float(name)?
            .ok_or_else(|| self.bad(name, "a positive number"))
    }

    /// The context before scaling: as in transformers, that of the model has precedence.
    fn original_context(&self) -> Result<f64> {
        let key = "original_max_position_embeddings";
        for part in [self.config, self.value] {
            if let Some(context) = part.optional_float(key)? {
                return Ok(context);
            }
        }
        Ok(self.config.size("max_position_embeddings")? as f64)
    }

    /// The rotary embedding with the scaling of this object.
    fn scaled(&self, plain: HfRope) -> Result<HfRope> {
        let value = self.value.value;
        let kind = value.get("rope_type").or_else(|| value.get("type"));
        let (scaling, attention_factor) = match kind.map(|kind| kind.as_str().unwrap_or_default()) {
            None if self.key.starts_with("rope_parameters") => (RopeScaling::None, 1.0),
            Some("default") => (RopeScaling::None, 1.0),
            Some("dynamic") => {
                self.required("factor")?;
                (RopeScaling::Dynamic, 1.0)
            }
            Some("linear") => (RopeScaling::Linear(self.required("factor")?), 1.0),
            Some("llama3") => (RopeScaling::Llama3(self.llama3(&plain)?), 1.0),
            // What phi3 called so has the factors of longrope.
            Some("longrope" | "su") => self.long_rope(&plain)?,
            Some("yarn") if value.get("short_factor").is_some() => self.long_rope(&plain)?,
            Some("yarn") => self.yarn()?,
            _ => {
                let known = "'default', 'linear', 'dynamic', 'yarn', 'longrope' or 'llama3'";
                let key = format!("{}.rope_type", self.key);
                return Err(Error::config(self.config.path, key, known, shown(kind)));
            }
        };
        Ok(HfRope {
            scaling,
            attention_factor,
            ..plain
        })
    }

    fn llama3(&self, plain: &HfRope) -> Result<Vec<f32>> {
        let llama3 = Llama3 {
            factor: self.required("factor")?,
            low: self.required("low_freq_factor")?,
            high: self.required("high_freq_factor")?,
            context: self.required("original_max_position_embeddings")?,
        };
        if llama3.low >= llama3.high {
            return Err(self.bad("high_freq_factor", "more than low_freq_factor"));
        }
        Ok(llama3.divisors(plain.theta, plain.dims))
    }

    fn yarn(&self) -> Result<(RopeScaling, f64)> {
        let context = self.original_context()?;
        let factor = match self.value.optional_float("factor")? {
            Some(factor) => factor,
            None => self.config.size("max_position_embeddings")? as f64 / context,
        };
        let yarn = Yarn {
            factor,
            context,
            beta_fast: self.value.optional_float("beta_fast")?.unwrap_or(32.0),
            beta_slow: self.value.optional_float("beta_slow")?.unwrap_or(1.0),
            truncate: self.value.flag_or("truncate", true)?,
        };
        let scales = ["mscale", "mscale_all_dim"].map(|key| self.value.get(key));
        let attention_factor = match (self.value.optional_float("attention_factor")?, scales) {
            (Some(given), _) => given,
            (None, [Some(_), Some(_)]) => {
                let part = |key| Ok::<_, Error>(yarn.magnitude(self.required(key)?));
                part("mscale")? / part("mscale_all_dim")?
            }
            (None, _) => yarn.magnitude(1.0),
        };
        Ok((RopeScaling::Yarn(yarn), attention_factor))
    }

    fn long_rope(&self, plain: &HfRope) -> Result<(RopeScaling, f64)> {
        let pairs = plain.dims / 2;
        let list = |key: &str| {
            let listed = self.value.get(key).and_then(Value::as_array);
            let divisor = |v: &Value| v.as_f64().filter(|d| *d > 0.0).map(|d| d as f32);
            let divisors = listed.and_then(|list| list.iter().map(divisor).collect());
            let whole = |divisors: &Vec<f32>| divisors.len() == pairs;
            let expected = format!("a list of {pairs} positive numbers");
            divisors
                .filter(whole)
                .ok_or_else(|| self.bad(key, &expected))
        };
        let (divisors, long) = (list("short_factor")?, list("long_factor")?);
        let context = self.original_context()?;
        let factor = match self.value.optional_float("factor")? {
            Some(factor) => factor,
            None => self.config.size("max_position_embeddings")? as f64 / context,
        };
        let attention_factor = match self.value.optional_float("attention_factor")? {
            Some(given) => given,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / context.ln()).sqrt(),
        };
        let scaling = RopeScaling::LongRope {
            divisors,
            long,
            context: context as usize,
        };
        Ok((scaling, attention_factor))
    }
}

impl Yarn {
    /// `1 + 0.1 · scale · ln(factor)`; 1 for a factor that shrinks nothing.
    pub(super) fn magnitude(&self, scale: f64) -> f64 {
        1.0 + 0.1 * scale * self.factor.max(1.0).ln()
    }

    /// Divisor of each frequency θ^(−2i/d): 1 for those with more than `beta_fast` turns within the
    /// old context, `factor` for those with fewer than `beta_slow`, and between them, with r from 0
    /// to 1, `1/(1 − r + r/factor)`.
    fn divisors(&self, theta: f64, dims: usize) -> Vec<f32> {
        // The dimension whose frequency makes so many turns.
        let bound = |turns: f64| {
            dims as f64 * (self.context / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (bound(self.beta_fast), bound(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dims as f64 - 1.0));
        if low == high {
            high += 0.001;
        }
        let divisor = |i: usize| {
            let r = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / (1.0 - r + r / self.factor)) as f32
        };
        (0..dims / 2).map(divisor).collect()
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

/// The `rope_scaling` that has these divisors: those of published models, for any factor and any
/// context that is a power of two.
pub(super) fn llama3_scaling(divisors: &[f32], theta: f64, head_dim: usize) -> Option<Value> {
    let factor = f64::from(divisors.iter().copied().reduce(f32::max)?);
    let near = |a: &f32, b: &f32| (a - b).abs() <= 1e-5 * b;
    // 8192 first: where a head has few frequencies, several contexts have the same divisors.
    let contexts = [13]
        .into_iter()
        .chain(4..=24)
        .map(|bits| f64::from(1u32 << bits));
    let scaling = contexts.map(|context| Llama3 {
        factor,
        low: 1.0,
        high: 4.0,
        context,
    });
    let found = scaling.into_iter().find(|scaling| {
        let own = scaling.divisors(theta, head_dim);
        own.len() == divisors.len() && divisors.iter().zip(&own).all(|(a, b)| near(a, b))
    })?;
    Some(json!({
        "rope_type": "llama3",
        "factor": found.factor,
        "low_freq_factor": found.low,
        "high_freq_factor": found.high,
        "original_max_position_embeddings": found.context as u64,
    }))
}

#[cfg(test)]
mod tests {
    use super::super::known::{PHI3, QWEN3};
    use super::*;
    use std::path::Path;

    fn read(architecture: &Architecture, value: &Value) -> Result<HfRope> {
        let path = Path::new("config.json");
        HfRope::read(&HfConfig { path, value }, architecture, 32)
    }

    #[test]
    fn divisors_of_llama3_say_their_parameters() {
        for (factor, context, theta, head_dim) in [
            (8.0, 8192, 5e5, 128),
            (32.0, 8192, 5e5, 64),
            (8.0, 16, 1e4, 12),
        ] {
            let parameters = json!({"rope_type": "llama3", "factor": factor,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": context});
            let scaling = Llama3 {
                factor,
                low: 1.0,
                high: 4.0,
                context: f64::from(context),
            };
            let divisors = scaling.divisors(theta, head_dim);
            assert_eq!(llama3_scaling(&divisors, theta, head_dim), Some(parameters));
        }
        assert_eq!(llama3_scaling(&[1.0, 1.5, 2.0], 1e4, 6), None);
        assert_eq!(llama3_scaling(&[], 1e4, 6), None);
    }

    /// transformers 5.23, ROPE_INIT_FUNCTIONS["yarn"]: plain frequency over scaled one, and the
    /// attention factor.
    #[test]
    fn yarn_is_that_of_transformers() {
        let between = [1.176471, 1.428571, 1.818182, 2.5];
        let wider = [1.0, 1.102401, 1.678754, 3.51804];
        for (more, factor, expected) in [
            (json!({}), 1.138629436111989, between),
            (
                json!({"mscale": 1.0, "mscale_all_dim": 0.5}),
                1.0648216253695715,
                between,
            ),
            (json!({"attention_factor": 1.5}), 1.5, between),
            (
                json!({"truncate": false, "beta_fast": 16.0, "beta_slow": 2.0}),
                1.138629436111989,
                wider,
            ),
        ] {
            let mut scaling = json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6,
                                     "original_max_position_embeddings": 32768});
            for (key, value) in more.as_object().unwrap() {
                scaling[key] = value.clone();
            }
            let rope = read(&QWEN3, &json!({"rope_parameters": scaling})).unwrap();
            assert!((rope.attention_factor - factor).abs() < 1e-12, "{more}");
            let divisors = rope.divisors().unwrap();
            let expected = [vec![1.0; 6], expected.to_vec(), vec![4.0; 6]].concat();
            for (got, expected) in divisors.iter().zip(expected) {
                assert!((f64::from(*got) - expected).abs() < 1e-5, "{divisors:?}");
            }
        }
    }

    #[test]
    fn a_part_of_a_head_rotates_as_a_whole_number_of_pairs() {
        let with = |factor: f64| {
            let rope = json!({"rope_theta": 1e4, "partial_rotary_factor": factor});
            read(&PHI3, &rope).map(|rope| rope.dims)
        };
        assert_eq!((with(0.75).unwrap(), with(1.0).unwrap()), (24, 32));
        for factor in [0.1, 0.01, 1.5] {
            let message = with(factor).unwrap_err().to_string();
            assert!(message.contains("partial_rotary_factor"), "{message}");
        }
    }
}
