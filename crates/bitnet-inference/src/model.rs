//! A model in memory, and its forward pass.

use crate::arch::Layer;
use crate::chat::ChatTemplate;
use crate::linear::{Linear, Machine};
use crate::load::{ActivationType, FloatType, Loader, Provider};
use crate::run::{Norm, Run, Scratch, Step, located};
use crate::shape::MadeUp;
use crate::tokenizer::Tokenizer;
use crate::{Config, Error, Result};
use bitnet_formats::Source;
use bitnet_formats::source::OpenOptions;
use bitnet_kernels::dense::DenseMatrix;
use bitnet_kernels::{Kernels, Pool};
use std::path::Path;
use std::sync::PoisonError;

/// How a model is loaded.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Threads; 0 for one on each core.
    pub threads: usize,
    /// The instruction set.
    pub kernels: Kernels,
    /// Inputs of ternary layers.
    pub activations: ActivationType,
    /// How linear layers with float activations are held.
    pub weights: FloatType,
    /// How embedding and output matrix are held.
    pub embedding: FloatType,
    /// What the files may leave open.
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
    fn machine(&self) -> Result<Machine> {
        let threads = match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let pool = Pool::new(threads).map_err(|source| Error::Threads { threads, source })?;
        Ok(Machine {
            kernels: self.kernels,
            pool,
        })
    }
}

/// A model, ready to run.
#[derive(Debug)]
pub struct Model {
    config: Config,
    machine: Machine,
    /// `(vocab, hidden)`.
    embedding: DenseMatrix,
    /// `(vocab, hidden)`; none where it is the embedding.
    head: Option<DenseMatrix>,
    norm: Norm,
    layers: Vec<Layer>,
    /// Radians for each position, of the pairs of a head.
    frequencies: Vec<f32>,
    tokenizer: Result<Tokenizer, Error>,
    template: Option<ChatTemplate>,
    notes: Vec<String>,
}

