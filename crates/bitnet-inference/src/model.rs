//! A model in memory, and its forward pass.

use crate::arch::DecoderLayer;
use crate::chat::{ChatMessage, ChatTemplate, Tools};
use crate::forward::{ForwardBuffers, ForwardPass, ForwardStep, NormGain, located, scale};
use crate::linear::{KernelPool, LinearLayer};
use crate::load::{
    ActivationType, CheckpointLoader, DecoderLoader, EmbeddingUse, FloatType, WeightProvider,
};
use crate::synthetic::{Shape, SyntheticWeights};
use crate::tokenizer::Tokenizer;
use crate::{Config, Error, Result};
use bitnet_core::hadamard::Hadamard;
use bitnet_formats::Source;
use bitnet_formats::arch::Architecture;
use bitnet_formats::source::OpenOptions;
use bitnet_kernels::dense::DenseMatrix;
use bitnet_kernels::{Kernels, Pool};
use std::path::Path;

/// Options of [`Model::load_with`].
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Number of threads; 0 for one per core.
    pub threads: usize,
    /// The instruction set.
    pub kernels: Kernels,
    /// Type of the inputs of ternary layers.
    pub activations: ActivationType,
    /// Type in memory of linear layers with float activations.
    pub weights: FloatType,
    /// Type in memory of embedding and output matrix.
    pub embedding: FloatType,
    /// How to open the checkpoint.
    pub open: OpenOptions,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            threads: 0,
            kernels: Kernels::detect(),
            activations: ActivationType::Auto,
            weights: FloatType::Exact,
            embedding: FloatType::Exact,
            open: OpenOptions::default(),
        }
    }
}

impl LoadOptions {
    pub(crate) fn runtime(&self) -> Result<KernelPool> {
        let threads = match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let pool = Pool::new(threads).map_err(|source| Error::Threads { threads, source })?;
        Ok(KernelPool {
            kernels: self.kernels,
            pool,
        })
    }
}

/// A model, ready to run.
#[derive(Debug)]
pub struct Model {
    config: Config,
    runtime: KernelPool,
    weights: ModelWeights,
    /// Radians per position of each pair of a head, and the multiplier of its sine and cosine: of
    /// the model, and of layers with a window.
    frequencies: Vec<(Vec<f32>, f32)>,
    tokenizer: Result<Tokenizer, Error>,
    template: Result<Option<ChatTemplate>, Error>,
    notes: Vec<String>,
}

/// Modules of the embedding and of an output matrix of its own.
const EMBEDDING: &str = "model.embed_tokens";
const HEAD: &str = "lm_head";

/// All weights of a model.
#[derive(Debug)]
struct ModelWeights {
    /// `(vocab, hidden)`.
    embedding: DenseMatrix,
    /// `(vocab, hidden)`; none if the embedding is the output matrix.
    head: Option<DenseMatrix>,
    /// The rotations of the rows of the embedding and of the output matrix.
    rotations: [Option<Hadamard>; 2],
    /// The norm before the output matrix.
    norm: NormGain,
    layers: Vec<DecoderLayer>,
}

impl ModelWeights {
    /// Loads layers in parallel on the threads of the pool.
    fn load(provider: &dyn WeightProvider, runtime: &KernelPool) -> Result<Self> {
        let config = provider.config();
        let embedding = provider.embedding(EMBEDDING, config.vocab, config.hidden)?;
        let head = if config.tied {
            None
        } else {
            Some(provider.embedding(HEAD, config.vocab, config.hidden)?)
        };
        let head_name = if config.tied { EMBEDDING } else { HEAD };
        let rotations = [
            provider.rotation(EMBEDDING, EmbeddingUse::Table)?,
            provider.rotation(head_name, EmbeddingUse::Head)?,
        ];
        let norm = provider.norm("model.norm", config.hidden)?;
        let mut layers: Vec<Option<Result<DecoderLayer>>> =
            (0..config.layers).map(|_| None).collect();
        runtime.pool.for_chunks(&mut layers, 1, |i, layer| {
            layer[0] = Some(DecoderLayer::load(provider, i))
        });
        Ok(Self {
            embedding,
            head,
            rotations,
            norm,
            layers: layers.into_iter().flatten().collect::<Result<_>>()?,
        })
    }

    /// All layers and the norm after them.
    fn run(&self, pass: &mut ForwardPass<'_, '_>) -> Result<()> {
        for (i, layer) in self.layers.iter().enumerate() {
            layer
                .forward(pass, i)
                .map_err(located(|| format!("layer {i}")))?;
        }
        pass.norm(&self.norm, &[])
    }
}

