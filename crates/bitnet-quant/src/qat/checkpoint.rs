//! Where a training stands, on disk: a folder for each checkpoint.
//!
//! ```text
//! FOLDER/step-000000100/model.safetensors        the variables, f32, by name
//!                       optimizer.safetensors    NAME.first (velocity or first moment) and NAME.second, f32
//!                       telemetry.safetensors    what the telemetry remembers of each layer, where it is on
//!                       state.json               steps taken, evaluations, configuration, what the task wants back, checksums of the other files
//! ```
//!
//! A checkpoint is written beside its name and renamed when it is complete and on the disk, so a
//! name always stands for a whole one, and whatever interrupts the writing leaves the earlier ones
//! as they were.

use super::optimizer::{Kept, Optimizer};
use super::telemetry::Telemetry;
use super::trainer::Stopped;
use crate::tensor::latent::Stage;
use crate::tensor::with_host_floats;
use crate::{CheckpointError, Error, Result};
use bitnet_formats::Error as FileError;
use bitnet_formats::document::Checksum;
use bitnet_formats::safetensors::{Header, OutEntry, encode_header};
use candle_core::Tensor;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Version that this code writes and reads.
pub(crate) const VERSION: u32 = 2;
const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const TELEMETRY: &str = "telemetry.safetensors";
const STATE: &str = "state.json";
/// Floats that are converted at a time.
const PIECE: usize = 1 << 16;
/// Ending of an unfinished folder.
const PARTIAL: &str = "partial";

/// When checkpoints are written, where, and how many stay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointConfig {
    /// The folder that holds them.
    pub folder: PathBuf,
    /// Steps between two of them; 0: only at the end, where the training is stopped, and at each
    /// evaluation that is the best so far.
    #[serde(default)]
    pub every: u64,
    /// How many of the newest stay, besides that of the best evaluation; 0: all.
    #[serde(default = "two")]
    pub keep: usize,
}

fn two() -> usize {
    2
}

/// What is not a tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    pub(crate) version: u32,
    /// Steps taken.
    pub(crate) step: u64,
    pub(crate) loss: Exact,
    /// Steps taken before the last evaluation, its value, and the best so far.
    pub(crate) evaluation: Option<(u64, Exact, Exact)>,
    /// Steps taken before the best one, whose checkpoint is kept, and its value.
    pub(crate) best: Option<(u64, Exact)>,
    /// Evaluations since the best one.
    pub(crate) worse: u64,
    /// Why the training stopped here, if it did.
    pub(crate) stopped: Option<Stopped>,
    /// What decides the numbers of a training.
    pub(crate) config: serde_json::Value,
    /// What each layer rounds to.
    pub(crate) layers: BTreeMap<String, Rounding>,
    /// What [`super::Task::state`] said.
    pub(crate) task: serde_json::Value,
    /// xxh3-128 of the files beside this one.
    pub(crate) checksums: BTreeMap<String, String>,
}

/// A number whose bits survive JSON, which they do not with every reader: it is a string there.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(crate) struct Exact(pub(crate) f64);

impl From<Exact> for String {
    fn from(exact: Exact) -> Self {
        exact.0.to_string()
    }
}

impl TryFrom<String> for Exact {
    type Error = std::num::ParseFloatError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

/// What a layer rounds to, and how strongly.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rounding {
    pub(crate) stage: Stage,
    pub(crate) lambda: f32,
}

/// A tensor to be written or read.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) dtype: Dtype,
}

/// Takes the bytes of a tensor, piece by piece.
pub(crate) type Put<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// The folder of a step.
pub(crate) fn path(folder: &Path, step: u64) -> PathBuf {
    folder.join(format!("step-{step:09}"))
}

