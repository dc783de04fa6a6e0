//! Records of the layers during training, and the log of a training, one JSON document per line.

use super::events::{LayerRecord, LogRecord};
use super::linear::{Linear, Linears};
use super::sums::sum_squares;
use super::tensor_file::{PutBytes, TensorEntry};
use crate::Result;
use crate::tensor::with_host_floats;
use bitnet_formats::{Error as FileError, replace};
use bitnet_kernels::Kernels;
use candle_core::backprop::GradStore;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

/// Number of weights per layer whose gradients are tracked.
const FOLLOWED: usize = 1024;
/// Longest line of a log that is accepted.
const LONGEST_LINE: usize = 1 << 20;

/// How often layers are recorded, and the log file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// Steps between two records of every layer; 0 records nothing. A record quantizes the weights
    /// of the layer once.
    pub every: u64,
    /// The log file for steps, evaluations and records.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

/// The data of a layer that the next record refers to.
#[derive(Debug, Default)]
struct LayerHistory {
    /// Values at the previous record.
    values: Vec<i8>,
    /// Direction of the last change of each value.
    directions: Vec<i8>,
    scale: f64,
    /// Mean and sum of squared deviations of the tracked gradients over `steps` steps (Welford).
    followed: Vec<(f64, f64)>,
    steps: u64,
    norm: f64,
}

/// The histories of all layers.
#[derive(Debug)]
pub(crate) struct Telemetry {
    every: u64,
    kernels: Kernels,
    layers: BTreeMap<String, LayerHistory>,
}

impl Telemetry {
    pub(crate) fn new(every: u64) -> Result<Self> {
        Ok(Self {
            every,
            kernels: Kernels::from_env()?,
            layers: BTreeMap::new(),
        })
    }

    /// Whether anything is recorded.
    pub(crate) fn is_on(&self) -> bool {
        self.every > 0
    }

    /// Tracks the gradients of a step.
    pub(crate) fn gradients(&mut self, model: &mut dyn Linears, grads: &GradStore) -> Result<()> {
        model.visit_linears(&mut |name, linear| {
            let Linear::Qat(layer) = linear else {
                return Ok(());
            };
            let memory = self.layers.entry(name.into()).or_default();
            let Some(grad) = grads.get(layer.weight()) else {
                return Ok(());
            };
            with_host_floats(grad, |g| {
                memory.norm = sum_squares(self.kernels, g).sqrt();
                memory.follow(g);
                Ok(())
            })
        })
    }

    /// The records that are due after `step`.
    pub(crate) fn records(
        &mut self,
        model: &mut dyn Linears,
        step: u64,
    ) -> Result<Vec<LayerRecord>> {
        let mut records = vec![];
        if !step.is_multiple_of(self.every) {
            return Ok(records);
        }
        model.visit_linears(&mut |name, linear| {
            let Linear::Qat(layer) = linear else {
                return Ok(());
            };
            let matrix = layer.quantized_weights()?;
            let scale = matrix.scales.iter().map(|&s| f64::from(s)).sum::<f64>()
                / matrix.scales.len().max(1) as f64;
            let memory = self.layers.entry(name.into()).or_default();
            records.push(memory.record(step, name, layer.lambda(), &matrix.values, scale));
            Ok(())
        })?;
        Ok(records)
    }
}

/// The tensors of a layer's history in a checkpoint: `NAME.values` and so on; `numbers` are scale,
/// norm and steps.
const PARTS: [(&str, Dtype); 4] = [
    ("values", Dtype::I8),
    ("directions", Dtype::I8),
    ("followed", Dtype::F64),
    ("numbers", Dtype::F64),
];

impl Telemetry {
    /// The tensors that a checkpoint stores.
    pub(crate) fn entries(&self) -> Vec<TensorEntry> {
        let of_layer = |(name, memory): (&String, &LayerHistory)| {
            let shapes = [
                vec![memory.values.len()],
                vec![memory.directions.len()],
                vec![memory.followed.len(), 2],
                vec![3],
            ];
            PARTS
                .into_iter()
                .zip(shapes)
                .map(|((part, dtype), shape)| TensorEntry {
                    name: format!("{name}.{part}"),
                    shape,
                    dtype,
                })
                .collect::<Vec<_>>()
        };
        self.layers.iter().flat_map(of_layer).collect()
    }

    /// Passes the bytes of one of these tensors to `put`.
    pub(crate) fn put_entry(&self, entry: usize, put: &mut PutBytes<'_>) -> Result<()> {
        let Some(memory) = self.layers.values().nth(entry / PARTS.len()) else {
            return Ok(());
        };
        match entry % PARTS.len() {
            0 => put(&memory
                .values
                .iter()
                .map(|q| q.to_le_bytes()[0])
                .collect::<Vec<_>>()),
            1 => put(&memory
                .directions
                .iter()
                .map(|d| d.to_le_bytes()[0])
                .collect::<Vec<_>>()),
            2 => put(&memory
                .followed
                .iter()
                .flat_map(|(mean, squares)| [mean.to_le_bytes(), squares.to_le_bytes()].concat())
                .collect::<Vec<_>>()),
            _ => put(&[memory.scale, memory.norm, memory.steps as f64]
                .map(f64::to_le_bytes)
                .concat()),
        }
    }

