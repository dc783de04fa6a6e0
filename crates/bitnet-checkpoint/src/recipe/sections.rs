//! The sections of a recipe beside its tensors: activations, search, compute and control.

use super::Choices;
use crate::Result;
use bitnet_core::Precision;
use bitnet_core::activation::ActivationMethod;
use bitnet_kernels::{Isa, Kernels};
use serde::{Deserialize, Serialize};

/// Most threads that a job takes: each holds a few strips.
pub const MAX_THREADS: usize = 1024;

/// Quantization of a layer's input, one scale for each token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// It stays float: weight-only, W1.58A16.
    Float,
    /// 8 bits by absmax, as in b1.58.
    #[default]
    Int8,
    /// 4 bits by absmax.
    Int4,
    /// Signs times their mean magnitude.
    Sign,
}

impl Activations {
    /// The quantizer; `None` for floats.
    pub const fn method(self) -> Option<ActivationMethod> {
        match self {
            Self::Float => None,
            Self::Int8 => Some(ActivationMethod::Int8),
            Self::Int4 => Some(ActivationMethod::Int4),
            Self::Sign => Some(ActivationMethod::Sign),
        }
    }
}

/// The goal of a mixed-precision search. At least one field is set.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Search {
    /// Maximum bits per weight over all quantized tensors, scales and padding included. The search
    /// minimises the summed error within it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_bpw: Option<f64>,
    /// Minimum SQNR of each tensor in dB. Without a budget the search minimises the size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_sqnr: Option<f64>,
}

impl Search {
    /// Adds each wrong field of the search to `wrong`, with what is wrong.
    pub fn problems(&self, default: &Choices, wrong: &mut Vec<String>) {
        if self.target_bpw.is_none() && self.min_sqnr.is_none() {
            wrong.push("search: expected target_bpw or min_sqnr, got neither".into());
        }
        if let Some(bits) = self.target_bpw.filter(|b| !(b.is_finite() && *b > 0.0)) {
            wrong.push(format!(
                "search.target_bpw: expected a positive number, got {bits}"
            ));
        }
        if let Some(db) = self.min_sqnr.filter(|db| !db.is_finite()) {
            wrong.push(format!("search.min_sqnr: expected a number, got {db}"));
        }
        let chosen = [
            ("precision", default.precision.is_some()),
            ("threshold", default.threshold.is_some()),
            ("scale", default.scale.is_some()),
            ("planes", default.planes.is_some()),
            ("split", default.split.is_some()),
            ("seed", default.seed.is_some()),
            ("mapping", default.mapping.is_some()),
            ("clip", default.clip.is_some()),
            ("layout", default.layout.is_some()),
        ];
        wrong.extend(
            chosen
                .iter()
                .filter(|c| c.1)
                .map(|(name, _)| format!("default.{name}: the search chooses it; leave it out")),
        );
    }
}

/// Threads and instruction set.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Compute {
    /// Threads; 0 for one on each core.
    pub threads: usize,
    /// Instruction set by name: scalar, avx2, avxvnni, avx512. Default: `BITNET_ISA`, or the widest
    /// there is.
    pub isa: Option<String>,
}

/// The resolved compute settings on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Threads that will work.
    pub threads: usize,
    /// The loops that will run.
    pub kernels: Kernels,
    /// Bytes of memory that are free, where the system says so.
    pub memory: Option<u64>,
}

impl Compute {
    /// Adapts to the machine.
    ///
    /// ```
    /// let machine = bitnet_checkpoint::recipe::Compute::default().machine()?;
    /// assert!(machine.threads >= 1);
    /// println!("{machine:?}");
    /// # Ok::<(), bitnet_checkpoint::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`crate::Error::Kernels`] for an instruction set that does not exist or that this machine
    /// does not run.
    pub fn machine(&self) -> Result<Machine> {
        let kernels = match &self.isa {
            None => Kernels::from_env()?,
            Some(name) => {
                let isa: Isa = name.parse()?;
                Kernels::new(isa).ok_or(bitnet_kernels::Error::Unavailable { isa })?
            }
        };
        let threads = if self.threads > 0 {
            self.threads
        } else {
            std::thread::available_parallelism().map_or(1, |n| n.get())
        };
        Ok(Machine {
            threads,
            kernels,
            memory: free_memory(),
        })
    }
}

/// `MemAvailable` of Linux.
fn free_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?
        .trim()
        .strip_suffix(" kB")?
        .parse::<u64>()
        .ok()?;
    Some(kib * 1024)
}

