//! The workload of language models.

use crate::config::{Distillation, LmConfig};
use crate::data::{Text, Vocabulary, text};
use crate::models::DecoderModel;
use crate::run::Workload;
use crate::run::resume::{check_task_state, task_state};
use crate::variables::variables;
use crate::{Error, Result, distill, folder, ops};
use bitnet_inference::perplexity::{Windows, perplexity};
use bitnet_inference::{ActivationType, CacheType, LoadOptions, Model};
use bitnet_quant::qat::{Linears, Task};
use bitnet_quant::{Activations, Source};
use candle_core::{Device, Tensor};
use candle_nn::{VarBuilder, VarMap};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use xxhash_rust::xxh3::xxh3_64;

/// Number of tokens per evaluation batch.
const MEASURED: usize = 4096;

/// Language modelling: the text of a run and the shape of its model.
#[derive(Debug)]
pub struct LmWorkload {
    json: Value,
    /// Path of config.json, for messages.
    json_path: PathBuf,
    from: Option<Source>,
    vocabulary: Vocabulary,
    train: Vec<u32>,
    /// The windows to measure on.
    measured: Vec<u32>,
    context: usize,
    batch: usize,
    seed: u64,
    accumulate: u64,
    distillation: Distillation,
    /// Type of the inputs of packed layers.
    activations: ActivationType,
}

impl LmWorkload {
    /// Reads model and text.
    ///
    /// # Errors
    /// As [`Source::open`], [`Vocabulary::read`] and [`Text::read`]; [`Error::Tokenizer`] for a
    /// vocabulary larger than the model's, [`Error::Data`] for a text that is too short,
    /// [`Error::Option`] for an invalid shape or context.
    pub fn new(config: &LmConfig) -> Result<Self> {
        config.run.validate()?;
        let (data, model, context) = (&config.data, &config.model, config.model.context);
        if context < 2 {
            return Err(Error::option("model.context", "at least 2 tokens", context));
        }
        let from = model.from.as_deref().map(Source::open).transpose()?;
        let own = model
            .from
            .as_ref()
            .map(|folder| folder.join("tokenizer.json"))
            .filter(|path| path.exists());
        let tokenizer = data.tokenizer.clone().or(own);
        let vocabulary = match &tokenizer {
            Some(path) => Vocabulary::read(path)?,
            None => Vocabulary::Bytes,
        };
        let (json, json_path) = match &from {
            Some(source) => {
                let path = source.path().join("config.json");
                let json = source.config().cloned();
                (
                    json.ok_or_else(|| {
                        Error::data(source.path(), "a folder with config.json", "something else")
                    })?,
                    path,
                )
            }
            None => (
                model.shape.config_json(vocabulary.len(), context)?,
                "model.shape".into(),
            ),
        };
        let facts = bitnet_inference::Config::from_hf(&json_path, &json)?;
        facts.architecture.training_graph(&json_path)?;
        if vocabulary.len() > facts.vocab {
            let path = tokenizer.unwrap_or_else(|| "bytes".into());
            let what = format!(
                "expected at most {} tokens, the model's vocabulary, got {}",
                facts.vocab,
                vocabulary.len()
            );
            return Err(Error::Tokenizer { path, what });
        }
        let text = Text::read(&data.text, &vocabulary, data.held_out)?;
        text.check(&data.text[0], context)?;
        let activations =
            activation_type(config.training.quantization.activations.unwrap_or_default())?;
        Ok(Self {
            json,
            json_path,
            from,
            vocabulary,
            measured: windows(&text.held_out, context, data.measured),
            train: text.train,
            context,
            batch: config.run.batch,
            seed: config.run.seed,
            accumulate: config.training.accumulate,
            distillation: config.run.distillation,
            activations,
        })
    }

    fn decoder(&self, vb: &VarBuilder<'_>) -> Result<DecoderModel> {
        DecoderModel::new(&self.json_path, &self.json, self.context, vb)
    }

