//! Checkpoints of a training: one folder each.
//!
//! ```text
//! FOLDER/step-000000100/model.safetensors       variables by name, f32
//!                       optimizer.safetensors   NAME.first (velocity or first moment), NAME.second
//!                       telemetry.safetensors   histories of the layers, if telemetry is on
//!                       state.json              steps, evaluations, configuration, state of the
//!                                               task, checksums of the other files
//! ```
//!
//! A checkpoint is written under a temporary name and renamed once it is complete and on the disk.
//! So a `step-…` folder is always complete, and an interrupted write leaves the earlier checkpoints
//! unchanged.

use super::events::Stopped;
use super::optimizer::{MomentStorage, Optimizer};
use super::telemetry::Telemetry;
use super::tensor_file::{TensorEntry, TensorFile, checksum, put_floats, save};
use crate::tensor::latent::Stage;
use crate::tensor::with_host_floats;
use crate::{CheckpointError, Error, Result};
use bitnet_formats::Error as FileError;
use bitnet_formats::replace::{self, Existing};
use bitnet_formats::safetensors::SafetensorsHeader;
use candle_core::Tensor;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// The version of the state that this code writes and reads.
pub(crate) const VERSION: u32 = 2;
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const TELEMETRY: &str = "telemetry.safetensors";
const STATE: &str = "state.json";
/// Extension of an unfinished folder.
const PARTIAL: &str = "partial";

/// Where and when checkpoints are written, and how many are kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointConfig {
    /// The folder that holds them.
    pub folder: PathBuf,
    /// Steps between two checkpoints. 0 writes one only when the training ends or stops, and after
    /// each evaluation that is the best so far.
    #[serde(default)]
    pub every: u64,
    /// How many of the newest are kept, in addition to that of the best evaluation; 0 keeps all.
    #[serde(default = "two")]
    pub keep: usize,
}

fn two() -> usize {
    2
}

/// The part of a checkpoint that is not tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TrainingState {
    pub(crate) version: u32,
    /// Steps taken.
    pub(crate) step: u64,
    pub(crate) loss: ExactFloat,
    /// Steps taken before the last evaluation, its value, and the best so far.
    pub(crate) evaluation: Option<(u64, ExactFloat, ExactFloat)>,
    /// Steps taken before the best evaluation, whose checkpoint is kept, and its value.
    pub(crate) best: Option<(u64, ExactFloat)>,
    /// Evaluations since the best.
    pub(crate) worse: u64,
    /// Why the training stopped here, if it did.
    pub(crate) stopped: Option<Stopped>,
    /// The part of the configuration that the results depend on.
    pub(crate) config: serde_json::Value,
    /// How each layer rounds.
    pub(crate) layers: BTreeMap<String, LayerRounding>,
    /// The result of [`super::Task::state`].
    pub(crate) task: serde_json::Value,
    /// xxh3-128 of the files beside this one.
    pub(crate) checksums: BTreeMap<String, String>,
}

/// A number stored in JSON as a string, because not every reader keeps the bits of a JSON number.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(crate) struct ExactFloat(pub(crate) f64);

impl From<ExactFloat> for String {
    fn from(exact: ExactFloat) -> Self {
        exact.0.to_string()
    }
}

impl TryFrom<String> for ExactFloat {
    type Error = std::num::ParseFloatError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

/// Stage and strength of the quantization of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LayerRounding {
    pub(crate) stage: Stage,
    pub(crate) lambda: f32,
}

/// The folder of a step.
pub(crate) fn path(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step-{step:09}"))
}

/// The checkpoints of a folder, oldest first: steps and paths. An interrupted replacement is
/// completed first.
///
/// # Errors
/// [`FileError::Io`] if the folder is there and cannot be read.
pub fn checkpoints(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    recover(folder)?;
    let mut found = vec![];
    for name in names(folder)? {
        let step = name
            .to_str()
            .and_then(|n| n.strip_prefix("step-"))
            .filter(|n| n.len() >= 9 && n.bytes().all(|b| b.is_ascii_digit()));
        if let Some(step) = step.and_then(|n| n.parse().ok()) {
            found.push((step, folder.join(name)));
        }
    }
    found.sort();
    Ok(found)
}

fn names(folder: &Path) -> Result<Vec<OsString>> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        entries => entries.map_err(FileError::io(folder, "read"))?,
    };
    let name = |entry: std::io::Result<fs::DirEntry>| Ok(entry?.file_name());
    let names: std::io::Result<_> = entries.map(name).collect();
    Ok(names.map_err(FileError::io(folder, "read"))?)
}

