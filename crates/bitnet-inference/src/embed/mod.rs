//! Texts to vectors: encoders, and decoders whose hidden states are pooled.

mod pooling;

use crate::arch::{BertModel, EncoderBuffers};
use crate::forward::{ForwardBuffers, ForwardStep, WantedLogits};
use crate::linear::KernelPool;
use crate::load::CheckpointLoader;
use crate::model::int8_activations;
use crate::tokenizer::Tokenizer;
use crate::{CacheType, Config, Error, KvCache, LoadOptions, Model, Result};
use bitnet_formats::arch::{
    self, Architecture, HfConfig, HfEncoder, ModelKind, Pooling, SentenceFiles,
};
use bitnet_formats::{Kind, Source};
use pooling::Pool;
use std::path::Path;

/// Tokens of a batch, unless one text has more.
const BATCH: usize = 2048;
/// Tokens of a text that a decoder computes at once.
const CHUNK: usize = 512;

/// Whether vectors get the length 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Normalization {
    /// As the model's files say, and where they say nothing, yes.
    #[default]
    Model,
    /// They keep their length.
    Never,
}

/// Options of [`Embedder::load_with`].
#[derive(Debug, Clone, Default)]
pub struct EmbedOptions {
    /// How the model is loaded.
    pub load: LoadOptions,
    /// The pooling; none for the model's.
    pub pooling: Option<Pooling>,
    /// Whether vectors get the length 1.
    pub normalization: Normalization,
    /// Name of a prompt in the model's config_sentence_transformers.json, which is put before each
    /// text; none for the model's default.
    pub prompt: Option<String>,
}

/// The tokens of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedText {
    /// The tokens that the model sees.
    pub tokens: Vec<u32>,
    /// Number of tokens that the text has: more, if it was cut.
    pub full: usize,
}

/// A model that gives each text a vector.
///
/// ```no_run
/// use bitnet_inference::Embedder;
/// let embedder = Embedder::load("all-MiniLM-L6-v2")?;
/// let vectors = embedder.embed(&["a cat", "a kitten"])?;
/// let cosine: f32 = vectors[0].iter().zip(&vectors[1]).map(|(a, b)| a * b).sum();
/// assert!(cosine > 0.5);
/// # Ok::<(), bitnet_inference::Error>(())
/// ```
#[derive(Debug)]
pub struct Embedder {
    graph: Graph,
    pooling: Pooling,
    normalize: bool,
    prompt: String,
    max_tokens: usize,
    notes: Vec<String>,
}

#[derive(Debug)]
enum Graph {
    Encoder(Box<Encoder>),
    Decoder(Box<Model>),
}

/// An encoder with what runs it.
#[derive(Debug)]
struct Encoder {
    model: BertModel,
    runtime: KernelPool,
    tokenizer: Tokenizer,
}