    /// Mean of −ln p in nats over the tokens of the windows, without the first of each.
    fn loss(&self, decoder: &DecoderModel) -> candle_core::Result<f64> {
        let (mut sum, mut count, context) = (0.0, 0, self.context);
        for part in self.measured.chunks(MEASURED.div_ceil(context) * context) {
            let rows = part.len() / context;
            let tokens = Tensor::from_slice(part, (rows, context), &Device::Cpu)?;
            let logits = decoder.forward(&tokens.narrow(1, 0, context - 1)?.contiguous()?)?;
            let loss = ops::cross_entropy(&logits, &tokens.narrow(1, 1, context - 1)?)?;
            sum += f64::from(loss.to_scalar::<f32>()?) * (rows * (context - 1)) as f64;
            count += rows * (context - 1);
        }
        Ok(sum / count as f64)
    }
}

/// The type of activations in the inference engine.
fn activation_type(activations: Activations) -> Result<ActivationType> {
    match activations {
        Activations::Int8 => Ok(ActivationType::Int8),
        Activations::Float => Ok(ActivationType::Float),
        other => Err(Error::option(
            "training.quantization.activations",
            "int8 or float, which packed language models run with",
            format!("{other:?}").to_lowercase(),
        )),
    }
}

fn checksum(tokens: &[u32]) -> u64 {
    let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
    xxh3_64(&bytes)
}

/// Whole windows of a text at equal distances: at most `most` tokens unless that is 0, and at least
/// one window.
fn windows(tokens: &[u32], context: usize, most: usize) -> Vec<u32> {
    let all = tokens.len() / context;
    let taken = if most == 0 {
        all
    } else {
        (most / context).clamp(1, all)
    };
    (0..taken)
        .flat_map(|i| &tokens[i * all / taken * context..][..context])
        .copied()
        .collect()
}

impl Workload for LmWorkload {
    type Model = DecoderModel;

    fn metric(&self) -> &'static str {
        "loss"
    }

    fn build(&self, vb: &VarBuilder<'_>) -> Result<DecoderModel> {
        self.decoder(vb)
    }

    fn load_initial(&self, vars: &VarMap) -> Result<()> {
        self.from
            .iter()
            .try_for_each(|source| folder::load(vars, source))
    }

    fn config_json(&self) -> Value {
        let mut json = self.json.clone();
        // The weights are written in f32.
        for key in ["torch_dtype", "dtype"] {
            if let Some(dtype) = json.get_mut(key) {
                *dtype = "float32".into();
            }
        }
        json
    }

    fn files(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut files = self.vocabulary.files()?;
        // The tokens that end a text, which come before those of config.json.
        let name = "generation_config.json";
        let generation = self.from.as_ref().map(|source| source.path().join(name));
        if let Some(path) = generation.filter(|path| path.exists()) {
            let bytes = fs::read(&path).map_err(bitnet_formats::Error::io(&path, "read"))?;
            files.push((name.into(), bytes));
        }
        Ok(files)
    }

    fn task<'t>(
        &'t self,
        model: DecoderModel,
        vars: VarMap,
        teacher: Option<DecoderModel>,
    ) -> Box<dyn Task + 't> {
        Box::new(LmTask {
            workload: self,
            model,
            vars,
            teacher,
        })
    }

    fn teacher(&self, path: &Path) -> Result<DecoderModel> {
        let source = Source::open(path)?;
        let json = source
            .config()
            .cloned()
            .ok_or_else(|| Error::data(path, "a folder with config.json", "something else"))?;
        let json_path = path.join("config.json");
        let (ours, theirs) = (
            bitnet_inference::Config::from_hf(&self.json_path, &self.json)?,
            bitnet_inference::Config::from_hf(&json_path, &json)?,
        );
        if theirs.vocab != ours.vocab {
            return Err(Error::data(
                path,
                format!("a teacher with the vocabulary of {}", ours.vocab),
                theirs.vocab,
            ));
        }
        if self.distillation.hidden > 0.0
            && (theirs.layers, theirs.hidden) != (ours.layers, ours.hidden)
        {
            let (expected, got) = (
                format!(
                    "{} layers of {} elements, to compare hidden states",
                    ours.layers, ours.hidden
                ),
                (theirs.layers, theirs.hidden),
            );
            return Err(Error::data(path, expected, format!("{got:?}")));
        }
        let vars = VarMap::new();
        DecoderModel::new(&json_path, &json, self.context, &variables(&vars, 0))?;
        folder::load(&vars, &source)?;
        DecoderModel::new(&json_path, &json, self.context, &folder::constants(&vars))
    }

    /// Measures with the inference engine.
    fn measure(&self, path: &Path) -> Result<f64> {
        let model = Model::load_with(
            path,
            &LoadOptions {
                activations: self.activations,
                ..LoadOptions::default()
            },
        )?;
        let windows = Windows {
            context: self.context,
            stride: self.context,
            cache: CacheType::F32,
        };
        let result = perplexity(
            &model,
            &self.measured,
            &windows,
            &|_, _| (),
            &AtomicBool::new(false),
        )?;
        Ok(result.loss.mean())
    }
}