impl Model {
    /// Loads a Hugging Face folder or a GGUF file.
    ///
    /// # Errors
    /// See [`Model::load_with`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Self::load_with(path, &LoadOptions::default())
    }

    /// [`Model::load`] with choices. A model without a usable tokenizer loads; [`Model::tokenizer`]
    /// says what is wrong with it.
    ///
    /// # Errors
    /// [`Error::File`] for an unreadable checkpoint, a config that no graph follows, a tensor that
    /// is missing, has another shape, holds NaN or has no place in the graph; [`Error::Matrix`] for
    /// a matrix that the kernels do not take; [`Error::Threads`].
    pub fn load_with(path: impl AsRef<Path>, options: &LoadOptions) -> Result<Self> {
        let source = Source::open_with(path.as_ref(), &options.open)?;
        let config = Config::read(&source)?;
        let machine = options.machine()?;
        let recipe = source
            .document
            .as_ref()
            .is_some_and(|d| d.recipe["activations"] == "int8");
        let trained = config.architecture.int8_activations || source.bitnet.is_some() || recipe;
        let int8 = match options.activations {
            ActivationType::Auto => trained,
            ActivationType::Int8 => true,
            ActivationType::Float => false,
        };
        let floats = [options.weights, options.embedding];
        let loader = Loader {
            source: &source,
            config: &config,
            machine: &machine,
            int8,
            floats,
            used: Default::default(),
            buffers: Default::default(),
            losses: Default::default(),
        };
        // A large vocabulary takes as long as many layers. What building it needs is given back
        // before there are weights, or beside few of them.
        let read = || Tokenizer::read(&source, &config);
        let (tokenizer, loaded) = if machine.pool.threads() == 1 {
            (read(), weights(&loader, &machine))
        } else {
            std::thread::scope(|scope| {
                let beside = scope.spawn(read);
                let loaded = weights(&loader, &machine);
                (
                    beside
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                    loaded,
                )
            })
        };
        let (embedding, head, norm, layers) = loaded?;
        loader.check_all_used()?;
        let mut notes = source.notes.clone();
        if int8 != trained {
            let (uses, says) = if int8 {
                ("int8", "nothing about it")
            } else {
                ("floats", "it was trained with int8")
            };
            notes.push(format!(
                "inputs of ternary layers are {uses}, where the model says {says}"
            ));
        }
        let losses = loader
            .losses
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        notes.extend(
            losses
                .iter()
                .zip(["linear layers", "embedding and output matrix"])
                .zip(floats)
                .filter_map(|((l, w), f)| l.note(w, f)),
        );
        let template = ChatTemplate::read(&source)?;
        let mut model = Self::new(config, machine, embedding, head, norm, layers);
        (model.tokenizer, model.template, model.notes) = (tokenizer, template, notes);
        Ok(model)
    }

    /// A model of this shape with made-up ternary weights: good for measuring speed and memory and
    /// for nothing else. It has no tokenizer.
    ///
    /// # Errors
    /// [`Error::Threads`], and [`Error::Kernels`] for a shape that the kernels do not take.
    pub fn made_up(config: Config, options: &LoadOptions) -> Result<Self> {
        let machine = options.machine()?;
        let provider = MadeUp {
            config: &config,
            machine: &machine,
            embedding: options.embedding,
        };
        let (embedding, head, norm, layers) = weights(&provider, &machine)?;
        Ok(Self::new(config, machine, embedding, head, norm, layers))
    }

    fn new(
        config: Config,
        machine: Machine,
        embedding: DenseMatrix,
        head: Option<DenseMatrix>,
        norm: Norm,
        layers: Vec<Layer>,
    ) -> Self {
        let frequencies = config.rope.frequencies(config.head_dim);
        let tokenizer = Err(Error::Tokenizer {
            path: "the model".into(),
            what: "made-up weights have none".into(),
        });
        Self {
            config,
            machine,
            embedding,
            head,
            norm,
            layers,
            frequencies,
            tokenizer,
            template: None,
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
    /// [`Error::Tokenizer`] that says why the model has none that can be used.
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

    pub(crate) fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// What was assumed on loading, each a sentence for a person.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Threads that it runs on.
    pub fn threads(&self) -> usize {
        self.machine.pool.threads()
    }

    /// Bytes of the weights in memory.
    pub fn bytes(&self) -> usize {
        let linear: usize = self
            .layers
            .iter()
            .flat_map(Layer::linears)
            .map(|l| l.bytes())
            .sum();
        linear + self.embedding.bytes() + self.head.as_ref().map_or(0, DenseMatrix::bytes)
    }

    /// Bytes of the weights that a decoded token reads: all but the embedding, where it is not the
    /// output matrix too.
    pub fn bytes_per_token(&self) -> usize {
        self.bytes()
            - if self.head.is_some() {
                self.embedding.bytes()
            } else {
                0
            }
    }

    /// Multiply-adds of integers in a pass over `tokens` tokens of which the logits of `wanted` are
    /// asked for.
    pub fn integer_products(&self, tokens: usize, wanted: usize) -> usize {
        let of = |layers: &[&Linear], tokens: usize| {
            tokens * layers.iter().map(|l| l.integer_products()).sum::<usize>()
        };
        let last = self.layers.len().saturating_sub(1);
        let layers = self.layers.iter().map(Layer::linears).enumerate();
        // The last layer's attention reads all tokens; what follows it concerns those that are
        // wanted.
        layers
            .map(|(i, layers)| {
                of(&layers[..3], tokens) + of(&layers[3..], if i == last { wanted } else { tokens })
            })
            .sum()
    }

    /// Runs tokens of one or several sequences through the graph. Their keys and values go into the
    /// caches.
    ///
    /// Returns the logits that the steps want, in their order, `[wanted, vocab]`. After an error
    /// the caches are as long as before.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for a step without tokens, [`Error::Token`] for one outside the
    /// vocabulary, [`Error::Context`] where a cache has no room, [`Error::NotFinite`] where
    /// activations become NaN or infinite.
    ///
    /// # Panics
    /// If a cache was made for a model of another shape.
    pub fn forward<'s>(
        &self,
        steps: &mut [Step<'_>],
        scratch: &'s mut Scratch,
    ) -> Result<&'s [f32]> {
        let (hidden, vocab) = (self.config.hidden, self.config.vocab);
        scratch.places.clear();
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
            scratch
                .places
                .extend((first..first + len).map(|position| (i, position)));
        }
        scratch.x.resize(scratch.places.len() * hidden, 0.0);
        let tokens = steps.iter().flat_map(|s| s.tokens);
        tokens
            .zip(scratch.x.chunks_exact_mut(hidden))
            .for_each(|(&token, x)| self.embedding.row_into(token as usize, x));
        scratch.angles.clear();
        for &(_, position) in &scratch.places {
            scratch.angles.extend(self.frequencies.iter().map(|f| {
                // The angle is rounded to f32 as the models' own code has it; its sine and cosine
                // are exact.
                let (sin, cos) = f64::from(position as f32 * f).sin_cos();
                (cos as f32, sin as f32)
            }));
        }
        let mut run = Run {
            machine: &self.machine,
            config: &self.config,
            scratch,
            steps,
        };
        for (i, layer) in self.layers.iter().enumerate() {
            layer
                .forward(&mut run, i)
                .map_err(located(|| format!("layer {i}")))?;
        }
        run.norm(&self.norm, &[])?;
        let wanted = run.scratch.x.len() / hidden;
        steps
            .iter_mut()
            .for_each(|step| step.cache.len += step.tokens.len());
        scratch.logits.resize(wanted * vocab, 0.0);
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        self.machine.kernels.dense_matmul(
            &self.machine.pool,
            head,
            scratch.normed.floats(),
            None,
            &mut scratch.logits,
        );
        Ok(&scratch.logits)
    }
}

type Parts = (DenseMatrix, Option<DenseMatrix>, Norm, Vec<Layer>);

/// All weights, layers side by side on the threads of the pool.
fn weights(provider: &dyn Provider, machine: &Machine) -> Result<Parts> {
    let config = provider.config();
    let embedding = provider.embedding("model.embed_tokens", config.vocab, config.hidden)?;
    let head = if config.tied {
        None
    } else {
        Some(provider.embedding("lm_head", config.vocab, config.hidden)?)
    };
    let norm = provider.norm("model.norm", config.hidden)?;
    let mut layers: Vec<Option<Result<Layer>>> = (0..config.layers).map(|_| None).collect();
    machine.pool.for_chunks(&mut layers, 1, |i, layer| {
        layer[0] = Some(Layer::load(provider, i))
    });
    let layers = layers.into_iter().flatten().collect::<Result<_>>()?;
    Ok((embedding, head, norm, layers))
}