/// Completes the replacement of a checkpoint that was interrupted.
fn recover(folder: &Path) -> Result<()> {
    for name in names(folder)? {
        let name = name.to_string_lossy();
        if let Some(partial) = name.strip_suffix("-replaced").map(|n| folder.join(n))
            && partial.extension().is_some_and(|e| e == PARTIAL)
        {
            replace::recover_folder(&partial, &partial.with_extension(""))?;
        }
    }
    Ok(())
}

/// Writes a checkpoint, then removes the oldest beyond `keep`. Returns its path.
pub(crate) fn write(
    config: &CheckpointConfig,
    optimizer: &Optimizer,
    telemetry: &Telemetry,
    mut state: TrainingState,
) -> Result<PathBuf> {
    fs::create_dir_all(&config.folder).map_err(FileError::io(&config.folder, "create"))?;
    recover(&config.folder)?;
    remove_unfinished(&config.folder);
    let target = path(&config.folder, state.step);
    let partial = target.with_extension(PARTIAL);
    let result = fill(&partial, optimizer, telemetry, &mut state).and_then(|()| {
        replace::place_folder(&partial, &target, Existing::Replace)?;
        Ok(replace::sync_folder(&config.folder)?)
    });
    if let Err(error) = result {
        let _ = fs::remove_dir_all(&partial);
        return Err(error);
    }
    let mut old = checkpoints(&config.folder)?;
    old.retain(|(step, _)| *step < state.step && state.best.is_none_or(|(best, _)| *step != best));
    let kept = if config.keep == 0 {
        usize::MAX
    } else {
        config.keep - 1
    };
    for (_, path) in old.iter().rev().skip(kept) {
        fs::remove_dir_all(path).map_err(FileError::io(path, "remove"))?;
    }
    Ok(target)
}

/// Removes unfinished folders of a killed training. Failures are ignored: the next write reports
/// them.
fn remove_unfinished(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|e| e == PARTIAL) && path.join(MODEL).exists() {
            let _ = fs::remove_dir_all(path);
        }
    }
}

fn fill(
    folder: &Path,
    optimizer: &Optimizer,
    telemetry: &Telemetry,
    state: &mut TrainingState,
) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(FileError::io(folder, "remove"))?;
    }
    fs::create_dir(folder).map_err(FileError::io(folder, "create"))?;
    let parameters = &optimizer.parameters;
    let sum = save(&folder.join(MODEL), &variables(optimizer), |i, put| {
        with_host_floats(&parameters[i].var, |x| put_floats(x, put))
    })?;
    state.checksums.insert(MODEL.into(), sum);
    let (entries, moments): (Vec<_>, Vec<_>) = moments(optimizer).unzip();
    let sum = save(&folder.join(OPTIMIZER), &entries, |i, put| {
        moments[i].with_floats(|x| put_floats(x, put))
    })?;
    state.checksums.insert(OPTIMIZER.into(), sum);
    if telemetry.is_on() {
        let sum = save(&folder.join(TELEMETRY), &telemetry.entries(), |i, put| {
            telemetry.put_entry(i, put)
        })?;
        state.checksums.insert(TELEMETRY.into(), sum);
    }
    let path = folder.join(STATE);
    let json = serde_json::to_vec_pretty(state).map_err(Error::recipe)?;
    let mut file = File::create(&path).map_err(FileError::io(&path, "create"))?;
    file.write_all(&json)
        .and_then(|()| file.sync_all())
        .map_err(FileError::io(&path, "write"))?;
    Ok(replace::sync_folder(folder)?)
}

fn variables(optimizer: &Optimizer) -> Vec<TensorEntry> {
    optimizer
        .parameters
        .iter()
        .map(|p| TensorEntry {
            name: p.name.clone(),
            shape: p.var.dims().to_vec(),
            dtype: Dtype::F32,
        })
        .collect()
}

fn moments(optimizer: &Optimizer) -> impl Iterator<Item = (TensorEntry, &MomentStorage)> {
    optimizer.parameters.iter().flat_map(|p| {
        let entry = |ending: &str| TensorEntry {
            name: format!("{}.{ending}", p.name),
            shape: p.var.dims().to_vec(),
            dtype: Dtype::F32,
        };
        let both = [("first", &p.first), ("second", &p.second)];
        both.into_iter()
            .filter_map(move |(ending, moment)| Some((entry(ending), moment.as_ref()?)))
    })
}

/// A checkpoint that has been checked: it belongs to this model and configuration and is undamaged.
#[derive(Debug)]
pub(crate) struct OpenCheckpoint {
    folder: PathBuf,
    pub(crate) state: TrainingState,
}