struct LmTask<'t> {
    workload: &'t LmWorkload,
    model: DecoderModel,
    vars: VarMap,
    teacher: Option<DecoderModel>,
}

impl Task for LmTask<'_> {
    fn vars(&self) -> &VarMap {
        &self.vars
    }

    fn loss(&mut self, step: u64, micro: u64) -> bitnet_quant::Result<Tensor> {
        let workload = self.workload;
        let (tokens, targets) = text::batch(
            &workload.train,
            workload.seed,
            step * workload.accumulate + micro,
            workload.batch,
            workload.context,
        )?;
        let Some(teacher) = &self.teacher else {
            return Ok(ops::cross_entropy(&self.model.forward(&tokens)?, &targets)?);
        };
        if workload.distillation.hidden == 0.0 && workload.distillation.relations == 0.0 {
            let logits = self.model.forward(&tokens)?;
            return distill::logits(
                ops::cross_entropy(&logits, &targets)?,
                &logits,
                &teacher.forward(&tokens)?,
                &workload.distillation,
            );
        }
        let (logits, trace) = self.model.forward_traced(&tokens)?;
        let (aim, teacher) = teacher.forward_traced(&tokens)?;
        let loss = distill::logits(
            ops::cross_entropy(&logits, &targets)?,
            &logits,
            &aim,
            &workload.distillation,
        )?;
        distill::traces(loss, &trace, &teacher, &workload.distillation)
    }

    fn evaluate(&mut self) -> bitnet_quant::Result<f64> {
        Ok(self.workload.loss(&self.model)?)
    }

    fn linears(&mut self) -> Option<&mut dyn Linears> {
        Some(&mut self.model)
    }

    fn state(&self) -> Value {
        let workload = self.workload;
        let mut state = task_state(
            workload.seed,
            workload.batch,
            &workload.distillation,
            self.teacher.is_some(),
            checksum(&workload.train),
        );
        state["context"] = workload.context.into();
        state
    }

    fn restore(&mut self, state: &Value) -> bitnet_quant::Result<()> {
        check_task_state(state, &self.state())
    }

    fn batch(&self) -> (u64, &'static str) {
        (
            (self.workload.batch * self.workload.context) as u64,
            "tokens",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::windows;

    #[test]
    fn windows_are_whole_and_spread_over_the_text() {
        let tokens: Vec<u32> = (0..107).collect();
        assert_eq!(windows(&tokens, 10, 0), (0..100).collect::<Vec<u32>>());
        assert_eq!(
            windows(&tokens, 10, 20),
            (0..10).chain(50..60).collect::<Vec<u32>>()
        );
        assert_eq!(windows(&tokens, 10, 1), (0..10).collect::<Vec<u32>>());
        assert_eq!(windows(&tokens, 10, 10_000).len(), 100);
    }
}