impl Model {
    /// Loads a Hugging Face folder or a GGUF file.
    ///
    /// # Errors
    /// See [`Model::load_with`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Self::load_with(path, &LoadOptions::default())
    }

    /// [`Model::load`] with options. A model without a usable tokenizer loads; [`Model::tokenizer`]
    /// then returns the reason.
    ///
    /// # Errors
    /// [`Error::File`] for an unreadable checkpoint, a config that no graph supports, a tensor that
    /// is missing, has another shape, holds NaN or has no place in the graph; [`Error::Matrix`] for
    /// a matrix that the kernels reject; [`Error::Threads`].
    pub fn load_with(path: impl AsRef<Path>, options: &LoadOptions) -> Result<Self> {
        let source = Source::open_with(path.as_ref(), &options.open)?;
        let config = Config::read(&source)?;
        Self::load_source(&source, config, options)
    }

    /// [`Model::load_with`] of an open checkpoint.
    pub(crate) fn load_source(
        source: &Source,
        config: Config,
        options: &LoadOptions,
    ) -> Result<Self> {
        let runtime = options.runtime()?;
        let (int8, int8_note) = int8_activations(source, config.architecture, options.activations);
        let facts = (config.architecture, config.tied);
        let floats = [options.weights, options.embedding];
        let loader = DecoderLoader {
            tensors: CheckpointLoader::new(source, facts, &runtime, int8, floats),
            config: &config,
        };
        let (tokenizer, weights) = load_parts(source, &config, &loader, &runtime);
        let weights = weights?;
        loader.tensors.check_all_used()?;
        let mut notes = source.notes().to_vec();
        notes.extend(config.notes.iter().cloned());
        notes.extend(int8_note);
        notes.extend(loader.tensors.rounding_notes());
        // An unusable tokenizer or template is an error where it is used.
        let template = ChatTemplate::read(source);
        notes.extend(tokenizer.iter().flat_map(Tokenizer::notes).cloned());
        let templates = template.iter().flatten();
        notes.extend(templates.flat_map(ChatTemplate::notes).cloned());
        let mut model = Self::new(config, runtime, weights);
        (model.tokenizer, model.template, model.notes) = (tokenizer, template, notes);
        Ok(model)
    }

    /// A model of this shape with synthetic ternary weights and no tokenizer, for measurements of
    /// speed and memory only. Ternary layers have one scale and int8 activations; the embedding is
    /// floats.
    ///
    /// # Errors
    /// [`Error::Threads`], and [`Error::Kernels`] for a shape that the kernels reject.
    pub fn synthetic(config: Config, options: &LoadOptions) -> Result<Self> {
        Self::synthetic_groups(config, None, options)
    }

    /// [`Model::synthetic`] of the shape of this name ([`Config::shape`]), with the weights that the
    /// published models of that shape have: `bonsai-…` are ternary in groups of 128, embedding and
    /// output matrix too, and have int8 activations only where the options say so, as their files
    /// do not ask for it.
    ///
    /// # Errors
    /// As [`Config::shape`] and [`Model::synthetic`].
    pub fn synthetic_shape(name: &str, options: &LoadOptions) -> Result<Self> {
        Self::synthetic_groups(Config::shape(name)?, Shape::by_name(name)?.group, options)
    }

    fn synthetic_groups(
        config: Config,
        group: Option<usize>,
        options: &LoadOptions,
    ) -> Result<Self> {
        let runtime = options.runtime()?;
        let provider = SyntheticWeights {
            config: &config,
            runtime: &runtime,
            embedding: options.embedding,
            group,
            int8: group.is_none() || options.activations == ActivationType::Int8,
        };
        let weights = ModelWeights::load(&provider, &runtime)?;
        Ok(Self::new(config, runtime, weights))
    }

    fn new(config: Config, runtime: KernelPool, weights: ModelWeights) -> Self {
        let frequencies = [Some(&config.rope), config.local_rope.as_ref()]
            .into_iter()
            .flatten()
            .map(|rope| (rope.frequencies(), rope.attention_factor))
            .collect();
        let tokenizer = Err(Error::Tokenizer {
            path: "the model".into(),
            what: "synthetic weights have none".into(),
        });
        Self {
            config,
            runtime,
            weights,
            frequencies,
            tokenizer,
            template: Ok(None),
            notes: vec![],
        }
    }

    /// The facts of the graph.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] with the reason, if the model has no usable tokenizer.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().map_err(|e| match e {
            Error::Tokenizer { path, what } => Error::Tokenizer {
                path: path.clone(),
                what: what.clone(),
            },
            other => Error::Tokenizer {
                path: "the model".into(),
                what: other.to_string(),
            },
        })
    }

    /// Sentences for the user about what was assumed or rounded on loading.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.runtime.pool.threads()
    }

    /// Bytes of the weights in memory.
    pub fn bytes(&self) -> usize {
        let ModelWeights {
            embedding,
            head,
            layers,
            ..
        } = &self.weights;
        let linear: usize = layers
            .iter()
            .flat_map(DecoderLayer::linears)
            .map(|l| l.bytes())
            .sum();
        linear + embedding.bytes() + head.as_ref().map_or(0, DenseMatrix::bytes)
    }

    /// Bytes of the weights that a decoded token reads: without the embedding, unless it is the
    /// output matrix too, and without the experts that it does not use.
    pub fn bytes_per_token(&self) -> usize {
        let layers = self.weights.layers.iter();
        let read = self.bytes() - layers.map(DecoderLayer::unused_bytes).sum::<usize>();
        match &self.weights.head {
            Some(_) => read - self.weights.embedding.bytes(),
            None => read,
        }
    }

    /// Integer multiply-adds in a pass over `tokens` tokens that computes the logits of `wanted`.
    pub fn integer_products(&self, tokens: usize, wanted: usize) -> usize {
        let layers = &self.weights.layers;
        let last = layers.len().saturating_sub(1);
        // In the last layer, q, k and v see all tokens, the rest only the wanted ones.
        let products = |(i, layer): (usize, &DecoderLayer)| {
            let sum = |n: usize, l: &LinearLayer| n + l.integer_products();
            let before = layer.before_attention().iter().fold(0, sum);
            let after = layer.products_after_attention();
            tokens * before + if i == last { wanted } else { tokens } * after
        };
        layers.iter().enumerate().map(products).sum()
    }

    /// Whether the model has a chat template. It may still fail, with the reason, when it is used.
    pub fn can_chat(&self) -> bool {
        !matches!(self.template, Ok(None))
    }

    /// The tokens of a conversation up to the start of the answer, by the model's chat template.
    ///
    /// # Errors
    /// [`Error::Template`] if there is none or it fails; [`Error::Tokenizer`].
    pub fn chat_tokens(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        self.chat_tokens_with(messages, None)
    }

    /// [`Model::chat_tokens`] with tools that the model may call.
    ///
    /// # Errors
    /// As [`Model::chat_tokens`].
    pub fn chat_tokens_with(
        &self,
        messages: &[ChatMessage],
        tools: Option<&Tools>,
    ) -> Result<Vec<u32>> {
        let template = match &self.template {
            Ok(Some(template)) => template,
            Ok(None) => {
                let what = "the model has none; give it a text to continue instead";
                return Err(Error::Template(what.into()));
            }
            Err(error) => return Err(Error::Template(error.to_string())),
        };
        // The template writes every special token itself.
        self.tokenizer()?
            .encode(&template.render(messages, tools)?, false)
    }

    /// Runs tokens of one or several sequences through the graph. Their keys and values enter the
    /// caches, whose states move on.
    ///
    /// Returns the requested logits in the order of the steps, `[wanted, vocab]`. After an error
    /// the caches have their former lengths, but one with states that the pass has changed is empty.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for a step without tokens, [`Error::Token`] for a token outside the
    /// vocabulary, [`Error::Context`] for a cache that is too short, [`Error::NotFinite`] if
    /// activations become NaN or infinite.
    ///
    /// # Panics
    /// If a cache was made for a model of another shape.
    pub fn forward<'s>(
        &self,
        steps: &mut [ForwardStep<'_>],
        buffers: &'s mut ForwardBuffers,
    ) -> Result<&'s [f32]> {
        let vocab = self.config.vocab;
        let wanted = self.run_layers(steps, buffers)?;
        buffers.logits.resize(wanted * vocab, 0.0);
        let KernelPool { kernels, pool } = &self.runtime;
        let head = self.weights.head.as_ref();
        let [_, rotation] = &self.weights.rotations;
        let scales = &self.config.scales;
        kernels.dense_matmul(
            pool,
            head.unwrap_or(&self.weights.embedding),
            buffers.normed.floats(&self.runtime, rotation.as_ref()),
            None,
            &mut buffers.logits,
        );
        if scales.logits != 1.0 || scales.logit_cap.is_some() {
            pool.for_chunks(&mut buffers.logits, vocab, |_, logits| {
                scale(logits, scales.logits);
                if let Some(cap) = scales.logit_cap {
                    logits.iter_mut().for_each(|x| *x = cap * (*x / cap).tanh());
                }
            });
        }
        Ok(&buffers.logits)
    }

    /// [`Model::forward`] up to the norm before the output matrix: its output, `[wanted, hidden]`.
    pub(crate) fn hidden_states<'s>(
        &self,
        steps: &mut [ForwardStep<'_>],
        buffers: &'s mut ForwardBuffers,
    ) -> Result<&'s [f32]> {
        self.run_layers(steps, buffers)?;
        Ok(buffers.normed.floats(&self.runtime, None))
    }

    /// Writes the output of the last norm for the wanted tokens, and returns their number.
    fn run_layers(
        &self,
        steps: &mut [ForwardStep<'_>],
        buffers: &mut ForwardBuffers,
    ) -> Result<usize> {
        self.place(steps, buffers)?;
        self.embed(steps, buffers);
        let mut pass = ForwardPass {
            runtime: &self.runtime,
            config: &self.config,
            buffers,
            steps,
        };
        if let Err(error) = self.weights.run(&mut pass) {
            steps.iter_mut().for_each(|step| step.cache.abandon());
            return Err(error);
        }
        let wanted = buffers.x.len() / self.config.hidden;
        for step in steps {
            step.cache.len += step.tokens.len();
        }
        Ok(wanted)
    }

    /// Checks the steps and writes the step and position of each token.
    fn place(&self, steps: &[ForwardStep<'_>], buffers: &mut ForwardBuffers) -> Result<()> {
        let vocab = self.config.vocab;
        buffers.places.clear();
        for (i, step) in steps.iter().enumerate() {
            let (first, len, capacity) =
                (step.cache.len(), step.tokens.len(), step.cache.capacity());
            if len == 0 {
                return Err(Error::EmptyPrompt);
            }
            if len > capacity - first {
                return Err(Error::Context {
                    got: first + len,
                    context: capacity,
                });
            }
            if let Some(&got) = step.tokens.iter().find(|&&t| t as usize >= vocab) {
                return Err(Error::Token { got, vocab });
            }
            let positions = first..first + len;
            buffers
                .places
                .extend(positions.map(|position| (i, position)));
        }
        Ok(())
    }

    /// Writes the embeddings and the rotation angles of the tokens.
    fn embed(&self, steps: &[ForwardStep<'_>], buffers: &mut ForwardBuffers) {
        let hidden = self.config.hidden;
        buffers.x.resize(buffers.places.len() * hidden, 0.0);
        let tokens = steps.iter().flat_map(|s| s.tokens);
        for (&token, x) in tokens.zip(buffers.x.chunks_exact_mut(hidden)) {
            self.weights.embedding.row_into(token as usize, x);
            if let [Some(rotation), _] = &self.weights.rotations {
                self.runtime.kernels.hadamard_unrotate(rotation, x);
            }
            scale(x, self.config.scales.embedding);
        }
        buffers.angles.clear();
        for (frequencies, factor) in &self.frequencies {
            for &(_, position) in &buffers.places {
                buffers.angles.extend(frequencies.iter().map(|f| {
                    // The angle is rounded to f32 as in the models' own code; its sine and cosine
                    // are computed in f64.
                    let (sin, cos) = f64::from(position as f32 * f).sin_cos();
                    (cos as f32 * factor, sin as f32 * factor)
                }));
            }
        }
    }
}

/// Whether the inputs of ternary layers are int8, and a note where the checkpoint says otherwise.
pub(crate) fn int8_activations(
    source: &Source,
    architecture: &Architecture,
    wanted: ActivationType,
) -> (bool, Option<String>) {
    let recipe = source.document();
    let trained = architecture.int8_activations
        || source.bitnet().is_some()
        || recipe.is_some_and(|d| d.recipe["activations"] == "int8");
    let int8 = match wanted {
        ActivationType::Auto => trained,
        ActivationType::Int8 => true,
        ActivationType::Float => false,
    };
    let (uses, says) = if int8 {
        ("int8", "nothing about it")
    } else {
        ("floats", "it was trained with int8")
    };
    let note = format!("inputs of ternary layers are {uses}, where the model says {says}");
    (int8, (int8 != trained).then_some(note))
}

/// Reads tokenizer and weights, in parallel if there are threads: a large vocabulary takes as long
/// as many layers.
fn load_parts(
    source: &Source,
    config: &Config,
    provider: &dyn WeightProvider,
    runtime: &KernelPool,
) -> (Result<Tokenizer>, Result<ModelWeights>) {
    let tokenizer = || Tokenizer::read(source, config.vocab, config.bos);
    let weights = || ModelWeights::load(provider, runtime);
    if runtime.pool.threads() == 1 {
        return (tokenizer(), weights());
    }
    std::thread::scope(|scope| {
        let tokenizer = scope.spawn(tokenizer);
        let weights = weights();
        let tokenizer = tokenizer
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (tokenizer, weights)
    })
}