impl OpenCheckpoint {
    /// # Errors
    /// [`CheckpointError::Mismatch`](crate::CheckpointError::Mismatch) naming the difference to
    /// this model, configuration or optimizer;
    /// [`CheckpointError::File`](crate::CheckpointError::File) for a damaged checkpoint.
    pub(crate) fn new(
        folder: &Path,
        optimizer: &Optimizer,
        config: &serde_json::Value,
    ) -> Result<Self> {
        let path = folder.join(STATE);
        let json = fs::read(&path).map_err(FileError::io(&path, "read"))?;
        let broken = |got: String| {
            FileError::file(
                &path,
                format!("the state of a training, version {VERSION}"),
                got,
            )
        };
        let state: TrainingState =
            serde_json::from_slice(&json).map_err(|e| broken(e.to_string()))?;
        if state.version != VERSION {
            return Err(broken(format!("version {}", state.version)).into());
        }
        TensorFile::open(folder, MODEL, "variable", &variables(optimizer))?;
        if let Some(what) = difference("", &state.config, config) {
            return Err(CheckpointError::Mismatch {
                path: folder.to_path_buf(),
                what,
            }
            .into());
        }
        TensorFile::open(
            folder,
            OPTIMIZER,
            "moment",
            &moments(optimizer)
                .map(|(entry, _)| entry)
                .collect::<Vec<_>>(),
        )?;
        for file in [MODEL, OPTIMIZER, TELEMETRY] {
            if file == TELEMETRY && !state.checksums.contains_key(file) {
                continue;
            }
            let (path, expected) = (
                folder.join(file),
                state.checksums.get(file).cloned().unwrap_or_default(),
            );
            let got = checksum(&path)?;
            if got != expected {
                return Err(FileError::file(
                    &path,
                    format!("checksum {expected}"),
                    format!("{got}: the file is damaged"),
                )
                .into());
            }
        }
        Ok(Self {
            folder: folder.to_path_buf(),
            state,
        })
    }

    /// Loads variables, moments and the number of steps into the optimizer.
    pub(crate) fn load(&self, optimizer: &mut Optimizer) -> Result<()> {
        let model = TensorFile::open(&self.folder, MODEL, "variable", &variables(optimizer))?;
        let moments = TensorFile::open(
            &self.folder,
            OPTIMIZER,
            "moment",
            &moments(optimizer)
                .map(|(entry, _)| entry)
                .collect::<Vec<_>>(),
        )?;
        for p in &mut optimizer.parameters {
            p.var.set(&Tensor::from_vec(
                model.floats(&p.name)?,
                p.var.shape(),
                p.var.device(),
            )?)?;
            for (ending, moment) in [("first", &mut p.first), ("second", &mut p.second)] {
                if let Some(moment) = moment {
                    moment.set(moments.floats(&format!("{}.{ending}", p.name))?)?;
                }
            }
        }
        optimizer.steps = self.state.step;
        Ok(())
    }

    /// The tensors of the telemetry by name; empty if it was off.
    pub(crate) fn telemetry(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        if !self.state.checksums.contains_key(TELEMETRY) {
            return Ok(BTreeMap::new());
        }
        let path = self.folder.join(TELEMETRY);
        let mut file = File::open(&path).map_err(FileError::io(&path, "open"))?;
        let len = file.metadata().map_err(FileError::io(&path, "read"))?.len();
        let header = SafetensorsHeader::read(&path, &file, len)?;
        let tensors = header.tensors.iter().map(|t| {
            let mut bytes = vec![0; t.len as usize];
            file.seek(SeekFrom::Start(t.offset))
                .and_then(|_| file.read_exact(&mut bytes))
                .map_err(FileError::io(&path, "read"))?;
            Ok((t.name.clone(), bytes))
        });
        tensors.collect()
    }
}

/// The first difference of two documents.
fn difference(at: &str, there: &serde_json::Value, here: &serde_json::Value) -> Option<String> {
    use serde_json::Value::{Null, Object};
    if let (Object(a), Object(b)) = (there, here) {
        let keys = a.keys().chain(b.keys().filter(|k| !a.contains_key(*k)));
        let path = |key: &str| {
            if at.is_empty() {
                key.to_string()
            } else {
                format!("{at}.{key}")
            }
        };
        return keys.into_iter().find_map(|key| {
            difference(
                &path(key),
                a.get(key).unwrap_or(&Null),
                b.get(key).unwrap_or(&Null),
            )
        });
    }
    let say = |value: &serde_json::Value| {
        if value.is_null() {
            "not set".into()
        } else {
            value.to_string()
        }
    };
    (there != here).then(|| {
        format!(
            "{at} is {} there and {} here; a resumed training keeps its configuration",
            say(there),
            say(here)
        )
    })
}
