//! Model folders as Hugging Face has them: config.json, model.safetensors and tokenizer files.

use crate::{Error, Result};
use bitnet_formats::arch::is_rope_tensor;
use bitnet_formats::replace::{Existing, PARTIAL, beside, place_folder, recover_folder, remove};
use bitnet_formats::{Content, Source};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::sync::PoisonError;

/// The variables of a map by name.
pub fn sorted(vars: &VarMap) -> BTreeMap<String, Var> {
    let all = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
    all.iter()
        .map(|(name, var)| (name.clone(), var.clone()))
        .collect()
}

/// The values of the variables by name.
pub fn tensors(vars: &VarMap) -> BTreeMap<String, Tensor> {
    sorted(vars)
        .into_iter()
        .map(|(name, var)| (name, var.as_tensor().detach()))
        .collect()
}

/// Sets every variable to the tensor of its name in a float checkpoint. As in the engine, the copy
/// of a tied output matrix and tables of rotary positions have no variable.
///
/// # Errors
/// [`Error::File`] for a tensor that is missing, has another shape, is quantized or not finite, and
/// for a tensor without a variable.
pub fn load(vars: &VarMap, source: &Source) -> Result<()> {
    let vars = sorted(vars);
    for (name, var) in &vars {
        var.set(&read(source, name, var.dims())?)?;
    }
    let tied = source
        .config()
        .is_some_and(|config| config["tie_word_embeddings"] == true);
    let is_copy = |name: &str| (tied && name == "lm_head.weight") || is_rope_tensor(name);
    match source
        .tensors()
        .iter()
        .find(|t| !vars.contains_key(&t.name) && !is_copy(&t.name))
    {
        Some(extra) => Err(bitnet_formats::Error::tensor(
            source.path(),
            &extra.name,
            "only tensors that the model's training graph has",
            "one that has no place in it",
        )
        .into()),
        None => Ok(()),
    }
}

/// Reads a float tensor of this shape.
///
/// # Errors
/// As [`load`].
pub fn read(source: &Source, name: &str, shape: &[usize]) -> Result<Tensor> {
    let bad = |expected: String, got: String| {
        Error::from(bitnet_formats::Error::tensor(
            source.path(),
            name,
            expected,
            got,
        ))
    };
    let tensor = source
        .find(name)
        .ok_or_else(|| bad(format!("shape {shape:?}"), "no such tensor".into()))?;
    if tensor.shape != shape {
        return Err(bad(
            format!("shape {shape:?}"),
            format!("{:?}", tensor.shape),
        ));
    }
    source.refuse_rotated(name)?;
    let Content::Float(stored) = tensor.content else {
        return Err(bad("floats, to be trained".into(), "other values".into()));
    };
    let mut values = vec![0.0; shape.iter().product()];
    source.read_floats(stored, 0..values.len(), &mut vec![], &mut values)?;
    if let Some(at) = values.iter().position(|v| !v.is_finite()) {
        return Err(bad(
            "finite numbers".into(),
            format!("{} at index {at}", values[at]),
        ));
    }
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Writes a folder with weights in f32, config.json and other files by name. The folder gets its
/// name when it is complete.
///
/// # Errors
/// [`Error::File`] if the folder exists or cannot be written.
pub fn save(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    config: &Value,
    files: &[(String, Vec<u8>)],
) -> Result<()> {
    if path.exists() {
        return Err(bitnet_quant::CheckpointError::Exists {
            path: path.to_path_buf(),
        }
        .into());
    }
    write(path, Existing::Refuse, tensors, config, files)
}

/// [`save`], also over a folder that exists.
///
/// # Errors
/// [`Error::File`] if the folder cannot be written.
pub fn replace(
    path: &Path,
    tensors: &BTreeMap<String, Tensor>,
    config: &Value,
    files: &[(String, Vec<u8>)],
) -> Result<()> {
    write(path, Existing::Replace, tensors, config, files)
}

fn write(
    path: &Path,
    existing: Existing,
    tensors: &BTreeMap<String, Tensor>,
    config: &Value,
    files: &[(String, Vec<u8>)],
) -> Result<()> {
    let mut stored = vec![];
    for (name, tensor) in tensors {
        stored.push((name, tensor.dims().to_vec(), bytes(tensor)?));
    }
    let failed = |what: String| {
        Error::from(bitnet_formats::Error::file(
            path,
            "tensors that safetensors can hold",
            what,
        ))
    };
    let views = stored.iter().map(|(name, shape, data)| {
        Ok((
            name.as_str(),
            TensorView::new(Dtype::F32, shape.clone(), data)?,
        ))
    });
    let views: Vec<_> = views
        .collect::<Result<_, safetensors::SafeTensorError>>()
        .map_err(|e| failed(e.to_string()))?;
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let weights =
        safetensors::serialize(views, Some(metadata)).map_err(|e| failed(e.to_string()))?;
    let partial = beside(path, PARTIAL);
    recover_folder(&partial, path)?;
    let written = (|| {
        remove(&partial)?;
        fs::create_dir_all(&partial).map_err(bitnet_formats::Error::io(&partial, "create"))?;
        let write = |name: &str, bytes: &[u8]| {
            fs::write(partial.join(name), bytes)
                .map_err(bitnet_formats::Error::io(&partial.join(name), "write"))
        };
        write("model.safetensors", &weights)?;
        write("config.json", format!("{config:#}\n").as_bytes())?;
        files
            .iter()
            .try_for_each(|(name, bytes)| write(name, bytes))?;
        place_folder(&partial, path, existing)
    })();
    if written.is_err() {
        let _ = remove(&partial);
    }
    Ok(written?)
}

/// Little-endian f32.
fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    Ok(tensor
        .flatten_all()?
        .to_vec1::<f32>()?
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect())
}

/// The variables of a map as constants, without gradients.
pub fn constants(vars: &VarMap) -> VarBuilder<'static> {
    VarBuilder::from_tensors(
        tensors(vars).into_iter().collect(),
        DType::F32,
        &Device::Cpu,
    )
}