/// The checkpoints of a folder, oldest first: steps and paths.
///
/// # Errors
/// [`FileError::Io`] if the folder is there and cannot be read.
pub fn checkpoints(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let entries = match fs::read_dir(folder) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        entries => entries.map_err(FileError::io(folder, "read"))?,
    };
    let mut found = vec![];
    for entry in entries {
        let entry = entry.map_err(FileError::io(folder, "read"))?;
        let name = entry.file_name();
        let step = name
            .to_str()
            .and_then(|n| n.strip_prefix("step-"))
            .filter(|n| n.len() >= 9 && n.bytes().all(|b| b.is_ascii_digit()));
        if let Some(step) = step.and_then(|n| n.parse().ok()) {
            found.push((step, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// Writes a checkpoint, then removes those that are too many. Returns its path.
pub(crate) fn write(
    config: &CheckpointConfig,
    optimizer: &Optimizer,
    telemetry: &Telemetry,
    mut state: State,
) -> Result<PathBuf> {
    fs::create_dir_all(&config.folder).map_err(FileError::io(&config.folder, "create"))?;
    remove_unfinished(&config.folder);
    let target = path(&config.folder, state.step);
    let partial = target.with_extension(PARTIAL);
    let result = fill(&partial, optimizer, telemetry, &mut state).and_then(|()| {
        if target.exists() {
            fs::remove_dir_all(&target).map_err(FileError::io(&target, "replace"))?;
        }
        fs::rename(&partial, &target).map_err(FileError::io(&target, "rename to"))?;
        sync(&config.folder)
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

/// Removes what a training that was killed left behind; where that fails, the next write says so.
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
    state: &mut State,
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
    let (slots, moments): (Vec<_>, Vec<_>) = moments(optimizer).unzip();
    let sum = save(&folder.join(OPTIMIZER), &slots, |i, put| {
        moments[i].with(|x| put_floats(x, put))
    })?;
    state.checksums.insert(OPTIMIZER.into(), sum);
    if telemetry.is_on() {
        let sum = save(&folder.join(TELEMETRY), &telemetry.slots(), |i, put| {
            telemetry.put(i, put)
        })?;
        state.checksums.insert(TELEMETRY.into(), sum);
    }
    let path = folder.join(STATE);
    let json = serde_json::to_vec_pretty(state).map_err(Error::recipe)?;
    let mut file = File::create(&path).map_err(FileError::io(&path, "create"))?;
    file.write_all(&json)
        .and_then(|()| file.sync_all())
        .map_err(FileError::io(&path, "write"))?;
    sync(folder)
}

/// Makes the names in a folder last.
fn sync(folder: &Path) -> Result<()> {
    #[cfg(unix)]
    File::open(folder)
        .and_then(|f| f.sync_all())
        .map_err(FileError::io(folder, "write"))?;
    #[cfg(not(unix))]
    let _ = folder;
    Ok(())
}

fn variables(optimizer: &Optimizer) -> Vec<Slot> {
    optimizer
        .parameters
        .iter()
        .map(|p| Slot {
            name: p.name.clone(),
            shape: p.var.dims().to_vec(),
            dtype: Dtype::F32,
        })
        .collect()
}

fn moments(optimizer: &Optimizer) -> impl Iterator<Item = (Slot, &Kept)> {
    optimizer.parameters.iter().flat_map(|p| {
        let slot = |ending: &str| Slot {
            name: format!("{}.{ending}", p.name),
            shape: p.var.dims().to_vec(),
            dtype: Dtype::F32,
        };
        let both = [("first", &p.first), ("second", &p.second)];
        both.into_iter()
            .filter_map(move |(ending, moment)| Some((slot(ending), moment.as_ref()?)))
    })
}

fn put_floats(x: &[f32], put: &mut Put<'_>) -> Result<()> {
    let mut bytes = Vec::with_capacity(4 * PIECE.min(x.len()));
    x.chunks(PIECE).try_for_each(|piece| {
        bytes.clear();
        bytes.extend(piece.iter().flat_map(|x| x.to_le_bytes()));
        put(&bytes)
    })
}

/// Writes tensors one after another; `bytes` calls its second argument with the bytes of one.
/// Returns the checksum of the file.
fn save(
    path: &Path,
    slots: &[Slot],
    bytes: impl Fn(usize, &mut Put<'_>) -> Result<()>,
) -> Result<String> {
    let mut at = 0;
    let entry = |slot: &Slot| {
        let len = (slot.dtype.bitsize() / 8 * slot.shape.iter().product::<usize>()) as u64;
        at += len;
        OutEntry {
            name: slot.name.clone(),
            dtype: slot.dtype,
            shape: slot.shape.clone(),
            range: (at - len, at),
        }
    };
    let entries: Vec<_> = slots.iter().map(entry).collect();
    let format = [("format".to_string(), "pt".to_string())];
    let header = encode_header(&format, &entries, None)
        .map_err(|got| FileError::file(path, "a header that fits", got))?;
    let (mut file, mut checksum) = (
        File::create(path).map_err(FileError::io(path, "create"))?,
        Checksum::default(),
    );
    let mut put = |bytes: &[u8]| {
        checksum.update(bytes);
        Ok(file
            .write_all(bytes)
            .map_err(FileError::io(path, "write"))?)
    };
    put(&header)?;
    (0..slots.len()).try_for_each(|i| bytes(i, &mut put))?;
    file.sync_all().map_err(FileError::io(path, "write"))?;
    Ok(checksum.hex())
}

/// A checkpoint that fits and is undamaged, and of which nothing has been taken over.
#[derive(Debug)]
pub(crate) struct Checked {
    folder: PathBuf,
    pub(crate) state: State,
}

impl Checked {
    /// # Errors
    /// [`Error::Mismatch`] naming what differs, for one of another model, configuration or
    /// optimizer; [`Error::File`] for one that is damaged.
    pub(crate) fn open(
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
        let state: State = serde_json::from_slice(&json).map_err(|e| broken(e.to_string()))?;
        if state.version != VERSION {
            return Err(broken(format!("version {}", state.version)).into());
        }
        Stored::open(folder, MODEL, &variables(optimizer))?;
        if let Some(what) = difference("", &state.config, config) {
            return Err(CheckpointError::Mismatch {
                path: folder.to_path_buf(),
                what,
            }
            .into());
        }
        Stored::open(
            folder,
            OPTIMIZER,
            &moments(optimizer).map(|(slot, _)| slot).collect::<Vec<_>>(),
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

    /// Variables, moments and number of steps into the optimizer.
    pub(crate) fn load(&self, optimizer: &mut Optimizer) -> Result<()> {
        let model = Stored::open(&self.folder, MODEL, &variables(optimizer))?;
        let moments = Stored::open(
            &self.folder,
            OPTIMIZER,
            &moments(optimizer).map(|(slot, _)| slot).collect::<Vec<_>>(),
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

    /// What the telemetry remembered, by tensor; nothing where it was off.
    pub(crate) fn telemetry(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        if !self.state.checksums.contains_key(TELEMETRY) {
            return Ok(BTreeMap::new());
        }
        let path = self.folder.join(TELEMETRY);
        let mut file = File::open(&path).map_err(FileError::io(&path, "open"))?;
        let len = file.metadata().map_err(FileError::io(&path, "read"))?.len();
        let header = Header::read(&path, &file, len)?;
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

fn checksum(path: &Path) -> Result<String> {
    let (mut file, mut sum) = (
        File::open(path).map_err(FileError::io(path, "open"))?,
        Checksum::default(),
    );
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file
            .read(&mut buffer)
            .map_err(FileError::io(path, "read"))?
        {
            0 => return Ok(sum.hex()),
            n => sum.update(&buffer[..n]),
        }
    }
}

/// A file whose tensors are those that are wanted.
struct Stored {
    path: PathBuf,
    header: Header,
}

impl Stored {
    fn open(folder: &Path, file: &str, wanted: &[Slot]) -> Result<Self> {
        let (path, kind) = (
            folder.join(file),
            if file == MODEL { "variable" } else { "moment" },
        );
        let file = File::open(&path).map_err(FileError::io(&path, "open"))?;
        let len = file.metadata().map_err(FileError::io(&path, "read"))?.len();
        let header = Header::read(&path, &file, len)?;
        let differs = |what: String| {
            Err(CheckpointError::Mismatch {
                path: folder.to_path_buf(),
                what: format!("a checkpoint of another model: {what}"),
            }
            .into())
        };
        for slot in wanted {
            match header.tensors.iter().find(|t| t.name == slot.name) {
                None => return differs(format!("it has no {kind} '{}'", slot.name)),
                Some(t) if t.shape != slot.shape => {
                    return differs(format!(
                        "{kind} '{}' has shape {:?} there and {:?} here",
                        slot.name, t.shape, slot.shape
                    ));
                }
                Some(t) if t.dtype != Dtype::F32 => {
                    return differs(format!(
                        "{kind} '{}' is {:?} there and F32 here",
                        slot.name, t.dtype
                    ));
                }
                Some(_) => {}
            }
        }
        if let Some(extra) = header
            .tensors
            .iter()
            .find(|t| !wanted.iter().any(|slot| slot.name == t.name))
        {
            return differs(format!(
                "it has a {kind} '{}', which the model has not",
                extra.name
            ));
        }
        Ok(Self { path, header })
    }

    fn floats(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.header.tensors.iter().find(|t| t.name == name);
        let Some(entry) = entry else {
            return Err(FileError::tensor(&self.path, name, "a tensor", "none").into());
        };
        let mut file = File::open(&self.path).map_err(FileError::io(&self.path, "open"))?;
        file.seek(SeekFrom::Start(entry.offset))
            .map_err(FileError::io(&self.path, "read"))?;
        let (mut values, mut bytes) = (
            Vec::with_capacity(entry.len as usize / 4),
            vec![0; 4 * PIECE],
        );
        let mut left = entry.len as usize;
        while left > 0 {
            let piece = &mut bytes[..left.min(4 * PIECE)];
            file.read_exact(piece)
                .map_err(FileError::io(&self.path, "read"))?;
            values.extend(
                piece
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .map(|b| f32::from_le_bytes(*b)),
            );
            left -= piece.len();
        }
        Ok(values)
    }
}

/// Where two documents differ first.
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
            "{at} is {} there and {} here; a training goes on as it began",
            say(there),
            say(here)
        )
    })
}