impl Embedder {
    /// Loads a Hugging Face folder or a GGUF file.
    ///
    /// # Errors
    /// See [`Embedder::load_with`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Self::load_with(path, &EmbedOptions::default())
    }

    /// [`Embedder::load`] with options.
    ///
    /// # Errors
    /// As [`Model::load_with`], and [`Error::Tokenizer`] for a model without a usable tokenizer;
    /// [`Error::File`] for files of sentence-transformers that ask for what is not computed, for a
    /// model whose files name no pooling while the options name none, and for a prompt that they do
    /// not have.
    pub fn load_with(path: impl AsRef<Path>, options: &EmbedOptions) -> Result<Self> {
        let source = Source::open_with(path.as_ref(), &options.load.open)?;
        let (graph, mut notes) = match encoder_facts(&source)? {
            Some(facts) => load_encoder(&source, facts, &options.load)?,
            None => load_decoder(&source, &options.load)?,
        };
        let (dimensions, context) = graph.sizes();
        let files = match source.kind() {
            Kind::Folder => SentenceFiles::read(source.path(), dimensions)?,
            Kind::Gguf | Kind::File => None,
        };
        let said = Said::read(&source, files.as_ref())?;
        let (pooling, normalize) = said.settings(&source, &graph, options, &mut notes)?;
        let files = files.unwrap_or_default();
        let prompt = prompt(&source, &files, options.prompt.as_deref())?;
        let most = files.max_tokens.map_or(context, |most| most.min(context));
        Ok(Self {
            graph,
            pooling,
            normalize,
            prompt,
            max_tokens: most,
            notes,
        })
    }

    /// Elements of a vector.
    pub fn dimensions(&self) -> usize {
        self.graph.sizes().0
    }

    /// Most tokens of a text, special tokens and prompt included; longer texts are cut.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// The pooling.
    pub fn pooling(&self) -> Pooling {
        self.pooling
    }

    /// Whether vectors have the length 1.
    pub fn normalizes(&self) -> bool {
        self.normalize
    }

    /// Sentences for the user about what was assumed or rounded on loading.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The tokens of a text after the prompt, with the special tokens of the tokenizer, cut to
    /// [`Embedder::max_tokens`].
    ///
    /// # Errors
    /// [`Error::EmptyText`] for a text of white space, [`Error::Tokenizer`].
    pub fn encode(&self, text: &str) -> Result<EncodedText> {
        if text.trim().is_empty() {
            return Err(Error::EmptyText);
        }
        let tokenizer = match &self.graph {
            Graph::Encoder(encoder) => &encoder.tokenizer,
            Graph::Decoder(model) => model.tokenizer()?,
        };
        let text = format!("{}{text}", self.prompt);
        let (tokens, full) = tokenizer.encode_within(&text, self.max_tokens)?;
        Ok(EncodedText { tokens, full })
    }

    /// The vector of each text. It depends on the text alone: the other texts, the number of
    /// threads and the instruction set change no bit.
    ///
    /// # Errors
    /// As [`Embedder::encode`] and [`Embedder::embed_tokens`].
    pub fn embed<T: AsRef<str>>(&self, texts: &[T]) -> Result<Vec<Vec<f32>>> {
        let encoded: Vec<EncodedText> = texts
            .iter()
            .map(|text| self.encode(text.as_ref()))
            .collect::<Result<_>>()?;
        let tokens: Vec<&[u32]> = encoded.iter().map(|text| &text.tokens[..]).collect();
        self.embed_tokens(&tokens)
    }

    /// The vector of each list of tokens. Texts of similar length are computed together.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for a list without tokens, [`Error::Context`] for one that is longer
    /// than the context, [`Error::Token`] for a token outside the vocabulary, [`Error::NotFinite`]
    /// if activations become NaN or infinite.
    pub fn embed_tokens(&self, texts: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&i| texts[i].len());
        let mut vectors = vec![vec![]; texts.len()];
        let (mut encoder, mut decoder) = (EncoderBuffers::default(), ForwardBuffers::default());
        let mut rest = &order[..];
        while !rest.is_empty() {
            let mut tokens = 0;
            let fits = |&&i: &&usize| {
                tokens += texts[i].len();
                tokens <= BATCH
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (batch, after) = rest.split_at(count);
            rest = after;
            let batch_texts: Vec<&[u32]> = batch.iter().map(|&i| texts[i]).collect();
            let pools = match &self.graph {
                Graph::Encoder(graph) => self.encoder_batch(graph, &batch_texts, &mut encoder),
                Graph::Decoder(model) => self.decoder_batch(model, &batch_texts, &mut decoder),
            }?;
            for (&i, pool) in batch.iter().zip(pools) {
                let vector = pool.finish(self.normalize);
                if !vector.iter().all(|x| x.is_finite()) {
                    let at = "the vector of a text".to_string();
                    return Err(Error::NotFinite { at });
                }
                vectors[i] = vector;
            }
        }
        Ok(vectors)
    }

    fn pools(&self, texts: usize) -> Vec<Pool> {
        let dimensions = self.dimensions();
        (0..texts)
            .map(|_| Pool::new(self.pooling, dimensions))
            .collect()
    }

    fn encoder_batch(
        &self,
        encoder: &Encoder,
        texts: &[&[u32]],
        buffers: &mut EncoderBuffers,
    ) -> Result<Vec<Pool>> {
        let Encoder { model, runtime, .. } = encoder;
        let states = model.hidden_states(runtime, texts, buffers)?;
        let mut pools = self.pools(texts.len());
        let mut states = states.chunks_exact(model.facts.hidden);
        for (text, pool) in texts.iter().zip(&mut pools) {
            let states = states.by_ref().take(text.len());
            states.for_each(|state| pool.push(state));
        }
        Ok(pools)
    }

    fn decoder_batch(
        &self,
        model: &Model,
        texts: &[&[u32]],
        buffers: &mut ForwardBuffers,
    ) -> Result<Vec<Pool>> {
        let (config, mut pools) = (model.config(), self.pools(texts.len()));
        let context = config.context;
        if let Some(got) = texts.iter().map(|t| t.len()).find(|got| *got > context) {
            return Err(Error::Context { got, context });
        }
        let mut caches: Vec<KvCache> = texts
            .iter()
            .map(|text| KvCache::new(config, text.len(), CacheType::F32))
            .collect();
        let longest = texts.iter().map(|text| text.len()).max().unwrap_or(0);
        for first in (0..longest.max(1)).step_by(CHUNK) {
            let chunk = |text: &[u32]| first..text.len().min(first + CHUNK);
            let mut steps: Vec<ForwardStep<'_>> = texts
                .iter()
                .zip(&mut caches)
                .filter(|(text, _)| text.len() > first || first == 0)
                .map(|(text, cache)| ForwardStep {
                    cache,
                    tokens: &text[chunk(text)],
                    want: WantedLogits::All,
                })
                .collect();
            let states = model.hidden_states(&mut steps, buffers)?;
            let mut states = states.chunks_exact(config.hidden);
            for (text, pool) in texts.iter().zip(&mut pools) {
                let states = states.by_ref().take(chunk(text).len());
                states.for_each(|state| pool.push(state));
            }
        }
        Ok(pools)
    }
}