    /// Restores the histories from the tensors of a checkpoint.
    pub(crate) fn restore(&mut self, kept: &BTreeMap<String, Vec<u8>>) {
        let floats = |name: &str, part| -> Vec<f64> {
            let bytes = kept
                .get(&format!("{name}.{part}"))
                .map_or(&[][..], |bytes| bytes);
            bytes
                .as_chunks::<8>()
                .0
                .iter()
                .map(|b| f64::from_le_bytes(*b))
                .collect()
        };
        let integers = |bytes: &[u8]| {
            bytes
                .iter()
                .map(|&b| i8::from_le_bytes([b]))
                .collect::<Vec<_>>()
        };
        for (name, values) in kept
            .iter()
            .filter_map(|(name, bytes)| Some((name.strip_suffix(".values")?, bytes)))
        {
            let directions = kept
                .get(&format!("{name}.directions"))
                .map(|bytes| integers(bytes))
                .unwrap_or_default();
            if let [scale, norm, steps] = floats(name, "numbers")[..]
                && directions.len() == values.len()
            {
                let followed = floats(name, "followed")
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .map(|[mean, squares]| (*mean, *squares))
                    .collect();
                let memory = LayerHistory {
                    values: integers(values),
                    directions,
                    scale,
                    followed,
                    steps: steps as u64,
                    norm,
                };
                self.layers.insert(name.to_owned(), memory);
            }
        }
    }
}

impl LayerHistory {
    fn follow(&mut self, g: &[f32]) {
        let stride = g.len().div_ceil(FOLLOWED).max(1);
        self.followed.resize(g.len().div_ceil(stride), (0.0, 0.0));
        self.steps += 1;
        for ((mean, squares), &g) in self.followed.iter_mut().zip(g.iter().step_by(stride)) {
            let away = f64::from(g) - *mean;
            *mean += away / self.steps as f64;
            *squares += away * (f64::from(g) - *mean);
        }
    }

    fn record(
        &mut self,
        step: u64,
        name: &str,
        lambda: f32,
        values: &[i8],
        scale: f64,
    ) -> LayerRecord {
        let (mut flips, mut turns, mut dead) = (0u64, 0u64, 0u64);
        let known = self.values.len() == values.len();
        if !known {
            (self.values, self.directions, self.scale) =
                (values.to_vec(), vec![0; values.len()], scale);
        }
        for ((&new, old), direction) in values
            .iter()
            .zip(&mut self.values)
            .zip(&mut self.directions)
        {
            dead += u64::from(new == 0);
            let towards = (i16::from(new) - i16::from(*old)).signum() as i8;
            if towards != 0 {
                flips += 1;
                turns += u64::from(towards == -*direction);
                (*old, *direction) = (new, towards);
            }
        }
        let share = |n: u64| n as f64 / values.len().max(1) as f64;
        let variance = self
            .followed
            .iter()
            .map(|(_, squares)| squares)
            .sum::<f64>()
            / (self.followed.len().max(1) as f64 * self.steps.max(1) as f64);
        let record = LayerRecord {
            step,
            name: name.into(),
            lambda,
            flips: share(flips),
            oscillation: share(turns),
            dead_zone: share(dead),
            scale,
            scale_drift: if self.scale > 0.0 {
                scale / self.scale - 1.0
            } else {
                0.0
            },
            gradient_norm: self.norm,
            gradient_variance: variance,
        };
        (self.scale, self.steps) = (scale, 0);
        self.followed.clear();
        record
    }
}

/// The log of a training.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    /// Opens a log after `step`: lines of later steps are removed, at step 0 all lines.
    pub(crate) fn open(path: &Path, step: u64) -> Result<Self> {
        let earlier = if step > 0 && path.exists() {
            read_log(path)?
        } else {
            vec![]
        };
        let file = replace::write_file_with(path, |file| {
            let mut kept = earlier.iter().filter(|line| line.step() <= step);
            kept.try_for_each(|line| write_record(file, line))
        })?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
        })
    }

    pub(crate) fn append(&mut self, record: &LogRecord) -> Result<()> {
        Ok(write_record(&mut self.file, record).map_err(FileError::io(&self.path, "write"))?)
    }
}

fn write_record(file: &mut File, record: &LogRecord) -> io::Result<()> {
    let mut text = serde_json::to_string(record)?;
    text.push('\n');
    file.write_all(text.as_bytes())
}

/// Reads the log of a training. An incomplete last line, left by a killed training, is ignored.
///
/// # Errors
/// [`CheckpointError::File`](crate::CheckpointError::File) for a file that cannot be read, or with
/// the number of a line that is not a line of a log.
pub fn read_log(path: &Path) -> Result<Vec<LogRecord>> {
    let mut file = BufReader::new(File::open(path).map_err(FileError::io(path, "open"))?);
    let (mut lines, mut text) = (vec![], vec![]);
    loop {
        text.clear();
        let limited = &mut std::io::Read::take(&mut file, LONGEST_LINE as u64);
        limited
            .read_until(b'\n', &mut text)
            .map_err(FileError::io(path, "read"))?;
        if text.pop() != Some(b'\n') {
            return Ok(lines);
        }
        let line = serde_json::from_slice(&text);
        lines.push(line.map_err(|e| {
            FileError::file(
                path,
                "a line of the log of a training",
                format!("line {}: {e}", lines.len() + 1),
            )
        })?);
    }
}
