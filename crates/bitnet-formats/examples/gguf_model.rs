//! Writes a Hugging Face model folder of float tensors as an f32 GGUF, or a byte-level GGUF back as
//! a folder: for scripts/check-gguf-model.py.
//!
//! ```text
//! gguf_model FOLDER OUT.gguf        gguf_model IN.gguf OUT_FOLDER
//! ```

use bitnet_formats::arch::{self, Architecture, HeadCounts, TensorOrder};
use bitnet_formats::gguf::{GgmlType, GgufEntry, Value, encode_header};
use bitnet_formats::{Content, Kind, Source};
use safetensors::{Dtype, tensor::TensorView};
use std::error::Error;
use std::fs;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, input, output] = args.as_slice() else {
        return Err("two paths are needed".into());
    };
    let source = Source::open(input.as_ref())?;
    if source.kind() == Kind::Gguf {
        to_folder(&source, output.as_ref())
    } else {
        to_gguf(&source, output.as_ref())
    }
}

/// All values of a tensor as `element` makes them, rows or columns in another order where one is
/// given.
fn rows(
    source: &Source,
    tensor: &bitnet_formats::Tensor,
    order: Option<TensorOrder>,
    element: impl Fn(f32) -> f32,
) -> Result<Vec<u8>, Box<dyn Error>> {
    let mut values = vec![0.0; tensor.elements()];
    match &tensor.content {
        Content::Float(stored) => {
            source.read_floats(*stored, 0..values.len(), &mut vec![], &mut values)?
        }
        _ => return Err(format!("'{}' holds no floats", tensor.name).into()),
    }
    let rows = tensor.shape[0];
    let cols = values.len() / rows;
    let (mut row_order, mut columns) = ((0..rows).collect(), (0..cols).collect());
    match order {
        None => {}
        Some(TensorOrder::Rows(order)) => row_order = order,
        Some(TensorOrder::Columns(order)) => columns = order,
    }
    let (row_order, columns): (Vec<usize>, Vec<usize>) = (row_order, columns);
    let elements = row_order
        .iter()
        .flat_map(|row| columns.iter().map(move |column| row * cols + column));
    Ok(elements
        .flat_map(|i| element(values[i]).to_le_bytes())
        .collect())
}

fn to_gguf(source: &Source, out: &Path) -> Result<(), Box<dyn Error>> {
    let config = source.config().ok_or("a model folder is needed")?;
    let mut made = arch::gguf_metadata(source.path(), config)?;
    made.notes.iter().for_each(|note| println!("note: {note}"));
    made.metadata
        .push(("general.file_type".into(), Value::U32(0)));
    let tied = config["tie_word_embeddings"] == true;
    let (architecture, counts) = (made.architecture, HeadCounts::from_hf_config(config)?);
    let (mut infos, mut data) = (vec![], vec![]);
    for tensor in source
        .tensors()
        .iter()
        .filter(|t| !(tied && t.name == "lm_head.weight"))
    {
        let name = architecture
            .gguf_tensor(&tensor.name)
            .ok_or_else(|| format!("no GGUF name for '{}'", tensor.name))?;
        let bytes = rows(
            source,
            tensor,
            architecture.gguf_order(counts, &tensor.name, &tensor.shape)?,
            |w| architecture.gguf_elements(&tensor.name).to_gguf(w),
        )?;
        infos.push(GgufEntry {
            name,
            shape: architecture.gguf_shape(&tensor.name, &tensor.shape),
            ggml_type: GgmlType::F32,
            len: bytes.len() as u64,
        });
        data.push(bytes);
    }
    for (name, freqs) in made.rope_tensors {
        let bytes: Vec<u8> = freqs.iter().flat_map(|x| x.to_le_bytes()).collect();
        infos.push(GgufEntry {
            name: name.into(),
            shape: vec![freqs.len()],
            ggml_type: GgmlType::F32,
            len: bytes.len() as u64,
        });
        data.push(bytes);
    }
    let header = encode_header(&made.metadata, &infos, 32)?;
    let mut file = header.bytes.clone();
    for (i, bytes) in data.iter().enumerate() {
        file.extend(bytes);
        file.resize(
            file.len() + header.padding_after(i, bytes.len() as u64) as usize,
            0,
        );
    }
    Ok(fs::write(out, file)?)
}

fn to_folder(source: &Source, out: &Path) -> Result<(), Box<dyn Error>> {
    let shape = |name: &str| source.find(name).map(|t| t.shape.clone());
    let config = arch::hf_config(source.path(), source.gguf(), &shape, &|name| {
        source.vector(name)
    })?;
    let (architecture, counts) = (
        Architecture::from_gguf(source.gguf())?,
        HeadCounts::from_gguf(source.gguf())?,
    );
    fs::create_dir_all(out)?;
    fs::write(out.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
    match arch::hf_tokenizer(source.gguf()) {
        Err(why) => println!("note: no tokenizer: {why}"),
        Ok((tokenizer, settings)) => {
            fs::write(out.join("tokenizer.json"), serde_json::to_vec(&tokenizer)?)?;
            fs::write(
                out.join("tokenizer_config.json"),
                serde_json::to_vec_pretty(&settings)?,
            )?;
        }
    }
    let mut tensors = vec![];
    for tensor in source.tensors() {
        let name = architecture
            .hf_tensor(&tensor.name)
            .ok_or_else(|| format!("no Hugging Face name for '{}'", tensor.name))?;
        let order = architecture.hf_order(counts, &name, &tensor.shape)?;
        let form = architecture.gguf_elements(&name);
        let bytes = rows(source, tensor, order, |w| form.to_hf(w))?;
        let shape = architecture.hf_shape(&name, &tensor.shape);
        tensors.push((name, shape, bytes));
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (name, view))
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    let metadata = std::collections::HashMap::from([("format".into(), "pt".into())]);
    Ok(fs::write(
        out.join("model.safetensors"),
        safetensors::serialize(views, Some(metadata))?,
    )?)
}