impl Graph {
    /// Elements of a hidden state, and positions.
    fn sizes(&self) -> (usize, usize) {
        match self {
            Self::Encoder(encoder) => {
                let facts = &encoder.model.facts;
                (facts.hidden, facts.context)
            }
            Self::Decoder(model) => (model.config().hidden, model.config().context),
        }
    }

    /// The pooling that models of the kind are trained with.
    fn usual_pooling(&self) -> Pooling {
        match self {
            Self::Encoder(_) => Pooling::Mean,
            Self::Decoder(_) => Pooling::Last,
        }
    }
}

/// What a model's files say about pooling.
enum Said {
    /// Nothing.
    Nothing,
    /// That there is none.
    NoPooling,
    /// The pooling, and whether vectors get the length 1.
    Pooling(Pooling, bool),
}

impl Said {
    fn read(source: &Source, files: Option<&SentenceFiles>) -> Result<Self> {
        Ok(match files {
            Some(files) => match files.pooling {
                Some(pooling) => Self::Pooling(pooling, files.normalize),
                None => Self::NoPooling,
            },
            None if source.kind() != Kind::Gguf => Self::Nothing,
            None => match arch::gguf_pooling(source.path(), source.gguf())? {
                Some(Some(pooling)) => Self::Pooling(pooling, true),
                Some(None) => Self::NoPooling,
                None => Self::Nothing,
            },
        })
    }