impl Compute {
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    pub(crate) fn machine_check(&self) -> Result<()> {
        let Some(name) = &self.isa else { return Ok(()) };
        let isa: Isa = name.parse()?;
        if isa.is_available() {
            Ok(())
        } else {
            Err(bitnet_kernels::Error::Unavailable { isa }.into())
        }
    }
}

/// Bounds and reaction of a precision controller.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrecisionControlConfig {
    /// Precisions that may be chosen, coarse to fine.
    pub precisions: Vec<Precision>,
    /// Initial precision.
    pub initial: Precision,
    /// Quality below which precision is raised, in dB.
    pub min_sqnr_db: f32,
    /// Quality above which precision is lowered, in dB.
    pub max_sqnr_db: f32,
    /// Margin by which a lower precision must be expected to exceed `min_sqnr_db`, in dB.
    pub margin_db: f32,
    /// Consecutive observations outside the bounds before the precision changes.
    pub patience: u32,
    /// Number of observations kept.
    pub window: usize,
    /// Whether the precision may change; if not, the controller only observes.
    pub adjust: bool,
    /// Smallest and largest threshold that a precision controller
    /// accepts.
    pub threshold: [f32; 2],
    /// Smallest and largest scale that it accepts.
    pub scale: [f32; 2],
}

impl Default for PrecisionControlConfig {
    /// [`PrecisionControlConfig::balanced`].
    fn default() -> Self {
        Self::balanced()
    }
}

impl PrecisionControlConfig {
    /// Between 12 and 30 dB, three observations in a row, from int4.
    pub fn balanced() -> Self {
        Self {
            precisions: vec![
                Precision::Binary,
                Precision::Ternary,
                Precision::Int2,
                Precision::Int3,
                Precision::Int4,
                Precision::Int8,
            ],
            initial: Precision::Int4,
            min_sqnr_db: 12.0,
            max_sqnr_db: 30.0,
            margin_db: 1.0,
            patience: 3,
            window: 64,
            adjust: true,
            threshold: [0.0, 10.0],
            scale: [1e-8, 1e4],
        }
    }

    /// At least 20 dB; raised at once, lowered late, from int8.
    pub fn conservative() -> Self {
        Self {
            initial: Precision::Int8,
            min_sqnr_db: 20.0,
            max_sqnr_db: 60.0,
            margin_db: 3.0,
            patience: 1,
            ..Self::balanced()
        }
    }

    /// Between 4 and 9 dB; from ternary.
    pub fn aggressive() -> Self {
        Self {
            initial: Precision::Ternary,
            min_sqnr_db: 4.0,
            max_sqnr_db: 9.0,
            margin_db: 0.5,
            patience: 2,
            ..Self::balanced()
        }
    }

    /// The same restricted to the precisions of activations: int8, int4 and signs.
    pub fn for_activations(self) -> Self {
        let precisions = vec![Precision::Binary, Precision::Int4, Precision::Int8];
        let initial = if precisions.contains(&self.initial) {
            self.initial
        } else {
            Precision::Int8
        };
        Self {
            precisions,
            initial,
            ..self
        }
    }

    /// Each wrong field with what is wrong.
    pub fn problems(&self, wrong: &mut Vec<String>) {
        if self.precisions.is_empty()
            || !self.precisions.is_sorted_by(|a, b| a.levels() < b.levels())
        {
            let names: Vec<_> = self.precisions.iter().map(|p| p.name()).collect();
            wrong.push(format!(
                "control.precisions: expected at least one, coarse to fine, got [{}]",
                names.join(", ")
            ));
        } else if !self.precisions.contains(&self.initial) {
            wrong.push(format!(
                "control.initial: expected one of control.precisions, got {}",
                self.initial
            ));
        }
        if self.min_sqnr_db.is_nan()
            || self.max_sqnr_db.is_nan()
            || self.min_sqnr_db >= self.max_sqnr_db
        {
            wrong.push(format!(
                "control.max_sqnr_db: expected more than min_sqnr_db = {}, got {}",
                self.min_sqnr_db, self.max_sqnr_db
            ));
        }
        if self.margin_db.is_nan() || self.margin_db < 0.0 {
            wrong.push(format!(
                "control.margin_db: expected at least 0, got {}",
                self.margin_db
            ));
        }
        if self.patience == 0 {
            wrong.push("control.patience: expected at least 1, got 0".into());
        }
        if self.window > 1 << 20 {
            wrong.push(format!(
                "control.window: expected at most {}, got {}",
                1 << 20,
                self.window
            ));
        }
        for (name, [low, high]) in [("threshold", self.threshold), ("scale", self.scale)] {
            if !(0.0 <= low && low <= high && high.is_finite()) {
                wrong.push(format!("control.{name}: expected [low, high] with 0 <= low <= high, got [{low}, {high}]"));
            }
        }
    }
}