    /// The pooling, and whether vectors get the length 1.
    fn settings(
        &self,
        source: &Source,
        graph: &Graph,
        options: &EmbedOptions,
        notes: &mut Vec<String>,
    ) -> Result<(Pooling, bool)> {
        let wanted = options.normalization == Normalization::Model;
        Ok(match (self, options.pooling) {
            (Self::Pooling(said, normalize), pooling) => {
                (pooling.unwrap_or(*said), wanted && *normalize)
            }
            (_, Some(pooling)) => (pooling, wanted),
            (Self::NoPooling, None) => {
                return Err(bitnet_formats::Error::file(
                    source.path(),
                    "a model that names its pooling, or --pooling",
                    "one whose files say that it has none",
                )
                .into());
            }
            (Self::Nothing, None) => {
                let usual = graph.usual_pooling();
                let length = if wanted {
                    "the length 1"
                } else {
                    "their own length"
                };
                notes.push(format!(
                    "no file names the pooling: it is {usual}, and vectors have {length}"
                ));
                (usual, wanted)
            }
        })
    }
}

/// The text of the prompt that is put before each text.
fn prompt(source: &Source, files: &SentenceFiles, name: Option<&str>) -> Result<String> {
    let Some(name) = name.or(files.default_prompt.as_deref()) else {
        return Ok(String::new());
    };
    if let Some(text) = files.prompt(name) {
        return Ok(text.into());
    }
    let names: Vec<&str> = files.prompts.iter().map(|(name, _)| &name[..]).collect();
    let expected = match names[..] {
        [] => "no prompt name, since the model has no prompts".into(),
        _ => format!("one of {}", names.join(", ")),
    };
    let path = match source.kind() {
        Kind::Folder => source.path().join("config_sentence_transformers.json"),
        Kind::Gguf | Kind::File => source.path().to_path_buf(),
    };
    Err(bitnet_formats::Error::config(&path, "prompts", expected, format!("'{name}'")).into())
}

/// The facts of an encoder; none if the model is a decoder.
fn encoder_facts(source: &Source) -> Result<Option<HfEncoder>> {
    source.refuse_undecoded()?;
    let (path, value) = match (source.kind(), source.config()) {
        (Kind::Gguf, _) => {
            let architecture = Architecture::from_gguf(source.gguf())?;
            if architecture.kind != ModelKind::Encoder {
                return Ok(None);
            }
            crate::config::check_gguf_keys(source)?;
            let path = source.path().to_path_buf();
            let value = crate::config::gguf_config(source)?;
            (path, value)
        }
        (_, Some(value)) => {
            let path = source.path().join("config.json");
            if Architecture::from_hf_config(&path, value)?.kind != ModelKind::Encoder {
                return Ok(None);
            }
            (path, value.clone())
        }
        // Config::read says what is missing.
        (..) => return Ok(None),
    };
    let config = HfConfig {
        path: &path,
        value: &value,
    };
    Ok(Some(HfEncoder::read(&config)?))
}

fn load_encoder(
    source: &Source,
    facts: HfEncoder,
    options: &LoadOptions,
) -> Result<(Graph, Vec<String>)> {
    let runtime = options.runtime()?;
    let (int8, note) = int8_activations(source, facts.architecture, options.activations);
    let floats = [options.weights, options.embedding];
    let tensors =
        CheckpointLoader::new(source, (facts.architecture, false), &runtime, int8, floats);
    let model = BertModel::load(&tensors, facts)?;
    tensors.check_all_used()?;
    let tokenizer = Tokenizer::read(source, facts.vocab, None)?;
    let mut notes = source.notes().to_vec();
    notes.extend(note);
    notes.extend(tensors.rounding_notes());
    notes.extend(tokenizer.notes().iter().cloned());
    drop(tensors);
    let graph = Graph::Encoder(Box::new(Encoder {
        model,
        runtime,
        tokenizer,
    }));
    Ok((graph, notes))
}

fn load_decoder(source: &Source, options: &LoadOptions) -> Result<(Graph, Vec<String>)> {
    let mut config = Config::read(source)?;
    // An embedding model is often saved without its output matrix, which is not computed here.
    if source.kind() != Kind::Gguf && source.find("lm_head.weight").is_none() {
        config.tied = true;
    }
    let model = Model::load_source(source, config, options)?;
    model.tokenizer()?;
    let notes = model.notes().to_vec();
    Ok((Graph::Decoder(Box::new(model)), notes))
}
